# SPDX-License-Identifier: Apache-2.0
"""Compile key of products in tiles on wgmma, what a stage holds, and the order in which tiles are visited."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from megamoe.formats.fragment_layout import TILE_CODE_BYTES, TILE_COLUMNS, TILE_ROWS, TILE_SCALE_BYTES

GROUP_ROWS = 64  # rows of an instruction
MAX_STAGES = 24
SHARED_BYTES = 226 * 1024
RESERVED_BYTES = 1024  # barriers, and padding up to the first tile
BAND = 8  # token blocks that are visited side by side


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        weight: "nvfp4" in fragment order, or "bf16" row-major.
        scaled: x is code * block scale * 2^-7 of NVFP4 activations, and each token and group has a tensor scale.
        out: "bf16" or "f32".
        rows: weight rows of a tile, 64, 128 or 256.
        tokens: tokens of a tile.
        row_scales: each row of an NVFP4 weight has a tensor scale of its own, else each group has one; of one group.
    """

    weight: str
    scaled: bool
    out: str
    rows: int
    tokens: int
    row_scales: bool = False

    @property
    def warpgroups(self) -> int:
        """Consumer warpgroups."""
        return min(2, self.rows // GROUP_ROWS)

    @property
    def consumers(self) -> int:
        """Consumer threads."""
        return self.warpgroups * 128

    @property
    def threads(self) -> int:
        """Threads of a block: consumers, a producer warp, three storing warps."""
        return self.consumers + 128

    @property
    def row_groups(self) -> int:
        """Instructions side by side in a consumer warpgroup."""
        return self.rows // GROUP_ROWS // self.warpgroups

    @property
    def row_tiles(self) -> int:
        """Row tiles of the fragment layout."""
        return self.rows // TILE_ROWS

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in a stage."""
        if self.weight == "bf16":
            return self.rows * TILE_COLUMNS * 2
        return self.row_tiles * (TILE_CODE_BYTES + TILE_SCALE_BYTES)

    @property
    def stage_bytes(self) -> int:
        """Bytes of a stage: tokens and weights."""
        return self.tokens * TILE_COLUMNS * 2 + self.weight_bytes

    @property
    def out_stride(self) -> int:
        """Values between tokens of the finished tile in shared memory: rows start in other banks."""
        return self.rows + 8

    @property
    def staged_tokens(self) -> int:
        """Tokens of a finished tile that are in shared memory at a time."""
        return self.tokens if self.tokens <= 128 else 64

    @property
    def out_bytes(self) -> int:
        """Shared memory of the finished tile."""
        return self.staged_tokens * self.out_stride * 2 if self.out == "bf16" else 0

    @property
    def stages(self) -> int:
        """Stages that fit."""
        return min(MAX_STAGES, (SHARED_BYTES - RESERVED_BYTES - self.out_bytes) // self.stage_bytes)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return RESERVED_BYTES + self.out_bytes + self.stages * self.stage_bytes


def place(
    tile: Any, group_blocks: Any, row_blocks: Any, token_blocks: Any, minimum: Callable[[Any, Any], Any] = min
) -> tuple[Any, Any, Any]:
    """Return group, row block within the group, and token block of a tile: bands of tokens, all rows of a band.

    Args:
        tile: its number; like everything here an int, or a number of the device.
        group_blocks, row_blocks, token_blocks: row blocks of a group, of all groups; token blocks.
        minimum: of two such numbers.
    """
    first = tile // (row_blocks * BAND) * BAND
    width = minimum(token_blocks - first, BAND)
    rest = tile - first * row_blocks
    row_block = rest // width
    group = row_block // group_blocks
    return group, row_block - group * group_blocks, first + rest - row_block * width
