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
        rope: R.
        q: "bf16" or "f32", of the queries and of the result.
    """

    heads: int
    width: int
    rope: int
    q: str
