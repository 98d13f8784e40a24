# SPDX-License-Identifier: Apache-2.0
"""Compile key of rms_norm_quantize_nvfp4."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: K.
        weight: "bf16" or "f32".
    """

    width: int
    weight: str
