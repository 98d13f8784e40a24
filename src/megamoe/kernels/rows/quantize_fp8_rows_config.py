# SPDX-License-Identifier: Apache-2.0
"""Compile key of quantize_fp8_rows."""

from __future__ import annotations

import dataclasses

GROUP = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: K.
        x: "bf16" or "f32".
    """

    width: int
    x: str
