# SPDX-License-Identifier: Apache-2.0
"""Compile key of copy_cache and save_rows, and how their rows are shared out."""

from __future__ import annotations

import dataclasses

THREADS = 128
LANES = 8
VECTORS = 8
WORDS = 2
"""LANES threads copy a chunk of a row: each up to VECTORS of 16 bytes of its data and WORDS of 4 bytes of its scales,
which are all on their way at once."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        op: "copy" rows by slots, or "save" the last rows of sequences.
    """

    op: str
