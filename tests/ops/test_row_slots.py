# SPDX-License-Identifier: Apache-2.0
"""row_slots and recent_slots: where rows of sequences lie, in rings, in pages and in the step area."""

from __future__ import annotations

import pytest
import torch

from megamoe.ops import row_slots as module
from megamoe.ops.row_slots import recent_slots, row_slots

from .steps import slot_of, step_of, tables_of


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


# --- known answers ---


def test_a_ring_is_a_table_of_one_block_read_modulo():
    """The answers that rings had when they were addressed by `position % capacity`."""
    rows, tables = torch.tensor([0, 4, 5, 11, -1, -7]), int32([0])
    assert row_slots(rows, int32(0, 0, 0, 0, 0, 0), tables, 5).tolist() == [0, 4, 0, 1, -1, -1]
    assert row_slots(torch.tensor([0, 7]), int32(2, 1), int32([0], [1], [2]), 5).tolist() == [10, 7]


def test_pages():
    tables = int32([3, 0, 5])
    rows = torch.tensor([[0, 1], [2, -1], [5, 4]])
    assert row_slots(rows, int32(0, 0, 0), tables, 2).tolist() == [[6, 7], [0, -1], [11, 10]]


def test_entries_of_requests():
    entries = torch.tensor([[0, 3, -1], [2, -1, 4], [-1, -1, 1]])
    slots = row_slots(entries, int32(0, 1, 1), int32([7, 2, -1], [5, 0, 9]), 2)
    assert slots.tolist() == [[14, 5, -1], [0, -1, 18], [-1, -1, 11]]


def test_a_window_of_two_blocks():
    """Blocks 7 and 4 of three rows: rows 0 to 5, and row 6 where row 0 was."""
    slots = row_slots(torch.arange(8), torch.zeros(8, dtype=torch.int32), int32([7, 4]), 3)
    assert slots.tolist() == [21, 22, 23, 12, 13, 14, 21, 22]


def test_rows_of_nobody():
    rows = torch.tensor([[0, 1], [2, 3]])
    assert row_slots(rows, int32(-1, 0), int32([1]), 4).tolist() == [[-1, -1], [6, 7]]
    assert row_slots(torch.tensor([3, 3]), int32(-1, -1), int32([-1]), 4).tolist() == [-1, -1]


def test_the_window_behind_a_token():
    """The answers that `window_read_slots` gave: oldest first, -1 before the sequence began."""
    slots, in_step = recent_slots(torch.tensor([1, 6]), 3, int32(0, 0), int32([0]), 5, None)
    assert slots.tolist() == [[-1, 0, 1], [4, 0, 1]] and in_step is None
    slots, _ = recent_slots(torch.tensor([1, 6]), 3, int32(1, 0), int32([0], [1]), 5, None)
    assert slots.tolist() == [[-1, 5, 6], [4, 0, 1]]


def test_rows_of_a_step_lie_in_the_step_area():
    """Request 1 begins at position 4 with token 0, request 0 at position 1 with token 3; the last is nobody's."""
    step = step_of((1, 4, 3), (0, 1, 2), (-1, 0, 1))
    in_ring, in_step = recent_slots(step.positions, 3, step.requests, int32([0], [1]), 5, step.first_idx)
    assert in_ring.tolist() == [[7, 8, -1], [8, -1, -1], [-1, -1, -1], [-1, 0, -1], [0, -1, -1], [-1, -1, -1]]
    assert in_step.tolist() == [[-1, -1, 0], [-1, 0, 1], [0, 1, 2], [-1, -1, 3], [-1, 3, 4], [-1, -1, -1]]


def test_nobody_has_no_rows_whatever_its_position():
    for first_idx in (None, int32(0, 0)):
        in_ring, in_step = recent_slots(torch.tensor([3, 4]), 2, int32(-1, -1), int32([0]), 5, first_idx)
        assert bool((in_ring == -1).all()) and (in_step is None or bool((in_step == -1).all()))


def test_some_tokens_of_a_step():
    """As a compressor asks: for the tokens that complete a block, by their numbers."""
    step = step_of((1, 4, 3), (0, 0, 2))
    some = torch.tensor([2, 4])
    slots = recent_slots(step.positions[some], 3, step.requests[some], int32([0], [1]), 5, step.first_idx[some], some)
    assert [one.tolist() for one in slots] == [[[-1, -1, -1], [-1, -1, -1]], [[0, 1, 2], [-1, 3, 4]]]


def test_empty():
    none, nobody = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
    assert row_slots(none, nobody, int32([0]), 5).shape == (0,)
    assert row_slots(none.view(0, 3), nobody, int32([0]), 5).shape == (0, 3)
    assert row_slots(torch.empty(2, 0, dtype=torch.int64), int32(0, 0), int32([0]), 5).shape == (2, 0)
    no_column, no_row = torch.empty(2, 0, dtype=torch.int32), torch.empty(0, 3, dtype=torch.int32)
    for tables in (no_column, no_row):
        assert row_slots(torch.tensor([-1, -1]), int32(0, -1), tables, 5).tolist() == [-1, -1]
        assert row_slots(torch.tensor([4, -1]), int32(-1, -1), tables, 5).tolist() == [-1, -1]
    in_ring, in_step = recent_slots(none, 3, nobody, int32([0]), 5, nobody)
    assert in_ring.shape == in_step.shape == (0, 3)
    in_ring, in_step = recent_slots(torch.tensor([4]), 0, int32(0), int32([0]), 5, int32(0))
    assert in_ring.shape == in_step.shape == (1, 0)


