# SPDX-License-Identifier: Apache-2.0
"""Bits of the NVFP4 decoder, for device code and for the tests that try all of them (fragment_device.py says how)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MAGNITUDES = 0x01C001C0
SIGNS = 0x80008000
SCALE_BITS = 0x07F007F0
TWO_TO_127 = 0x7F007F00  # two bf16 numbers
TWO_TO_112 = 0x77807780
UNDO = 2.0**7
"""What a sum over one decoded operand is multiplied by, besides the tensor scale."""


def code_pairs(word: Any, constant: Callable[[int], Any] = int) -> tuple[Any, Any, Any, Any]:
    """Return the four pairs of a word of codes in fragment order, each value times 2^-126.

    Args:
        word: 32 bits; anything that shifts and combines like an unsigned integer of 32 bits.
        constant: makes such a number of an int.
    """
    pair, magnitudes, signs = constant(MAGNITUDES | SIGNS), constant(MAGNITUDES), constant(SIGNS)
    return (
        word & pair,
        (word << 3) & pair,
        ((word << 6) & magnitudes) | ((word << 2) & signs),
        ((word >> 3) & magnitudes) | ((word << 1) & signs),
    )


def plain_pair(byte: Any, constant: Callable[[int], Any] = int) -> Any:
    """Return the two codes of a row-major byte (bits above it are ignored), each value times 2^-126."""
    low = ((byte << 6) & constant(0x1C0)) | ((byte << 12) & constant(0x8000))
    high = ((byte << 18) & constant(0x1C00000)) | ((byte << 24) & constant(0x80000000))
    return low | high
