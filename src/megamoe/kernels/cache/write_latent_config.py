# SPDX-License-Identifier: Apache-2.0
"""Compile key of write_latent."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: C.
        rope: R.
        kv, weight: "bf16" or "f32".
        row_format: of the pool.
    """

    width: int
    rope: int
    kv: str
    weight: str
    row_format: str
