# SPDX-License-Identifier: Apache-2.0
"""Compile key of rms_norm."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: K.
        x, out: "bf16" or "f32".
        weight: "bf16", "f32" or None.
    """

    width: int
    x: str
    weight: str | None
    out: str
