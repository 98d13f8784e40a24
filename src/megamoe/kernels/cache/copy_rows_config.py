# SPDX-License-Identifier: Apache-2.0
"""Compile key of copy_cache and save_rows, and how their rows are shared out."""

from __future__ import annotations

import dataclasses

THREADS = 128
LANES = 32
PIECES = 4
"""Pieces of 16 bytes that a thread has on their way at once; a warp copies LANES * PIECES of them, of one row."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        op: "copy" rows by slots, or "save" the last rows of sequences.
    """

    op: str
