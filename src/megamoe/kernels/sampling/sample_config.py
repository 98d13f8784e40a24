# SPDX-License-Identifier: Apache-2.0
"""Compile key of sample."""

from __future__ import annotations

import dataclasses

BINS = 512
"""Bins of a histogram, a thread each."""
OCTAVE_BINS = 12
"""Bins of the first histogram for a factor of two of the mass."""
FAR_BIN = 41 * OCTAVE_BINS
"""From here on every mass is 0."""
DIGIT_BITS = 9
LIMB_BITS = 14
"""A mass of up to 2^40 is added in three parts: a block's sums fit 32 bits, and so do those of eight blocks."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        has_min_p: rows have a least mass.
    """

    has_min_p: bool
