# SPDX-License-Identifier: Apache-2.0
"""Compile key of embed_streams."""

from __future__ import annotations

import dataclasses

MAX_THREADS = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: D.
        streams: X, how often a row is repeated.
        table, out: "bf16" or "f32".
    """

    width: int
    streams: int
    table: str
    out: str

    @property
    def threads(self) -> int:
        """Threads of a block: one for each vector of 8, in whole warps, up to a limit."""
        return min(MAX_THREADS, -(-(self.width // 8) // 32) * 32)
