# SPDX-License-Identifier: Apache-2.0
"""What a piece of code asked of a GPU: launches of our kernels, blocks and segments of the allocator, waiting."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from megamoe.kernels.store import store_for, target_of


@dataclasses.dataclass
class Seen:
    """Counts of a `quiet` block, there when it has ended.

    Attributes:
        launches: kernels taken to be launched.
        kernels: kernels loaded or compiled.
        allocations: blocks that were asked of the caching allocator.
        segments: segments that it asked of the driver.
    """

    launches: int = 0
    kernels: int = 0
    allocations: int = 0
    segments: int = 0


@contextlib.contextmanager
def quiet() -> Iterator[Seen]:
    """Count what the block asks for; a wait for the device inside it raises."""
    seen, store, before = Seen(), store_for(target_of(torch.device("cuda"))), torch.cuda.memory_stats()
    launches, kernels = store.num_taken, len(store.ledger)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield seen
    finally:
        torch.cuda.set_sync_debug_mode("default")
        after = torch.cuda.memory_stats()
        seen.launches, seen.kernels = store.num_taken - launches, len(store.ledger) - kernels
        seen.allocations = after["allocation.all.allocated"] - before["allocation.all.allocated"]
        seen.segments = after["segment.all.allocated"] - before["segment.all.allocated"]
