# SPDX-License-Identifier: Apache-2.0
"""Compile key of round_index_query."""

from __future__ import annotations

import dataclasses

LANES = 4
"""Threads of a head of 128 channels: each has 32 of them, in four vectors of 8."""
THREADS = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        heads: Hi.
        width: K.
        rope: R.
        q: "bf16" or "f32".
        rounding: what the query is rounded to: "index_fp4", "index_fp8", or "plain" for the dtype of q.
        rotate: by a Hadamard matrix.
    """

    heads: int
    width: int
    rope: int
    q: str
    rounding: str
    rotate: bool
