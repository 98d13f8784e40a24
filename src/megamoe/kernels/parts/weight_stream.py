# SPDX-License-Identifier: Apache-2.0
"""How the kernels that stream a weight once past a few tokens share out work and shared memory.

One block of 16 warps runs on each multiprocessor. Warp w owns columns w * slice to (w + 1) * slice of every row tile,
keeps the tokens of that slice in registers (a second group of tokens in shared memory where registers do not suffice),
and streams its slices of one row tile after another through a ring of its own: bulk copies, each stage announced by an
mbarrier, no other warp involved. A unit is one row tile, or a few where slices are short. When all warps have a unit,
some of them add the 16 partial sums in warp order while the others go on with the next.

The order of additions depends on K alone, so a token has the same bits whatever else is in the batch.
"""

from __future__ import annotations

import dataclasses

from megamoe.formats.fragment_layout import TILE_CODE_BYTES, TILE_COLUMNS, TILE_SCALE_BYTES

WARPS = 16
THREADS = WARPS * 32
TOKENS_PER_TILE = 8
SHARED_BYTES = 227 * 1024
PARTIAL_STRIDE = 20  # floats between a token's partial sums: 16 rows, padded so that a warp's stores hit 32 banks
REGISTER_BUDGET = 64  # registers of a thread for tokens
MAX_SLOTS = 8
EARLY_SLOTS = 1  # filled before the tokens are asked for; a longer queue of weights would delay the tokens


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """How one matrix product is shared out.

    Attributes:
        num_columns: K.
        num_weights: weights streamed side by side: 1, or 2 for gate and up.
        num_tiles: token tiles of 8 that one pass over the weight serves.
        row_groups: groups that the warps form, each with row tiles of its own; more groups, longer slices. 1 where
            num_weights is 2.
    """

    num_columns: int
    num_weights: int
    num_tiles: int
    row_groups: int

    @property
    def tiles_per_warp(self) -> int:
        """Row tiles that a warp streams between two barriers: more where its slice is short."""
        wanted = max(1, 8 // (self.slice_chunks * self.num_weights))
        outputs = self.row_groups * self.num_tiles * TOKENS_PER_TILE * 16
        return min(wanted, 4, self.row_groups * THREADS // outputs) if self.num_weights == 1 else 1

    @property
    def tiles_per_unit(self) -> int:
        """Row tiles between two barriers."""
        return self.row_groups * self.tiles_per_warp

    @property
    def streams(self) -> int:
        """Slices that a warp streams for one unit: row tiles times weights."""
        return self.num_weights * self.tiles_per_warp

    @property
    def per_unit(self) -> int:
        """Stages of a warp for one unit."""
        return self.streams * len(self.stage_chunks)

    @property
    def outputs_per_unit(self) -> int:
        """Threads that add partial sums of a unit, one output (of every weight) each."""
        return self.tiles_per_unit * self.num_tiles * TOKENS_PER_TILE * 16

    def num_units(self, num_row_tiles: int) -> int:
        """Units of a matrix; the last one repeats the last row tile where it has no others."""
        return -(-num_row_tiles // self.tiles_per_unit)

    @property
    def chunks(self) -> int:
        """Tiles of 64 columns in a row."""
        return self.num_columns // TILE_COLUMNS

    @property
    def slice_chunks(self) -> int:
        """Chunks of a warp."""
        return -(-self.chunks // (WARPS // self.row_groups))

    @property
    def slices(self) -> int:
        """Slices that a row is cut into: the partial sums of an output."""
        return -(-self.chunks // self.slice_chunks)

    @property
    def used_warps(self) -> int:
        """Warps that have columns; the others only help to add."""
        return self.row_groups * self.slices

    def first_chunk(self, index: int) -> int:
        """First chunk of a slice; the last slice may overlap its neighbour."""
        return min(index * self.slice_chunks, self.chunks - self.slice_chunks)

    def first_own_chunk(self, index: int) -> int:
        """First chunk that a slice's warps add; they treat their tokens as zero in the chunks before."""
        return index * self.slice_chunks

    @property
    def register_tiles(self) -> int:
        """Token tiles kept in registers: 8 registers a chunk and tile."""
        return min(self.num_tiles, max(1, REGISTER_BUDGET // (8 * self.slice_chunks)))

    @property
    def shared_tiles(self) -> int:
        """Token tiles kept in shared memory."""
        return self.num_tiles - self.register_tiles

    @property
    def stage_chunks(self) -> tuple[int, ...]:
        """Chunks of each stage that a slice is cut into."""
        if self.slice_chunks <= 4:
            return (self.slice_chunks,)
        return (-(-self.slice_chunks // 2), self.slice_chunks // 2)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a ring slot: the largest stage, scales behind codes."""
        return max(self.stage_chunks) * (TILE_CODE_BYTES + TILE_SCALE_BYTES)

    @property
    def token_bytes(self) -> int:
        """Shared memory for tokens."""
        return self.shared_tiles * WARPS * self.slice_chunks * TILE_COLUMNS * TOKENS_PER_TILE * 2

    @property
    def partial_bytes(self) -> int:
        """Shared memory for the partial sums of one unit."""
        return self.slices * self.row_groups * self.streams * self.num_tiles * TOKENS_PER_TILE * PARTIAL_STRIDE * 4

    def _slots(self, buffers: int) -> int:
        left = SHARED_BYTES - WARPS * MAX_SLOTS * 8 - buffers * self.partial_bytes - self.token_bytes
        return min(MAX_SLOTS, left // (self.used_warps * self.slot_bytes))

    @property
    def partial_buffers(self) -> int:
        """Two, so that warps go on while others add, unless the ring would suffer."""
        return 2 if self._slots(2) >= min(3, self._slots(1)) else 1

    @property
    def num_slots(self) -> int:
        """Ring slots of a warp."""
        return self._slots(self.partial_buffers)

    # Shared memory, in this order: barriers, partial sums, tokens, ring.

    @property
    def partial_offset(self) -> int:
        """Where partial sums start."""
        return WARPS * MAX_SLOTS * 8

    @property
    def token_offset(self) -> int:
        """Where tokens start."""
        return self.partial_offset + self.partial_buffers * self.partial_bytes

    @property
    def ring_offset(self) -> int:
        """Where the rings start."""
        return self.token_offset + self.token_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.ring_offset + self.used_warps * self.num_slots * self.slot_bytes
