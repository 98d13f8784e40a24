# SPDX-License-Identifier: Apache-2.0
"""Layouts of block scales: row-major, and the tiled 128x4 order that block-scaled matrix units read.

The third, FRAGMENT_16X64, orders codes and scales together: fragment_layout.py.

Tiled      the scale matrix [R, C] is cut into tiles of 128 rows by 4 columns, padded with zero bytes at the right and
           lower edge. Tiles follow each other row-major (all column tiles of the first 128 rows, then the next). Inside
           a tile of 512 bytes, row r and column c lie at (r % 32) * 16 + (r // 32) * 4 + c.
Source     docs/numerics.md, section "Scale layouts"
"""

import enum

import torch
from torch import Tensor

TILE_ROWS = 128
TILE_COLUMNS = 4
TILE_BYTES = TILE_ROWS * TILE_COLUMNS


class ScaleLayout(enum.Enum):
    """Order of block scales in memory."""

    ROW_MAJOR = "row_major"
    TILED_128X4 = "tiled_128x4"
    FRAGMENT_16X64 = "fragment_16x64"


def tiled_128x4_bytes(num_rows: int, num_columns: int) -> int:
    """Return the bytes of a tiled scale matrix of num_rows by num_columns, padding included."""
    return -(-num_rows // TILE_ROWS) * -(-num_columns // TILE_COLUMNS) * TILE_BYTES


def to_tiled_128x4(scales: Tensor) -> Tensor:
    """Reorder row-major scales into 128x4 tiles.

    Args:
        scales: [..., R, C] of a one-byte dtype.

    Returns:
        [..., ceil(R/128) * ceil(C/4) * 512] of the same dtype, newly allocated; padding bytes are zero.

    Raises:
        TypeError: scales are wider than one byte.
        ValueError: scales have fewer than two dimensions.
    """
    _require_bytes("to_tiled_128x4", scales)
    if scales.ndim < 2:
        raise ValueError(f"to_tiled_128x4: scales must be [..., R, C]; got {list(scales.shape)}. Add a row dimension.")
    *leading, num_rows, num_columns = scales.shape
    row_tiles, column_tiles = -(-num_rows // TILE_ROWS), -(-num_columns // TILE_COLUMNS)
    padded = torch.zeros(
        *leading, row_tiles * TILE_ROWS, column_tiles * TILE_COLUMNS, dtype=torch.uint8, device=scales.device
    )
    padded[..., :num_rows, :num_columns] = scales.view(torch.uint8)
    tiles = padded.view(*leading, row_tiles, 4, 32, column_tiles, 4)  # [..., row tile, r // 32, r % 32, column tile, c]
    return tiles.movedim(-2, -4).transpose(-2, -3).flatten(-5).view(scales.dtype)


def from_tiled_128x4(flat: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Undo to_tiled_128x4.

    Args:
        flat: [..., ceil(R/128) * ceil(C/4) * 512] of a one-byte dtype; padding bytes are ignored.
        num_rows: R.
        num_columns: C.

    Returns:
        [..., R, C] of the same dtype, contiguous, newly allocated.

    Raises:
        TypeError: flat is wider than one byte.
        ValueError: the size is not that of a tiled R by C matrix.
    """
    _require_bytes("from_tiled_128x4", flat)
    expected = tiled_128x4_bytes(num_rows, num_columns)
    if flat.ndim == 0 or flat.shape[-1] != expected:
        raise ValueError(
            f"from_tiled_128x4: {num_rows} x {num_columns} scales take {expected} bytes in 128x4 tiles; got "
            f"{list(flat.shape)}. Check R and C, or whether the scales are still row-major."
        )
    leading = flat.shape[:-1]
    row_tiles, column_tiles = -(-num_rows // TILE_ROWS), -(-num_columns // TILE_COLUMNS)
    tiles = flat.view(torch.uint8).reshape(*leading, row_tiles, column_tiles, 32, 4, 4)
    padded = tiles.transpose(-2, -3).movedim(-4, -2)  # [..., row tile, r // 32, r % 32, column tile, c]
    padded = padded.reshape(*leading, row_tiles * TILE_ROWS, column_tiles * TILE_COLUMNS)
    return padded[..., :num_rows, :num_columns].clone(memory_format=torch.contiguous_format).view(flat.dtype)


def _require_bytes(function: str, scales: Tensor) -> None:
    if scales.element_size() != 1:
        raise TypeError(
            f"{function}: scales must have a one-byte dtype (E4M3, E8M0, uint8); got {scales.dtype}. Encode them first."
        )
