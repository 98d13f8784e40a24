# SPDX-License-Identifier: Apache-2.0
"""Compile key of the sum over slots."""

from __future__ import annotations

import dataclasses

VECTOR = 8
THREADS = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: D, a multiple of 8.
        num_slots: A.
        shared: dtype of the shared experts' output, or None.
        out: "bf16" or "f32".
    """

    width: int
    num_slots: int
    shared: str | None
    out: str
