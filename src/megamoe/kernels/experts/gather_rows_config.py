# SPDX-License-Identifier: Apache-2.0
"""Compile key of the gathering of tokens."""

from __future__ import annotations

import dataclasses

THREADS = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        num_columns: values of a token.
        x: "bf16" or "nvfp4".
    """

    num_columns: int
    x: str
