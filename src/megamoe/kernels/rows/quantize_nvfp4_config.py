# SPDX-License-Identifier: Apache-2.0
"""Compile key of quantize_nvfp4."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: K.
        x: "bf16" or "f32".
        dynamic: every row gets a tensor scale of its own; otherwise one is given.
        tiled: block scales in 128x4 tiles; otherwise row-major.
    """

    width: int
    x: str
    dynamic: bool
    tiled: bool = False
