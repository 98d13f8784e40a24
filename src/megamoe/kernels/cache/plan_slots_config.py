# SPDX-License-Identifier: Apache-2.0
"""Compile key of plan_slots and write_block_tables."""

from __future__ import annotations

import dataclasses

THREADS = 128
KINDS = 2
"""Kinds of layers with entries that a launch takes."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        op: "slots" of a step, or "tables": a change of block tables.
    """

    op: str
