# SPDX-License-Identifier: Apache-2.0
"""Compile key of attention in tiles of 64 items, and where everything lies in shared memory."""

from __future__ import annotations

import dataclasses

TILE_ITEMS = 64
BLOCK_COLUMNS = 64  # of a row: 128 bytes of fp16, one for each multiplying warp
WARPS = 8  # that multiply
FETCHERS = 8  # warps that bring rows
THREADS = (WARPS + FETCHERS) * 32
MAX_ROWS = 64  # heads of a thread block


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        heads: H.
        width: C.
        rope: R.
        q: "bf16" or "f32".
        out: "bf16" or "f32"; "partial" for fp32 sums of a share of the items, and what their weights are relative to.
    """

    heads: int
    width: int
    rope: int
    q: str
    out: str

    @property
    def head_tiles(self) -> int:
        """Blocks of 16 heads that a thread block has."""
        return 1 if self.heads <= 16 else 2 if self.heads <= 32 else 4

    @property
    def rows(self) -> int:
        """Heads of a thread block, those past the last one included."""
        return 16 * self.head_tiles

    @property
    def head_blocks(self) -> int:
        """Thread blocks that share the heads of a token."""
        return -(-self.heads // self.rows)

    @property
    def column_blocks(self) -> int:
        """Blocks of 64 columns."""
        return self.width // BLOCK_COLUMNS

    @property
    def key_groups(self) -> int:
        """Warps that share the items of a block of 16 heads."""
        return WARPS // self.head_tiles

    @property
    def query_bytes(self) -> int:
        """Bytes of the queries: [column block][head][64] fp16."""
        return self.rows * self.width * 2

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile of rows: [column block][item][64] fp16."""
        return TILE_ITEMS * self.width * 2

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of a tile: [head][64] fp16."""
        return self.rows * TILE_ITEMS * 2

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: queries, two tiles, weights, and numbers of heads and items."""
        return self.query_bytes + 2 * self.tile_bytes + self.weight_bytes + NUMBERS_BYTES + 1024


NUMBERS_BYTES = 4 * (2 * TILE_ITEMS + 2 * WARPS * 16 + 2 * MAX_ROWS) + 64
"""Which items there are [2][64], maxima and sums [warp][16 heads], factors and powers [64], four barriers."""
