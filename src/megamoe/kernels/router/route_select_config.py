# SPDX-License-Identifier: Apache-2.0
"""Compile key of the router's selection."""

from __future__ import annotations

import dataclasses

TOKENS = 4  # warps per block


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        experts: E.
        top_k: A.
        mode: "score", "biased" (score + bias selects), "table32" or "table64" (by token id, tables of int32 or int64).
    """

    experts: int
    top_k: int
    mode: str
