# SPDX-License-Identifier: Apache-2.0
"""Compile key of add_to_streams."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: D.
        streams: X.
        x, e: "bf16" or "f32"; the sum has the dtype of x.
    """

    width: int
    streams: int
    x: str
    e: str
