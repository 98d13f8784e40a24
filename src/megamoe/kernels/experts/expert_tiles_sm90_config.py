# SPDX-License-Identifier: Apache-2.0
"""Compile key of the experts' two products in tiles on wgmma, and what shared memory holds."""

from __future__ import annotations

import dataclasses

from megamoe.formats.fragment_layout import TILE_CODE_BYTES, TILE_COLUMNS, TILE_SCALE_BYTES

BOX_TOKENS = 16  # what one request to the copy engine brings
HALF_TILES = 8  # row tiles of 16 rows in half a block: w1 and w3, or the first and the second half of w2
HALF_ROWS = HALF_TILES * 16
CONSUMERS = 256
THREADS = CONSUMERS + 128
SHARED_BYTES = 227 * 1024 - 2048  # but for barriers and alignment
STEP_BYTES = 2 * HALF_TILES * (TILE_CODE_BYTES + TILE_SCALE_BYTES)  # of weights


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        step: "gate_up" or "down".
        num_rows: rows of an expert's weight.
        num_columns: its columns.
        pass_tokens: pairs of a pass, the N of the instruction.
        scaled: x is code * block scale * 2^-7 of NVFP4 activations, and each row has a tensor scale.
        out: "bf16" or "f32".
    """

    step: str
    num_rows: int
    num_columns: int
    pass_tokens: int
    scaled: bool
    out: str

    @property
    def block_rows(self) -> int:
        """Output rows of a block."""
        return HALF_ROWS if self.step == "gate_up" else 2 * HALF_ROWS

    @property
    def row_blocks(self) -> int:
        """Blocks that an expert's rows take."""
        return -(-self.num_rows // self.block_rows)

    @property
    def out_stride(self) -> int:
        """Values between tokens of the output tile in shared memory: rows start in other banks."""
        return self.block_rows + 8

    @property
    def stages(self) -> int:
        """Steps of 64 columns that shared memory holds."""
        stage_bytes = STEP_BYTES + self.pass_tokens * TILE_COLUMNS * 2
        return (SHARED_BYTES - self.pass_tokens * self.out_stride * 2) // stage_bytes
