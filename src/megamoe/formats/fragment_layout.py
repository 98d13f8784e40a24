# SPDX-License-Identifier: Apache-2.0
"""FRAGMENT_16X64: codes and block scales in the order in which a warp's matrix instruction wants them in registers.

The matrix is cut into tiles of 16 rows by 64 columns, row-major; a tile is one contiguous run of 512 code bytes and one
of 64 scale bytes. Codes and scales keep their sizes and dtypes, only the order of bits changes, so the layout is undone
exactly.

Codes      lane l = 4 g + t of a warp owns bytes 16 l to 16 l + 15 of a tile: four little-endian words, word j for
           columns 16 j to 16 j + 15. A word holds the eight codes that m16n8k16 takes from lane l as four pairs:

               pair 0: row g, columns 2t, 2t + 1        pair 2: row g, columns 2t + 8, 2t + 9
               pair 1: row g + 8, the same              pair 3: row g + 8, the same

           The first column of a pair lies in the low half of the word, the second in the high half. Inside a half, four
           magnitudes (exponent and mantissa, three bits) stand side by side, then four signs:

               bit      15  14  13  12 | 11..9  8..6  5..3  2..0
               of pair   0   3   2   1 |   3     0     1     2

           so that one AND, or one shift and one AND, puts a pair's magnitudes on the lowest exponent bits of two bf16
           numbers: kernels/parts/fragment_device.py.
Scales     byte 8 g + j of a tile is the scale of row g, columns 16 j ..; byte 8 g + 4 + j that of row g + 8.
Source     docs/kernels.md, section "From bytes to MMA"
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

TILE_ROWS = 16
TILE_COLUMNS = 64
TILE_CODE_BYTES = TILE_ROWS * TILE_COLUMNS // 2
TILE_SCALE_BYTES = TILE_ROWS * TILE_COLUMNS // 16

MAGNITUDE_BIT = (6, 3, 0, 9)
"""Lowest bit of each pair's magnitude inside a half word."""

SIGN_BIT = (15, 12, 13, 14)
"""Sign bit of each pair inside a half word."""


class CodeLayout(enum.Enum):
    """Order of codes in memory."""

    ROW_MAJOR = "row_major"
    FRAGMENT_16X64 = "fragment_16x64"


def fits_fragments(num_rows: int, num_columns: int) -> bool:
    """Return whether a matrix of that size has this layout."""
    return num_rows % TILE_ROWS == 0 and num_columns % TILE_COLUMNS == 0


def codes_to_fragments(codes: Tensor) -> Tensor:
    """Reorder row-major codes.

    Args:
        codes: [..., N, K/2] uint8, N a multiple of 16, K of 64.

    Returns:
        [..., N, K/2] uint8, newly allocated.

    Raises:
        ValueError: N or K is not as above.
    """
    *leading, num_rows, half = codes.shape
    _require_fit("codes_to_fragments", num_rows, half * 2)
    # rows: tile, half of the tile, g; columns: tile, word, half of the word's columns, t (a byte is a pair of columns)
    parts = codes.reshape(-1, num_rows // 16, 2, 8, half // 32, 4, 2, 4)
    fragments = parts.permute(0, 1, 4, 3, 7, 5, 6, 2)  # [.., row tile, column tile, g, t, word, column half, row half]
    pairs = fragments.reshape(-1, 4).to(torch.int32)  # pair = 2 * column half + row half
    words = torch.zeros(pairs.shape[0], dtype=torch.int32, device=codes.device)
    for pair in range(4):
        for column in range(2):
            nibble = pairs[:, pair] >> (4 * column)
            half_word = ((nibble & 7) << MAGNITUDE_BIT[pair]) | (((nibble >> 3) & 1) << SIGN_BIT[pair])
            words |= half_word << (16 * column)
    return words.view(torch.uint8).view(*leading, num_rows, half)


def codes_from_fragments(codes: Tensor) -> Tensor:
    """Undo codes_to_fragments.

    Args:
        codes: [..., N, K/2] uint8 in fragment order.

    Returns:
        [..., N, K/2] uint8, row-major, newly allocated.

    Raises:
        ValueError: N is not a multiple of 16, or K not of 64.
    """
    *leading, num_rows, half = codes.shape
    _require_fit("codes_from_fragments", num_rows, half * 2)
    words = codes.contiguous().view(-1, 4).view(torch.int32).view(-1)
    pairs = torch.empty(words.shape[0], 4, dtype=torch.uint8, device=codes.device)
    for pair in range(4):
        nibbles = [
            ((words >> (16 * column + MAGNITUDE_BIT[pair])) & 7)
            | (((words >> (16 * column + SIGN_BIT[pair])) & 1) << 3)
            for column in range(2)
        ]
        pairs[:, pair] = (nibbles[0] | (nibbles[1] << 4)).to(torch.uint8)
    parts = pairs.view(-1, num_rows // 16, half // 32, 8, 4, 4, 2, 2)
    return parts.permute(0, 1, 7, 3, 2, 5, 6, 4).reshape(*leading, num_rows, half)


def scales_to_fragments(scales: Tensor) -> Tensor:
    """Reorder row-major block scales.

    Args:
        scales: [..., N, K/16] of a one-byte dtype, N a multiple of 16, K of 64.

    Returns:
        [..., N, K/16] of the same dtype, newly allocated.

    Raises:
        ValueError: N or K is not as above.
    """
    num_rows, num_blocks = scales.shape[-2:]
    _require_fit("scales_to_fragments", num_rows, num_blocks * 16)
    parts = scales.view(torch.uint8).reshape(-1, num_rows // 16, 2, 8, num_blocks // 4, 4)
    return parts.permute(0, 1, 4, 3, 2, 5).reshape(scales.shape).view(scales.dtype)


def scales_from_fragments(scales: Tensor) -> Tensor:
    """Undo scales_to_fragments.

    Args:
        scales: [..., N, K/16] of a one-byte dtype in fragment order.

    Returns:
        [..., N, K/16] of the same dtype, row-major, newly allocated.

    Raises:
        ValueError: N is not a multiple of 16, or K not of 64.
    """
    num_rows, num_blocks = scales.shape[-2:]
    _require_fit("scales_from_fragments", num_rows, num_blocks * 16)
    parts = scales.view(torch.uint8).reshape(-1, num_rows // 16, num_blocks // 4, 8, 2, 4)
    return parts.permute(0, 1, 4, 3, 2, 5).reshape(scales.shape).view(scales.dtype)


def _require_fit(function: str, num_rows: int, num_columns: int) -> None:
    if not fits_fragments(num_rows, num_columns):
        raise ValueError(
            f"{function}: the fragment layout needs N a multiple of {TILE_ROWS} and K of {TILE_COLUMNS}; got N "
            f"{num_rows}, K {num_columns}. Pad the weight with zeros when converting."
        )
