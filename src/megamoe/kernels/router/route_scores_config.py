# SPDX-License-Identifier: Apache-2.0
"""Compile key of the router's scores for few tokens."""

from __future__ import annotations

import dataclasses

WARPS = 8
CHUNK = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: D.
        experts: E.
        row_tiles, token_tiles: experts and tokens of a block, in units of 16 and 8.
    """

    width: int
    experts: int
    row_tiles: int
    token_tiles: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the sums of every warp."""
        return 4 * 16 * self.row_tiles * 8 * self.token_tiles * WARPS
