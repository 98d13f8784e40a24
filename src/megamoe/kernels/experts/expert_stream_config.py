# SPDX-License-Identifier: Apache-2.0
"""Compile key of the streamed experts' two products, and how the ring of a warp or a block is laid out."""

from __future__ import annotations

import dataclasses
from typing import Any

from megamoe.formats.fragment_layout import TILE_CODE_BYTES, TILE_SCALE_BYTES
from megamoe.kernels.parts.weight_stream import SHARED_BYTES, StreamPlan

BLOCK_UNITS = 2  # in a ring that the block fills; a power of 2
QUEUE_TURNS = 16  # a power of 2, more than a ring holds units
QUEUE_HEAD = 16  # bytes: the next unit of the run or chunk that the block is in, and its end
QUEUE_BYTES = QUEUE_HEAD + 4 * QUEUE_TURNS


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        step: "gate_up" or "down".
        num_rows: rows of an expert's weight.
        num_columns: its columns.
        num_slots: A, for the token of a pair.
        num_tiles: token tiles of 8 in a pass.
        x: "bf16" or "nvfp4".
        out: "bf16" or "f32".
        pool: percent of the units that go to whichever block is free.
        chunk: how many of them it takes at a time; one at the end.
    """

    step: str
    num_rows: int
    num_columns: int
    num_slots: int
    num_tiles: int
    x: str
    out: str
    pool: int
    chunk: int

    @property
    def plan(self) -> StreamPlan:
        """How a product is shared out."""
        return plan_of(self.step, self.num_columns, self.num_tiles)

    @property
    def by_block(self) -> bool:
        """Whether the block fills one ring of two units, not every warp a ring of its own."""
        plan = self.plan
        ring_bytes = BLOCK_UNITS * plan.streams * block_stage_bytes(plan)
        return (
            len(plan.stage_chunks) == 1
            and plan.partial_buffers == 2
            and self.num_rows // 16 % plan.tiles_per_unit == 0
            and plan.ring_offset + ring_bytes + QUEUE_BYTES <= SHARED_BYTES
        )

    @property
    def depth(self) -> int:
        """How often the empty ring is filled: units, or slots of a warp."""
        return BLOCK_UNITS if self.by_block else self.plan.num_slots

    @property
    def early(self) -> int:
        """How much of the ring is filled before the first tokens are asked for; all of it where they come later."""
        return 1 if self.step == "gate_up" else self.depth

    @property
    def ahead(self) -> int:
        """Turns ahead of the present one whose units must be known."""
        return BLOCK_UNITS if self.by_block else -(-self.plan.num_slots // self.plan.per_unit)

    @property
    def queue_offset(self) -> int:
        """Where the queue of units is in shared memory."""
        if not self.by_block:
            return self.plan.shared_bytes
        return self.plan.ring_offset + BLOCK_UNITS * self.plan.streams * block_stage_bytes(self.plan)

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a block asks for at launch."""
        return self.queue_offset + QUEUE_BYTES


def block_stage_bytes(plan: StreamPlan) -> int:
    """Return the bytes of a stage of the block's ring: a row tile for every group of warps."""
    return plan.row_groups * plan.chunks * (TILE_CODE_BYTES + TILE_SCALE_BYTES)


def fragment_column(column: Any) -> Any:
    """Return where h has a column: every 64 so that the 16 bytes a lane loads are fragments of two steps of 16.

    Column 16 s + 8 h + 2 t + i is value i of half h of step s of lane t; lane t reads steps 0 and 1, later 2 and 3.
    """
    step, half, lane, value = column // 16 % 4, column // 8 % 2, column // 2 % 4, column % 2
    return column // 64 * 64 + step // 2 * 32 + lane * 8 + step % 2 * 4 + half * 2 + value


def plan_of(step: str, num_columns: int, num_tiles: int) -> StreamPlan:
    """Return how a product is shared out."""
    if step == "gate_up":
        return StreamPlan(num_columns, 2, num_tiles, 1)
    return StreamPlan(num_columns, 1, num_tiles, 2 if num_columns <= 2048 else 1)
