# SPDX-License-Identifier: Apache-2.0
"""Compile key of compress_kv and write_index_keys."""

from __future__ import annotations

import dataclasses


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

    @property
    def lanes(self) -> int:
        """Threads that share the channels of an entry, a vector of 8 each."""
        return self.width // 8

    @property
    def num_rows(self) -> int:
        """Raw rows of an entry."""
        return self.ratio * (2 if self.overlap else 1)

    @property
    def parts(self) -> int:
        """Groups of threads that share the rows of an entry."""
        return 1 if self.num_rows <= 8 else 8
