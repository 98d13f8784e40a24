# SPDX-License-Identifier: Apache-2.0
"""Compile keys of mean_of_streams and add_to_streams."""

from __future__ import annotations

import dataclasses

MAX_THREADS = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        op: "mean" or "add".
        width: D.
        streams: X.
        x, other: "bf16" or "f32"; other is the output of a mean, and the row that is added.
    """

    op: str
    width: int
    streams: int
    x: str
    other: str

    @property
    def threads(self) -> int:
        """Threads of a block: one for each vector of 8, in whole warps, up to a limit."""
        return min(MAX_THREADS, -(-(self.width // 8) // 32) * 32)
