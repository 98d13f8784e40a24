# SPDX-License-Identifier: Apache-2.0
"""Compile key of index_scores on Hopper."""

from __future__ import annotations

import dataclasses

GROUPS = 4
"""Warpgroups of a block: each has tiles of its own."""
GROUP_WARPS = 4
WARP_KEYS = 16
TILE = GROUP_WARPS * WARP_KEYS
"""Keys that a warpgroup scores at a time."""
STAGES = 4
"""Tiles of keys on their way or in shared memory, of each warp."""
STAGE_BYTES = 1280
"""Of a warp: two vectors of 16 bytes and two words of scales a lane."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        heads: Hi, a multiple of 8.
    """

    heads: int

    @property
    def head_tiles(self) -> int:
        """Groups of 8 heads."""
        return self.heads // 8
