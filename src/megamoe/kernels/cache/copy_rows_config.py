# SPDX-License-Identifier: Apache-2.0
"""Compile key of copy_cache and save_rows."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        op: "copy" rows by slots, or "save" the last rows of sequences.
        data_bytes: of a row, a multiple of 16.
        scale_bytes: of a row: 0, 4 or 8.
    """

    op: str
    data_bytes: int
    scale_bytes: int

    @property
    def lanes(self) -> int:
        """Threads of a row: one for each 16 bytes, in powers of two up to a block."""
        lanes = 4
        while lanes < min(self.data_bytes // 16, 128):
            lanes *= 2
        return lanes

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.threads // self.lanes
