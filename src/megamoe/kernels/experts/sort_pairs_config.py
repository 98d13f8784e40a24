# SPDX-License-Identifier: Apache-2.0
"""Compile key of the sorting of pairs, and what a pass is."""

from __future__ import annotations

import dataclasses

THREADS = 512
PASS_FIELDS = 4  # expert, first sorted position, number of pairs, unused
NUM_COUNTERS = 3
SHARED_EXPERT = -1  # in the expert's place, for the passes of the shared one
NO_PAIR = -1  # in the order, behind the routed pairs and behind the shared ones


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        num_experts: E.
        tokens_per_pass: pairs of one expert that one pass serves.
    """

    num_experts: int
    tokens_per_pass: int
