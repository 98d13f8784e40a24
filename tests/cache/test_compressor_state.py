# SPDX-License-Identifier: Apache-2.0
"""How many raw rows an entry pools, and how many a ring of them has to keep."""

from __future__ import annotations

import random

import pytest
import torch

from megamoe.cache.compressor_state import num_rows_pooled, state_capacity
from megamoe.ops.plan_slots import EntryTables, RowTables, StepSlots, plan_slots
from megamoe.ops.row_slots import recent_slots

# --- known answers ---


def test_sizes():
    assert (num_rows_pooled(4, True), num_rows_pooled(128, False)) == (8, 128)
    assert state_capacity(4, True, 1) == 9


# --- properties ---


def read_blocks(ratio: int, overlap: bool, capacity: int, longest: int, seed: int, *, in_step: bool) -> None:
    """Write rows by chunk and read them by block: every block finds its own positions, every entry comes once."""
    rng = random.Random(seed)
    ring = RowTables(torch.tensor([[0]], dtype=torch.int32), capacity)
    pages = RowTables(torch.arange(80, dtype=torch.int32)[None], 1)
    rows, num_rows = torch.full((capacity,), -99), num_rows_pooled(ratio, overlap)
    start, seen = 0, []
    while start < 60:
        length = rng.randint(1, longest)
        positions = torch.arange(start, start + length)
        nothing = torch.zeros(length, dtype=torch.int32)
        slots = StepSlots.empty(length, 1, torch.device("cpu"))
        tokens = torch.stack((nothing, positions.to(torch.int32), nothing, nothing))
        plan_slots(tokens, ring, (EntryTables(ratio, ring, pages),), slots, in_rings=not in_step)
        (kind,) = slots.entries
        if not in_step:
            rows[kind.state_slots] = positions
        done = (kind.entry_slots >= 0).nonzero().squeeze(1)
        requests, first = slots.requests[done], slots.first_idx[done] if in_step else None
        in_ring, new = recent_slots(positions[done], num_rows, requests, ring.block_tables, capacity, first, done)
        found = torch.where(in_ring >= 0, rows[in_ring.clamp(min=0)], -1)
        if new is not None:
            found = torch.where(new >= 0, positions[new.clamp(min=0)], found)
        entries = kind.entry_slots[done]  # entry w lies on page w
        assert torch.equal(found, ((entries[:, None] + 1) * ratio - num_rows + torch.arange(num_rows)).clamp(min=-1))
        assert kind.num_visible[done].tolist() == (entries + 1).tolist()
        if in_step:
            kept = kind.state_kept >= 0
            rows[kind.state_kept[kept]] = positions[kept]
        seen += entries.tolist()
        start += length
        assert int(kind.num_visible[-1]) == len(seen)
    assert seen == list(range(start // ratio))


KINDS = pytest.mark.parametrize("ratio, overlap", [(1, False), (1, True), (3, True), (4, True), (8, False)])


@KINDS
@pytest.mark.parametrize("longest", [1, 2, 7, 16])
def test_any_chunking_reads_the_rows_of_its_positions(ratio, overlap, longest, seed):
    read_blocks(ratio, overlap, state_capacity(ratio, overlap, longest), longest, seed, in_step=False)


@KINDS
def test_a_step_area_needs_the_rings_of_decoding(ratio, overlap, seed):
    read_blocks(ratio, overlap, state_capacity(ratio, overlap, 1), 16, seed, in_step=True)


@pytest.mark.parametrize("longest", [1, 7])
def test_smaller_rings_are_noticed_by_that_test(longest, seed):
    """The oldest row that is read and the newest that is written lie one row less than the capacity apart."""
    with pytest.raises(AssertionError):
        for attempt in range(20):
            capacity = state_capacity(4, True, longest) - 2
            read_blocks(4, True, capacity, longest, seed + attempt, in_step=False)


# --- refusals ---


def test_refusals():
    with pytest.raises(ValueError, match="ratio must be >= 1"):
        num_rows_pooled(0, False)
    with pytest.raises(ValueError, match="ring_tokens must be >= 1"):
        state_capacity(4, True, 0)
