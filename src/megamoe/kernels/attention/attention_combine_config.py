# SPDX-License-Identifier: Apache-2.0
"""Compile key of what adds up partial results of attention."""

from __future__ import annotations

import dataclasses

THREADS = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        heads: H.
        width: C.
        rope: R.
        out: "bf16" or "f32".
    """

    heads: int
    width: int
    rope: int
    out: str

    @property
    def lanes(self) -> int:
        """Threads of a head, 8 columns each."""
        return self.width // 8
