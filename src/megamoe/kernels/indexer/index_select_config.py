# SPDX-License-Identifier: Apache-2.0
"""Compile key of index_select."""

from __future__ import annotations

import dataclasses

THREADS = 1024
BINS = 256
PASSES = 4
SPAN = 128
"""A block's share of the entries is a multiple of this."""
HELD, GROUP = 32, 4
"""Scores that a thread has registers for, and those that it handles at a time."""
HELD_BY_ONE = 16384
"""Entries up to which one block selects alone: it needs no barrier of the cluster."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        top_k: most entries a token selects.
        cluster: blocks that select for one token.
    """

    top_k: int
    cluster: int
