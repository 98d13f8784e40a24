# SPDX-License-Identifier: Apache-2.0
"""Compile key of hyper_connection_pre, and how its shared memory is shared out."""

from __future__ import annotations

import dataclasses

STREAMS = 4
WARP_CHANNELS = 64
TOKENS = 16  # of a tile
STEPS = STREAMS * WARP_CHANNELS // 16  # of the matrix unit, for a warp's channels
BLOCK_WARPS = 16  # they fill a multiprocessor's registers
SCRATCH_STRIDE = 20  # floats between rows of 16 sums: lanes that write together meet different banks


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: D.
        sinkhorn_iters: column steps; 0 for hyper_connection_head, which has none and no post and C.
        cluster: blocks that share a tile of tokens.
        norm: u is normalized with a bf16 weight before it is stored.
    """

    width: int
    sinkhorn_iters: int
    cluster: int
    norm: bool = False

    @property
    def warps(self) -> int:
        """Warps of a block that share a tile."""
        return self.width // (self.cluster * WARP_CHANNELS)

    @property
    def groups(self) -> int:
        """Groups of warps in a block, each with a tile of its own."""
        return min(4, BLOCK_WARPS // self.warps)

    @property
    def outputs(self) -> int:
        """Rows of fn."""
        return (2 + STREAMS) * STREAMS if self.sinkhorn_iters else STREAMS

    @property
    def own_tokens(self) -> int:
        """Tokens of a tile whose post and C a block computes."""
        return TOKENS // self.cluster

    @property
    def own_floats(self) -> int:
        """Sums behind them."""
        return self.own_tokens * (self.outputs - STREAMS)

    @property
    def weight_words(self) -> int:
        """This block's columns of fn in two bf16 parts, rows padded to a multiple of 8."""
        return -(-self.outputs // 8) * 8 * STREAMS * self.warps * WARP_CHANNELS

    @property
    def scratch_slots(self) -> int:
        """Slots for the sums of a group's warps, two warps a slot."""
        return -(-self.warps // 2)

    @property
    def slot_floats(self) -> int:
        """Sums of a warp: a row for each of fn, and sum(x^2)."""
        return (self.outputs + 1) * SCRATCH_STRIDE

    @property
    def scratch_floats(self) -> int:
        """Sums of a group's warps."""
        return self.scratch_slots * self.slot_floats

    @property
    def received_floats(self) -> int:
        """Sums that a block receives for a tile."""
        return self.cluster * ((STREAMS + 1) * TOKENS + self.own_floats)

    @property
    def result_floats(self) -> int:
        """Streams' weights, and the sums of u^2 that every block sends."""
        return (STREAMS + self.cluster * self.norm) * TOKENS

    @property
    def room_floats(self) -> int:
        """Shared memory of a group: its sums, its results, and two inboxes for tiles in turn."""
        return self.scratch_floats + self.result_floats + 2 * self.received_floats

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block, alignment aside."""
        return 4 * (self.weight_words + self.groups * (self.room_floats + 6) + 32)
