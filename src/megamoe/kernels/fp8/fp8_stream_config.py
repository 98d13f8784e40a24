# SPDX-License-Identifier: Apache-2.0
"""Compile key of FP8 linears for few tokens, and how a block's shared memory is shared out (fp8_stream.py)."""

from __future__ import annotations

import dataclasses

BLOCK = 128
CHUNK = 64  # columns of a ring slot: 16 rows of them are 1024 bytes
WARPS = 16
THREADS = WARPS * 32
TILE_ROWS = 16
TOKENS_PER_TILE = 8
MAX_DEPTH = 8
SHARED_BYTES = 226 * 1024
SLOT_BYTES = TILE_ROWS * CHUNK


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        num_groups: G; each has columns and weight rows of its own, 1 where there are no groups.
        num_columns: K, of one group.
        first_column, last_column: the part of the columns that this launch multiplies.
        slice_blocks: blocks of 128 columns of a warp; the last warp may have fewer.
        num_tiles: token tiles of 8.
        out: "bf16" or "f32".
        early: ring slots that are filled before the kernel ahead of this one has finished.
    """

    num_groups: int
    num_columns: int
    first_column: int
    last_column: int
    slice_blocks: int
    num_tiles: int
    out: str
    early: int

    @property
    def adds(self) -> bool:
        """Whether this part adds to the sums of parts before it."""
        return self.first_column > 0

    @property
    def num_blocks(self) -> int:
        """Blocks of 128 columns."""
        return (self.last_column - self.first_column) // BLOCK

    @property
    def slices(self) -> int:
        """Slices of this part."""
        return -(-self.num_blocks // self.slice_blocks)

    @property
    def split(self) -> int:
        """Warps of a team: a power of two, so that teams fill a block; those without a slice only help to add."""
        return next(size for size in (1, 2, 4, 8, 16) if size >= self.slices)

    @property
    def teams(self) -> int:
        """Teams of a thread block."""
        return WARPS // self.split

    # Shared memory, in this order: partial sums, token scales, tokens, rings.

    @property
    def partial_bytes(self) -> int:
        """Shared memory for the partial sums of one row tile of every team."""
        return THREADS * self.num_tiles * 16 if self.split > 1 else 0

    @property
    def scale_bytes(self) -> int:
        """Shared memory for token scales in fp32: [blocks, tokens]."""
        return self.num_blocks * self.num_tiles * TOKENS_PER_TILE * 4

    @property
    def token_bytes(self) -> int:
        """Shared memory for the codes of the tokens."""
        return self.num_blocks * BLOCK * self.num_tiles * TOKENS_PER_TILE

    def _depth(self, buffers: int) -> int:
        left = SHARED_BYTES - buffers * self.partial_bytes - self.scale_bytes - self.token_bytes
        return min(MAX_DEPTH, left // (WARPS * SLOT_BYTES))

    @property
    def partial_buffers(self) -> int:
        """Two, so that warps go on while others add, unless the rings would suffer."""
        return 2 if self._depth(2) >= min(4, self._depth(1)) else 1

    @property
    def depth(self) -> int:
        """Slots of a ring."""
        return self._depth(self.partial_buffers)

    @property
    def scale_offset(self) -> int:
        """Where token scales start."""
        return self.partial_buffers * self.partial_bytes

    @property
    def token_offset(self) -> int:
        """Where tokens start."""
        return self.scale_offset + self.scale_bytes

    @property
    def ring_offset(self) -> int:
        """Where the rings start."""
        return self.token_offset + self.token_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a block asks for at launch."""
        return self.ring_offset + WARPS * self.depth * SLOT_BYTES
