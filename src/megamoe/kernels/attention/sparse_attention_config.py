# SPDX-License-Identifier: Apache-2.0
"""Compile key of sparse_attention, and what a block of it holds."""

from __future__ import annotations

import dataclasses

WIDTH = 512
LATENT = 448
TILE = 64
WARPS = 8
THREADS = 32 * WARPS
ROW_CHUNKS = 36
"""16-byte pieces of a stored row: 28 of codes, 8 of rotary values."""
MOST_HEADS = 64


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        heads: H.
        rope: R.
        entries: "none", "list" (chosen one by one) or "all" (all that are visible).
        has_step: rows of this step lie in the step area.
        split: the items of a token are shared out; else one block goes through them all.
    """

    heads: int
    rope: int
    entries: str
    has_step: bool
    split: bool

    @property
    def block_heads(self) -> int:
        """Heads of a block, in sixteens."""
        return min(MOST_HEADS, -(-self.heads // 16) * 16)

    @property
    def head_blocks(self) -> int:
        """Blocks that share the heads of a token."""
        return -(-self.heads // self.block_heads)

    @property
    def row_tiles(self) -> int:
        """Tiles of 16 heads of a block."""
        return self.block_heads // 16

    @property
    def key_groups(self) -> int:
        """Groups of warps that share the keys of a tile, when scores are made."""
        return min(4, WARPS // self.row_tiles)

    @property
    def group_keys(self) -> int:
        """Keys of a tile that a warp scores."""
        return TILE // self.key_groups

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.block_heads * (2 * WIDTH + 2 * TILE) + TILE * 2 * WIDTH + 8192
