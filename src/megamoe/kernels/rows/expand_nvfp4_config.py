# SPDX-License-Identifier: Apache-2.0
"""Compile key of the expansion of NVFP4 activations: nothing but the number of threads."""

from __future__ import annotations

import dataclasses

THREADS = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key: nothing, the sizes are free."""
