# SPDX-License-Identifier: Apache-2.0
"""Compile key of y = x w^T for few tokens, shared by the two NVFP4 linears, and how work is shared out.

Columns are cut into up to 4 ranks, a rank into up to 8 segments of at most 4 chunks (of 64 columns). A warp has the
tokens of its segments in registers: one segment for 16 tokens, two for 8. So a block of 8 warps has 1 or 2 ranks, and
1, 2 or 4 blocks form a cluster that goes through row tiles together. A block adds its warps' sums and sends
them to the block of the cluster whose turn it is to finish the row tile.

A block takes half of a multiprocessor: half of the shared memory, 256 threads, 128 registers. The launch behind it
has the other half, and fills its rings with weights while this one is still working.

The order of additions: columns of a segment ascending (even and odd steps apart), segments of a rank ascending, then
(rank 0 + rank 1) + (rank 2 + rank 3). It depends on K alone.
"""

from __future__ import annotations

import dataclasses

from megamoe.formats.fragment_layout import TILE_CODE_BYTES, TILE_COLUMNS, TILE_SCALE_BYTES
from megamoe.kernels.parts.weight_stream import MAX_SLOTS, TOKENS_PER_TILE

FEW_TOKENS = 2
MAX_RANKS = 4
MAX_WARPS = 8
MAX_SEGMENT_CHUNKS = 4
MULTIPROCESSOR_BYTES = 228 * 1024
SYSTEM_BYTES = 1024  # of a block's shared memory
RING_BARRIER_BYTES = 2 * MAX_WARPS * MAX_SLOTS * 8
BARRIER_BYTES = RING_BARRIER_BYTES + 128  # two for sums from the cluster, two for sums of the block's warps
FRAGMENT_BYTES = 512  # a warp's sums of 16 rows and 8 tokens
UNIT_CHUNKS = 6  # chunks that a warp should have between two barriers of its block


