# SPDX-License-Identifier: Apache-2.0
"""Compile key of penalize."""

from __future__ import annotations

import dataclasses

THREADS = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key: one kernel serves every vocabulary."""
