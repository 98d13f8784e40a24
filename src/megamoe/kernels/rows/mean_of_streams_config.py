# SPDX-License-Identifier: Apache-2.0
"""Compile key of mean_of_streams."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: D.
        streams: X.
        x: "bf16" or "f32", also of the mean.
    """

    width: int
    streams: int
    x: str
