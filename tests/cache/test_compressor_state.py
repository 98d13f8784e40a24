# SPDX-License-Identifier: Apache-2.0
"""Which raw rows a block end needs, from positions alone."""

from __future__ import annotations

import random

import pytest
import torch

from megamoe.cache.compressor_state import (
    block_row_slots,
    completed_entries,
    num_rows_pooled,
    num_visible_entries,
    state_capacity,
)
from megamoe.cache.ring import ring_slots

# --- known answers ---


def test_rows_of_overlapping_blocks():
    slots = block_row_slots(torch.tensor([0, 1, 2]), 4, True, 100)
    assert slots.tolist() == [[-1, -1, -1, -1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 8, 9, 10, 11]]


def test_rows_of_plain_blocks_wrap_in_their_ring():
    assert block_row_slots(torch.tensor([0, 1]), 3, False, 4, ring_idx=torch.tensor([1, 2])).tolist() == [
        [4, 5, 6],
        [11, 8, 9],
    ]
    assert block_row_slots(torch.empty(0, dtype=torch.int64), 3, False, 4).shape == (0, 3)


@pytest.mark.parametrize(
    "start, num_tokens, entries", [(0, 3, []), (0, 4, [0]), (3, 1, [0]), (4, 1, []), (2, 7, [0, 1]), (5, 0, [])]
)
def test_completed_entries(start, num_tokens, entries):
    assert list(completed_entries(start, num_tokens, 4)) == entries


def test_the_token_that_completes_a_block_sees_it():
    visible = num_visible_entries(torch.tensor([0, 2, 3, 4, 6, 7]), 4)
    assert visible.tolist() == [0, 0, 1, 1, 1, 2] and visible.dtype == torch.int32


def test_sizes():
    assert (num_rows_pooled(4, True), num_rows_pooled(128, False)) == (8, 128)
    assert state_capacity(4, True, 1) == 9


# --- properties ---


@pytest.mark.parametrize("ratio, overlap", [(1, False), (1, True), (3, True), (4, True), (8, False)])
@pytest.mark.parametrize("max_chunk", [1, 2, 7, 16])
def test_any_chunking_reads_the_rows_of_its_positions(ratio, overlap, max_chunk, seed):
    """Rows are written by chunk and read by block; every block finds its own positions, every entry comes once."""
    rng = random.Random(seed)
    capacity = state_capacity(ratio, overlap, max_chunk)
    ring = torch.full((capacity,), -99)
    start, seen = 0, []
    while start < 60:
        length = rng.randint(1, max_chunk)
        positions = torch.arange(start, start + length)
        ring[ring_slots(positions, capacity)] = positions
        entries = completed_entries(start, length, ratio)
        slots = block_row_slots(torch.tensor(list(entries), dtype=torch.int64), ratio, overlap, capacity)
        rows = num_rows_pooled(ratio, overlap)
        for entry, row in zip(entries, slots, strict=True):
            expected = torch.arange((entry + 1) * ratio - rows, (entry + 1) * ratio).clamp(min=-1)
            assert torch.equal(torch.where(row >= 0, ring[row.clamp(min=0)], -1), expected)
        seen += entries
        start += length
    assert seen == list(range(start // ratio))
    assert num_visible_entries(torch.tensor([start - 1]), ratio).tolist() == [len(seen)]


# --- refusals ---


def test_refusals():
    with pytest.raises(ValueError, match="ratio must be >= 1"):
        num_rows_pooled(0, False)
    with pytest.raises(ValueError, match="max_chunk must be >= 1"):
        state_capacity(4, True, 0)
    with pytest.raises(ValueError, match="at least the 8 rows of a block; got 7"):
        block_row_slots(torch.tensor([0]), 4, True, 7)
    for bad in ((-1, 1, 4), (0, -1, 4), (0, 1, 0)):
        with pytest.raises(ValueError, match="completed_entries"):
            completed_entries(*bad)
