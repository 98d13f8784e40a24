# SPDX-License-Identifier: Apache-2.0
"""Compile key of index_select."""

from __future__ import annotations

import dataclasses

THREADS = 1024
BINS = 256
PASSES = 4
SPAN = 128
"""A block's share of the entries is a multiple of this."""
HELD, GROUP = 32, 8
"""Scores that a thread has registers for, and those of which it takes the largest."""
BOUND_PASSES = 2
MAX_CANDIDATES = 8192
"""Scores that may reach the bound: if groups are far apart 8 top_k at most, if they are all different."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        top_k: most entries a token selects.
        cluster: blocks that select for one token.
    """

    top_k: int
    cluster: int