@dataclasses.dataclass(frozen=True)
class LinearPlan:
    """How one product is shared out. It has what StreamThread (parts/weight_stream_device.py) asks of a plan.

    Attributes:
        num_columns: K, or the columns of a part.
        num_tiles: token tiles of 8 that one pass over the weight serves.
        wide: a block has a multiprocessor for itself, and twice the warps: a group for each of its ranks.
    """

    num_columns: int
    num_tiles: int
    wide: bool = False

    @property
    def chunks(self) -> int:
        """Tiles of 64 columns in a row."""
        return self.num_columns // TILE_COLUMNS

    @property
    def ranks(self) -> int:
        """Parts of the columns that have sums of their own."""
        per_rank = MAX_WARPS * MAX_SEGMENT_CHUNKS
        return next(ranks for ranks in (1, 2, MAX_RANKS) if self.chunks <= ranks * per_rank)

    @property
    def segment_chunks(self) -> int:
        """Chunks of a segment, the longer one where they differ; the last may start inside their neighbors'."""
        return -(-self.chunks // (self.ranks * MAX_WARPS))

    @property
    def uneven(self) -> bool:
        """Whether half of a rank's segments are one chunk shorter: K = 7168 has 28 chunks a rank.

        Then warps w and w + 4, which share a scheduler, have one long and one short segment, and a warp has a long one
        in every second rank.
        """
        return self.ranks > 1 and self.chunks == self.ranks * (MAX_WARPS * self.segment_chunks - MAX_WARPS // 2)

    @property
    def rank_warps(self) -> int:
        """Segments of a rank, a warp for each."""
        return MAX_WARPS if self.uneven else -(-self.chunks // (self.segment_chunks * self.ranks))

    @property
    def ranks_per_block(self) -> int:
        """Ranks of a block: 8 tokens leave a warp registers for two, a wide block has warps for two."""
        return 2 if (self.num_tiles == 1 or self.wide) and self.ranks > 1 else 1

    @property
    def groups(self) -> int:
        """Groups of warps, each with ranks of its own."""
        return self.ranks_per_block if self.wide else 1

    @property
    def segments(self) -> int:
        """Segments of a warp, of as many ranks."""
        return self.ranks_per_block // self.groups

    @property
    def used_warps(self) -> int:
        """Warps of a block."""
        return self.rank_warps * self.groups

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.used_warps * 32

    @property
    def cluster(self) -> int:
        """Blocks that share a row tile."""
        return self.ranks // self.ranks_per_block

    @property
    def blocks_per_multiprocessor(self) -> int:
        """Blocks that fit: one of this launch and one of the next, or one wide one."""
        return 1 if self.wide else 2

    @property
    def tiles_per_unit(self) -> int:
        """Row tiles between two barriers of a block: more where a warp has few chunks of each."""
        if self.cluster > 1:
            return 1
        return max(1, min(UNIT_CHUNKS // self.slice_chunks, 4 // self.num_tiles))

    @property
    def streams(self) -> int:
        """Segments that a warp streams for one unit."""
        return self.tiles_per_unit * self.segments

    @property
    def tile_outputs(self) -> int:
        """Outputs of a row tile."""
        return self.num_tiles * TOKENS_PER_TILE * 16

    @property
    def outputs_per_unit(self) -> int:
        """Outputs of a unit."""
        return self.tiles_per_unit * self.tile_outputs

    def num_units(self, num_row_tiles: int) -> int:
        """Units of a matrix; the last one repeats the last row tile where it has no others."""
        return -(-num_row_tiles // self.tiles_per_unit)

    # What StreamThread asks for.

    @property
    def slice_chunks(self) -> int:
        """Chunks whose tokens a warp holds."""
        return sum(self.stage_chunks)

    @property
    def stage_chunks(self) -> tuple[int, ...]:
        """Chunks of each ring stage of a row tile: one stage for each segment, the long one first."""
        if self.uneven and self.segments == 2:
            return (self.segment_chunks, self.segment_chunks - 1)
        return (self.segment_chunks,) * self.segments

    @property
    def row_groups(self) -> int:
        """All warps stream the same row tiles."""
        return 1

    @property
    def slices(self) -> int:
        """A warp for each slice."""
        return self.used_warps

    @property
    def register_tiles(self) -> int:
        """Token tiles kept in registers: all."""
        return self.num_tiles

    @property
    def shared_tiles(self) -> int:
        """Token tiles kept in shared memory."""
        return 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of a ring slot: a segment, scales behind codes."""
        return self.segment_chunks * (TILE_CODE_BYTES + TILE_SCALE_BYTES)

    @property
    def partial_buffers(self) -> int:
        """Two, so that warps go on while others add."""
        return 2

    @property
    def partial_bytes(self) -> int:
        """Shared memory for the partial sums of one unit."""
        return self.used_warps * self.streams * self.num_tiles * FRAGMENT_BYTES

    # Shared memory, in this order: barriers, partial sums, sums from the cluster, ring.

    @property
    def partial_offset(self) -> int:
        """Where partial sums start."""
        return BARRIER_BYTES

    @property
    def exchange_offset(self) -> int:
        """Where sums from the cluster's blocks start."""
        return self.partial_offset + self.partial_buffers * self.partial_bytes

    @property
    def exchange_bytes(self) -> int:
        """Shared memory for sums from the cluster: two row tiles, in turn."""
        return 2 * self.ranks * self.tile_outputs * 4 if self.cluster > 1 else 0

    @property
    def token_offset(self) -> int:
        """Where tokens would start."""
        return self.ring_offset

    @property
    def ring_offset(self) -> int:
        """Where the rings start."""
        return self.exchange_offset + self.exchange_bytes

    @property
    def num_slots(self) -> int:
        """Ring slots of a warp."""
        left = MULTIPROCESSOR_BYTES // self.blocks_per_multiprocessor - SYSTEM_BYTES - self.ring_offset
        return min(MAX_SLOTS, left // (self.used_warps * self.slot_bytes))

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.ring_offset + self.used_warps * self.num_slots * self.slot_bytes

    @property
    def early_slots(self) -> int:
        """Ring slots filled before the kernel ahead of this one is waited for.

        All of them where that kernel is still running then. A wide block starts when it has ended, and its tokens
        would come behind a full ring.
        """
        return min(2, self.num_slots) if self.wide else self.num_slots

    @property
    def trigger_units(self) -> int:
        """Units before the end at which the next launch may start: when the last weights have been asked for.

        The last copies are issued a ring before the end, and a launch takes about a unit's time. After a wide block
        there is no room for another one before it ends: it lets the next launch start at once.
        """
        return 1 << 20 if self.wide else -(-self.num_slots // self.streams) + 1


def is_long(rank: int, warp: int) -> int:
    """Return 1 where an uneven segment is one of the longer ones."""
    return 1 - (rank + warp + warp // 4) % 2


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        num_columns: K.
        first_column, last_column: the part of the columns that this launch multiplies.
        num_tiles: token tiles of 8 in a pass.
        one_pass: there are at most 8 * num_tiles tokens.
        x: "bf16" or "nvfp4".
        out: "bf16" or "f32".
        overlaps: the launch may start, and load weights, while the kernel ahead of it is still running.
        few: there are at most FEW_TOKENS bf16 tokens, which come through shared memory.
        wide: see LinearPlan.
        row_scales: each weight row has a tensor scale of its own, else the matrix has one.
    """

    num_columns: int
    first_column: int
    last_column: int
    num_tiles: int
    one_pass: bool
    x: str
    out: str
    overlaps: bool = True
    few: bool = False
    wide: bool = False
    row_scales: bool = False

    @property
    def plan(self) -> LinearPlan:
        """How the product is shared out."""
        return LinearPlan(self.last_column - self.first_column, self.num_tiles, self.wide)

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a block asks for at launch."""
        return self.plan.shared_bytes

    @property
    def tokens_per_pass(self) -> int:
        """Tokens that one pass over the weight serves."""
        return self.num_tiles * TOKENS_PER_TILE

    @property
    def adds(self) -> bool:
        """Whether this part adds to the sums of parts before it."""
        return self.first_column > 0
