# SPDX-License-Identifier: Apache-2.0
"""Compile key of embed_streams."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: D.
        streams: X.
        table, out: "bf16" or "f32".
    """

    width: int
    streams: int
    table: str
    out: str
