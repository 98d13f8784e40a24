# SPDX-License-Identifier: Apache-2.0
"""Compile key of sample."""

from __future__ import annotations

import dataclasses

THREADS = 1024
DIGITS = ((21, 11), (10, 11), (0, 10))
"""(lowest bit, bits) of the parts of a logit's 32 bits by which tokens are sorted into bins, most significant first."""
INDEX_DIGITS = ((11, 11), (0, 11))
"""The same of a token's number, of which there are at most 2^22."""
BINS = 2048


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        has_min_p: rows have a least mass.
    """

    has_min_p: bool
