# SPDX-License-Identifier: Apache-2.0
"""Copies of rings at page boundaries, so that a sequence can continue from a prefix that another one computed.

What is copied is what the next token reads, per layer kind (`cache.pools.resume_rows`): window - 1 window rows; in CSA
layers the raw rows of the previous block, of the compressor and of the index compressor; in HCA layers no raw rows,
because a page ends where a block ends. Entries and index keys are in pages, which sequences share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megamoe.cache.pools import CacheSize, LayerCacheSpec, LayerPools, snapshot_shapes
from megamoe.cache.ring import ring_slots
from megamoe.formats.cache_rows import CachePool
from megamoe.ops.copy_cache import copy_cache


class Snapshots:
    """Storage for the rings of some layers at page boundaries."""

    def __init__(
        self,
        specs: Sequence[LayerCacheSpec],
        layers: Sequence[LayerPools],
        size: CacheSize,
        num_snapshots: int,
        device: torch.device,
    ) -> None:
        """Allocate room for `num_snapshots` copies of what `resume_rows` names in each of `layers`."""
        self._pairs: list[tuple[CachePool, CachePool]] = []  # (ring pool, snapshot pool)
        for spec, pools in zip(specs, layers, strict=True):
            for name, shape in snapshot_shapes(spec, size, num_snapshots).items():
                self._pairs.append((getattr(pools, name), shape.allocate(device)))

    def save(self, ring_idx: int, length: int, snapshot_idx: int) -> None:
        """Copy the last rows before position `length` from a ring to a snapshot."""
        for ring, snapshot in self._pairs:
            copy_cache(ring, *_slots(ring, snapshot, ring_idx, length, snapshot_idx, ring_first=True))

    def restore(self, snapshot_idx: int, ring_idx: int, length: int) -> None:
        """Copy a snapshot to where the last rows before position `length` live in a ring."""
        for ring, snapshot in self._pairs:
            copy_cache(snapshot, *_slots(ring, snapshot, ring_idx, length, snapshot_idx, ring_first=False))


def _slots(
    ring: CachePool, snapshot: CachePool, ring_idx: int, length: int, snapshot_idx: int, *, ring_first: bool
) -> tuple[torch.Tensor, CachePool, torch.Tensor]:
    """Return the last three arguments of copy_cache."""
    num_rows = snapshot.rows_per_block
    rows = torch.arange(num_rows, device=ring.device)
    in_snapshot = rows + snapshot_idx * num_rows
    in_ring = ring_slots(rows + (length - num_rows), ring.rows_per_block, ring_idx=ring_idx)
    return (in_ring, snapshot, in_snapshot) if ring_first else (in_snapshot, ring, in_ring)
