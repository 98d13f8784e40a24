# SPDX-License-Identifier: Apache-2.0
"""Compile key of plan_slots and write_block_tables."""

from __future__ import annotations

import dataclasses

THREADS = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        op: "window", "kind" or "tables": the part of a plan that every layer needs, that of layers of one kind, or a
            change of block tables.
    """

    op: str
