# SPDX-License-Identifier: Apache-2.0
"""Copies of rings at page boundaries, so that a sequence can continue from a prefix that another one computed.

What is copied is what the next token reads, per layer kind (`cache.pools.resume_rows`): window - 1 window rows; in CSA
layers the raw rows of the previous block, of the compressor and of the index compressor; in HCA layers no raw rows,
because a page ends where a block ends. Entries and index keys are in pages, which sequences share.

A step that writes into the rings leaves them there, and they are copied when the step has run (`save`). A longer step
keeps its rows in the step area, which the next layer overwrites: `finish_layer` copies them, and then the last rows of
every sequence to its rings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megamoe.cache.pools import RINGS, LayerPools
from megamoe.models.deepseek_v4.config import LayerKind
from megamoe.models.deepseek_v4.plan import StepPlan
from megamoe.ops.copy_cache import copy_cache
from megamoe.ops.save_rows import save_rows


def finish_layer(plan: StepPlan, pools: LayerPools, kind: LayerKind) -> None:
    """Bring the rows of a step out of the step area: to snapshots, then to the rings they overwrite."""
    if plan.in_rings:
        return
    if plan.saves is not None:
        save(plan.saves, [pools], plan.window.block_tables, in_step=True)
    state_kept = plan.entry_slots(kind).state_kept if kind in plan.tables else None
    for name, kept in (("window", plan.slots.window_kept), ("state", state_kept), ("index_state", state_kept)):
        step, ring = getattr(pools.step, name), getattr(pools, name)
        if ring is not None and kept is not None:
            slots = plan.slots.window_slots if name == "window" else plan.entry_slots(kind).state_slots
            copy_cache(step, slots, ring, kept)


def save(saves: torch.Tensor, layers: Sequence[LayerPools], ring_tables: torch.Tensor, *, in_step: bool) -> None:
    """Copy the rows that continue sequences to the snapshots of some layers.

    Args:
        saves: [S, 5] int32, as ops.save_rows takes them.
        layers: which.
        ring_tables: [R, 1] int32.
        in_step: whether the rows of the running step are in the step area.
    """
    for pools in layers:
        for name in RINGS:
            target = getattr(pools.saved, name)
            if target is not None:
                step = getattr(pools.step, name) if in_step else None
                save_rows(getattr(pools, name), step, target, saves, ring_tables)


def restore(layers: Sequence[LayerPools], snapshot_idx: int, ring_idx: int, length: int) -> None:
    """Copy a snapshot of some layers to where the last rows before position `length` live in a ring."""
    for pools in layers:
        for name in RINGS:
            saved, ring = getattr(pools.saved, name), getattr(pools, name)
            if saved is not None:
                num_rows = saved.rows_per_block
                row = torch.arange(num_rows, device=ring.device)
                in_ring = (row + (length - num_rows)) % ring.rows_per_block + ring_idx * ring.rows_per_block
                copy_cache(saved, row + snapshot_idx * num_rows, ring, in_ring)
