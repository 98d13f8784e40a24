# SPDX-License-Identifier: Apache-2.0
"""Compile key of rotate_queries."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        heads: H.
        width: C.
        rope_dim: R.
        q: "bf16" or "f32", also of the result.
        passes: heads a thread takes part in; they share its sines and cosines.
    """

    heads: int
    width: int
    rope_dim: int
    q: str
    passes: int