# --- properties ---


@pytest.mark.parametrize("num_blocks, rows_per_block", [(1, 1), (1, 7), (2, 4), (3, 1), (5, 3), (40, 2)])
def test_equals_the_walk_along_the_blocks(num_blocks, rows_per_block, seed):
    torch.manual_seed(seed)
    tables = tables_of(4, num_blocks, rows_per_block, spare=3)
    rows, requests = torch.randint(-2, 70, (30,)), torch.randint(-1, 4, (30,)).to(torch.int32)
    slots = row_slots(rows, requests, tables.block_tables, rows_per_block)
    wanted = [slot_of(tables, *one) for one in zip(requests.tolist(), rows.tolist(), strict=True)]
    assert slots.tolist() == wanted and slots.dtype == torch.int64


def check_chunks(num_blocks, rows_per_block, window, lengths, *, in_step):
    """Written by position and read back after every chunk, a window holds exactly the last positions."""
    tables = tables_of(2, num_blocks, rows_per_block).block_tables
    ring, start = torch.full((2 * num_blocks * rows_per_block,), -99), 0
    for length in lengths:
        step = step_of((1, start, length))
        area, slots = step.positions.clone(), row_slots(step.positions, step.requests, tables, rows_per_block)
        if not in_step:
            ring[slots] = step.positions
        read, new = recent_slots(
            step.positions, window, step.requests, tables, rows_per_block, step.first_idx if in_step else None
        )
        found = torch.where(read >= 0, ring[read.clamp(min=0)], -1)
        if new is not None:
            assert not bool(((read >= 0) & (new >= 0)).any())
            found = torch.where(new >= 0, area[new.clamp(min=0)], found)
        expected = step.positions[:, None] - window + 1 + torch.arange(window)
        assert torch.equal(found, expected.clamp(min=-1))
        if in_step:  # the last rows, as many as there is room for
            ring[slots[-num_blocks * rows_per_block :]] = area[-num_blocks * rows_per_block :]
        start += length


@pytest.mark.parametrize("window, longest", [(1, 1), (4, 1), (4, 3), (5, 8)])
def test_a_chunk_never_overwrites_what_it_reads(window, longest):
    check_chunks(1, window + longest, window, [longest, 1, longest, longest, 1, 1, longest], in_step=False)


@pytest.mark.parametrize("num_blocks, rows_per_block", [(1, 4), (2, 2), (4, 1), (1, 5), (3, 2), (30, 4)])
def test_a_chunk_in_the_step_area_needs_a_ring_of_the_window_alone(num_blocks, rows_per_block):
    check_chunks(num_blocks, rows_per_block, 4, [9, 1, 2, 17, 1, 1, 4, 5, 3], in_step=True)


@pytest.mark.parametrize("fault", ["modulo dropped", "block and row swapped", "first_idx ignored", "one row too far"])
def test_faults_are_caught(fault, monkeypatch):
    """Each of these passes a check of one block, or of one request; the walk above notices it."""
    right_rows, right_recent = module.row_slots, module.recent_slots

    def rows(row_idx, requests, block_tables, rows_per_block):
        if fault == "modulo dropped":
            wide = torch.nn.functional.pad(block_tables, (0, 99))
            return right_rows(row_idx, requests, wide, rows_per_block)
        if fault == "block and row swapped":
            return right_rows(row_idx, requests, block_tables.flip(1), rows_per_block)
        return right_rows(row_idx, requests, block_tables, rows_per_block)

    def recent(ends, num_rows, requests, block_tables, rows_per_block, first_idx, tokens=None):
        if fault == "first_idx ignored" and first_idx is not None:
            first_idx = torch.zeros_like(first_idx)
        if fault == "one row too far" and first_idx is not None:
            first_idx = first_idx - 1
        return right_recent(ends, num_rows, requests, block_tables, rows_per_block, first_idx, tokens)

    monkeypatch.setattr(module, "row_slots", rows)
    monkeypatch.setitem(globals(), "row_slots", rows)
    monkeypatch.setitem(globals(), "recent_slots", recent)
    with pytest.raises(AssertionError):
        if fault in ("first_idx ignored", "one row too far"):
            test_rows_of_a_step_lie_in_the_step_area()
        else:
            test_a_window_of_two_blocks()


# --- refusals ---


def test_refusals():
    with pytest.raises(ValueError, match="the block table is empty and a row of it is asked for"):
        row_slots(torch.tensor([0]), int32(0), torch.empty(1, 0, dtype=torch.int32), 2)
    with pytest.raises(ValueError, match=r"requests must be -1 or in 0 .. 1, .*; got 2"):
        row_slots(torch.tensor([0]), int32(2), int32([0], [1]), 2)
    with pytest.raises(ValueError, match="negative in the block table"):
        row_slots(torch.tensor([2]), int32(0), int32([0, -1]), 2)
    assert row_slots(torch.tensor([1, -1]), int32(0, 0), int32([0, -1]), 2).tolist() == [1, -1]
