# SPDX-License-Identifier: Apache-2.0
"""Compile key of hyper_connection_post."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: D.
        streams: X.
        x, y: "bf16" or "f32".
    """

    width: int
    streams: int
    x: str
    y: str
