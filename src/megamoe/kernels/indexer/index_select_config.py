# SPDX-License-Identifier: Apache-2.0
"""Compile key of index_select."""

from __future__ import annotations

import dataclasses

THREADS = 1024
BINS = 256
PASSES = 4
SPAN = 128
"""A block's share of the entries is a multiple of this."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        top_k: most entries a token selects.
        cluster: blocks that select for one token.
    """

    top_k: int
    cluster: int

    @property
    def held(self) -> int:
        """Scores that a block keeps in shared memory; it reads further ones again in every pass."""
        return 32768 if self.cluster > 1 else 16384
