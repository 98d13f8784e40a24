# SPDX-License-Identifier: Apache-2.0
"""Compile key of round_index_query, and how heads are shared out."""

from __future__ import annotations

import dataclasses

WIDTH = 128
TILE = 16
"""Heads of a warp: the rows of a matrix instruction."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        heads: Hi.
        rope_dim: R, 32 or 64.
        warps: of a block.
    """

    heads: int
    rope_dim: int
    warps: int

    @property
    def tiles(self) -> int:
        """Tiles of a token; the last one may have fewer heads."""
        return -(-self.heads // TILE)
