# SPDX-License-Identifier: Apache-2.0
"""Compile key of copy_cache and save_rows, and how their rows are shared out."""

from __future__ import annotations

import dataclasses

THREADS = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        op: "copy" rows by slots, or "save" the last rows of sequences.
        lanes: threads that copy a chunk of a row, a power of two up to THREADS.
        vectors: 16-byte vectors of a row's data that each of them has on their way at once.
    """

    op: str
    lanes: int
    vectors: int

    @property
    def words(self) -> int:
        """Words of a row's scales that a thread has on their way at once: no format has more for so many vectors."""
        return max(1, self.vectors // 4)

    @property
    def groups(self) -> int:
        """Chunks of a block."""
        return THREADS // self.lanes
