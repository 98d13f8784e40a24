# SPDX-License-Identifier: Apache-2.0
"""Compile key of round_index_query."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        heads: Hi.
        width: K.
        rope_dim: R.
        q: "bf16" or "f32".
        rounding: "mxfp4", "fp8", or None where the query keeps the dtype of q.
        hadamard: the query is rotated by the Hadamard matrix before.
        passes: heads a thread takes part in; they share its sines and cosines.
    """

    heads: int
    width: int
    rope_dim: int
    q: str
    rounding: str | None
    hadamard: bool
    passes: int
