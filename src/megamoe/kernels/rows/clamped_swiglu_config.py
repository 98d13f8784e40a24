# SPDX-License-Identifier: Apache-2.0
"""Compile key of clamped_swiglu."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: F.
        gate, up, out: "bf16" or "f32".
        clamped: there is a limit.
        weighted: rows are multiplied by their route weight.
    """

    width: int
    gate: str
    up: str
    out: str
    clamped: bool
    weighted: bool
