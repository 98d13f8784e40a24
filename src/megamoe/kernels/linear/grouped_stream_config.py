# SPDX-License-Identifier: Apache-2.0
"""Compile key of grouped products for few tokens (grouped_stream.py)."""

from __future__ import annotations

import dataclasses

from megamoe.kernels.parts.weight_stream import StreamPlan


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        num_columns: K.
        num_tiles: token tiles of 8.
        x: "bf16" or "nvfp4".
        out: "bf16" or "f32".
    """

    num_columns: int
    num_tiles: int
    x: str
    out: str

    @property
    def plan(self) -> StreamPlan:
        """How the product is shared out."""
        return StreamPlan(self.num_columns, 1, self.num_tiles, 1)

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a block asks for at launch."""
        return self.plan.shared_bytes
