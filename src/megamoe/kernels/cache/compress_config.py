# SPDX-License-Identifier: Apache-2.0
"""Compile key of compress_kv and write_index_keys."""

from __future__ import annotations

import dataclasses

from megamoe.kernels.parts.rows import VECTOR

ROWS_AT_ONCE = 4
MAX_THREADS = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: D.
        ratio: tokens per entry.
        overlap: an entry covers two blocks of tokens.
        rope: R.
        ape, weight: "bf16" or "f32".
        rounded: the entry is rounded to bf16 before the row format.
        row_format: of the entries.
        rotate: by a Hadamard matrix before the row format.
        tokens: that a block goes through, 1 or an even number: few leave the other multiprocessors to the others, many
            keep more rows on their way.
    """

    width: int
    ratio: int
    overlap: bool
    rope: int
    ape: str
    weight: str
    rounded: bool
    row_format: str
    rotate: bool
    tokens: int

    @property
    def lanes(self) -> int:
        """Threads that share the channels of an entry, a vector of 8 each."""
        return self.width // VECTOR

    @property
    def num_rows(self) -> int:
        """Raw rows of an entry."""
        return self.ratio * (2 if self.overlap else 1)

    @property
    def half(self) -> int:
        """Values of a raw row, and its scores."""
        return self.width * (2 if self.overlap else 1)

    @property
    def rows_at_once(self) -> int:
        """Rows that a thread loads before it works on the first."""
        return min(ROWS_AT_ONCE, self.num_rows)

    @property
    def parts(self) -> int:
        """Groups of threads that share the rows of an entry: as many as 256 threads allow."""
        return min(self.num_rows // self.rows_at_once, max(1, MAX_THREADS // self.lanes))

    @property
    def rows_stored_at_once(self) -> int:
        """Raw rows whose loads are on their way together where a block has many tokens: 4 to 8 loads a thread."""
        loads = -(-self.half // 2 // (self.lanes * self.parts))
        return min(self.tokens, max(2, 4 // loads))
