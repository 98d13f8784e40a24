# SPDX-License-Identifier: Apache-2.0
"""Positions to slots: rings, windows, pages."""

from __future__ import annotations

import pytest
import torch

from megamoe.cache.ring import paged_slots, ring_slots, window_read_slots

# --- known answers ---


def test_ring_slots():
    assert ring_slots(torch.tensor([0, 4, 5, 11, -1, -7]), 5).tolist() == [0, 4, 0, 1, -1, -1]
    assert ring_slots(torch.tensor([0, 7]), 5, ring_idx=torch.tensor([2, 1])).tolist() == [10, 7]


def test_window_read_slots():
    assert window_read_slots(torch.tensor([1, 6]), 3, 5).tolist() == [[-1, 0, 1], [4, 0, 1]]
    assert window_read_slots(torch.tensor([1, 6]), 3, 5, ring_idx=torch.tensor([1, 0])).tolist() == [
        [-1, 5, 6],
        [4, 0, 1],
    ]
    assert window_read_slots(torch.tensor([], dtype=torch.int64), 3, 5).shape == (0, 3)


def test_paged_slots():
    table = torch.tensor([3, 0, 5], dtype=torch.int32)
    assert paged_slots(torch.tensor([[0, 1], [2, -1], [5, 4]]), table, 2).tolist() == [[6, 7], [0, -1], [11, 10]]
    none = torch.tensor([-1, -1])
    assert paged_slots(none, torch.tensor([], dtype=torch.int32), 2).tolist() == [-1, -1]
    assert paged_slots(none[:0], table, 2).tolist() == []


# --- properties ---


@pytest.mark.parametrize("window, max_chunk", [(1, 1), (4, 1), (4, 3), (5, 8)])
def test_a_chunk_never_overwrites_what_it_reads(window, max_chunk):
    """Written by position and read back after every chunk, a window holds exactly the last positions."""
    capacity = window + max_chunk
    ring = torch.full((capacity,), -1)
    start = 0
    for length in [max_chunk, 1, max_chunk, max_chunk, 1, 1, max_chunk]:
        positions = torch.arange(start, start + length)
        ring[ring_slots(positions, capacity)] = positions
        slots = window_read_slots(positions, window, capacity)
        expected = positions[:, None] - window + 1 + torch.arange(window)
        assert torch.equal(torch.where(slots >= 0, ring[slots.clamp(min=0)], -1), expected.clamp(min=-1))
        start += length


def test_too_small_a_ring_is_noticed_by_that_test():
    positions = torch.arange(4)
    assert len(set(ring_slots(positions, 3).tolist())) < 4  # write_cache refuses a slot that appears twice


# --- refusals ---


def test_refusals():
    with pytest.raises(ValueError, match="capacity must be >= 1"):
        ring_slots(torch.tensor([0]), 0)
    for window in (0, 6):
        with pytest.raises(ValueError, match="window must be in 1 .. capacity = 5"):
            window_read_slots(torch.tensor([0]), window, 5)
    with pytest.raises(ValueError, match="row 4 needs page 2"):
        paged_slots(torch.tensor([4]), torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match="-1 in the block table"):
        paged_slots(torch.tensor([2]), torch.tensor([0, -1]), 2)
