# SPDX-License-Identifier: Apache-2.0
"""write_block_tables: a thread a change. A change outside the tables changes nothing.

Meaning    ops/write_block_tables.py
Grid       128 threads a block
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.cache.plan_slots_config import Config
from megamoe.kernels.store import kernel


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config("tables")


def run(tables: torch.Tensor, changes: torch.Tensor) -> None:
    """Compute write_block_tables."""
    if changes.shape[0]:
        kernel(Config("tables"), tables.device)(tables, changes)
