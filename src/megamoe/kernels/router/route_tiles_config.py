# SPDX-License-Identifier: Apache-2.0
"""Compile key of the router's scores for many tokens, and how a cluster shares a tile."""

from __future__ import annotations

import dataclasses

THREADS = 256
TILE_TOKENS = 128
MAX_TILE_EXPERTS = 192  # so that two blocks share a tile of 256 or 384: of clusters of two all are resident at once
STAGES = 4
STAGE_COLUMNS = 64
ROW_BYTES = 2 * STAGE_COLUMNS  # of a stage
TOKEN_WARPS, EXPERT_WARPS = 2, 4
PADDING = 8  # floats between rows of sums


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: D.
        experts: E.
    """

    width: int
    experts: int

    @property
    def expert_tiles(self) -> int:
        """Tiles of experts."""
        return -(-self.experts // MAX_TILE_EXPERTS)

    @property
    def tile_experts(self) -> int:
        """Experts of a tile: a multiple of 16 for each of four warps."""
        step = 16 * EXPERT_WARPS
        return -(-self.experts // (self.expert_tiles * step)) * step

    @property
    def splits(self) -> int:
        """Blocks that share a tile: four for each token tile in all, where D divides."""
        wanted = max(1, 4 // self.expert_tiles)
        return next(size for size in (4, 2, 1) if size <= wanted and self.width % (size * STAGE_COLUMNS) == 0)

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage."""
        return (TILE_TOKENS + self.tile_experts) * ROW_BYTES

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the ring, and in its place the sums of all blocks for this block's tokens."""
        return max(STAGES * self.stage_bytes, TILE_TOKENS * (self.tile_experts + PADDING) * 4)
