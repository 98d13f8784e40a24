# SPDX-License-Identifier: Apache-2.0
"""How kernels that work on rows share a row out to threads, and where tiled scales lie.

A row of K values is cut into vectors of 8, or of 16 where a thread owns whole NVFP4 blocks. `lanes` threads share a
row; thread `l` holds vectors l, l + lanes, … in registers, 32 values at most where the size divides, so that a row is
read once and up to four 16-byte loads a thread are in flight. Short rows share a block of 128 threads.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

VECTOR = 8
BLOCK_THREADS = 128
WARP = 32
_WANTED_VALUES = 32  # a thread


@dataclasses.dataclass(frozen=True)
class RowTile:
    """How rows of one width are shared out.

    Attributes:
        width: K.
        lanes: threads per row: a power of two up to 32, or a multiple of 32.
        vectors: vectors per thread.
        rows: rows per block.
        exact: every thread has all its vectors.
        size: values of a vector, 8 or 16.
    """

    width: int
    lanes: int
    vectors: int
    rows: int
    exact: bool
    size: int = VECTOR

    @property
    def threads(self) -> int:
        """Threads per block."""
        return self.lanes * self.rows

    @property
    def warps(self) -> int:
        """Warps that share a row; 1 if a row lies in one warp."""
        return max(1, self.lanes // WARP)


def row_tile(width: int, min_lanes: int = 2, size: int = VECTOR) -> RowTile:
    """Return the tile for rows of `width` values, a multiple of `size` up to 32768.

    Args:
        width: K.
        min_lanes: fewest threads per row, a power of two up to 32.
        size: values of a vector, 8 or 16.
    """
    num_vectors = width // size
    wanted = math.ceil(num_vectors / (_WANTED_VALUES // size))
    if wanted <= WARP:
        lanes = max(min_lanes, 1 << (wanted - 1).bit_length())
        rows = BLOCK_THREADS // lanes
    else:
        smallest = WARP * math.ceil(wanted / WARP)
        candidates = range(smallest, min(2 * smallest, 1024) + 1, WARP)
        lanes = next((lanes for lanes in candidates if num_vectors % lanes == 0), smallest)
        rows = 1
    return RowTile(width, lanes, math.ceil(num_vectors / lanes), rows, num_vectors % lanes == 0, size)


def tiled_place(row: Any, column: Any, num_columns: int) -> Any:
    """Return where the scale of a row and column lies in 128x4 tiles; row and column are numbers of either half."""
    tile = row // 128 * -(-num_columns // 4) + column // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
