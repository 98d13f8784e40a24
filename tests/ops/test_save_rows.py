# SPDX-License-Identifier: Apache-2.0
"""save_rows: the last rows of sequences at some lengths, from rings and from the step area."""

from __future__ import annotations

import sys

import pytest
import torch

from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.ops.read_cache import read_cache
from megamoe.ops.save_rows import save_rows
from megamoe.ops.write_cache import write_cache

from .steps import slot_of, tables_of

MODULE = sys.modules[save_rows.__module__]
FORMATS = [RowFormat.FP32, RowFormat.BF16, RowFormat.FP8_ROPE_BF16]
WIDTH = 128


def saves_of(*saves: tuple[int, int, int, int, int]) -> torch.Tensor:
    return torch.tensor(saves, dtype=torch.int32).reshape(-1, 5)


def one_ring(num_requests: int = 1) -> torch.Tensor:
    return torch.arange(num_requests, dtype=torch.int32)[:, None]


def numbered(num_blocks: int, rows: int, first: int = 0, width: int = 2) -> CachePool:
    """A pool whose slot i holds the number first + i."""
    pool = CachePool.allocate(num_blocks, rows, RowFormat.FP32, width)
    count = num_blocks * rows
    write_cache((first + torch.arange(count)).float()[:, None].expand(count, width), pool, torch.arange(count))
    return pool


def saved(target: CachePool) -> list[list[float]]:
    return read_cache(target, torch.arange(target.num_slots))[:, 0].view(target.num_blocks, -1).tolist()


def blank(num_blocks: int, rows: int) -> CachePool:
    return numbered(num_blocks, rows, first=-1000)


# --- known answers ---


def test_rows_from_a_ring_by_hand():
    """Position p of ring r is slot 5 r + p % 5: rows 4, 5, 6 of ring 1, then rows 0, 1 of ring 0 and one it lacks."""
    target = blank(3, 3)
    save_rows(numbered(2, 5), None, target, saves_of((1, 7, 6, 0, 2), (0, 2, 0, 0, 0)), one_ring(2))
    assert saved(target) == [[-1000, 0, 1], [-997, -996, -995], [9, 5, 6]]


def test_rows_from_the_step_area_by_hand():
    """The request's tokens 3, 4, ... of the step are positions 6, 7, ...; what is before lies in its ring."""
    target, step = blank(2, 3), numbered(1, 16, first=100)
    save_rows(numbered(1, 5), step, target, saves_of((0, 8, 6, 3, 0), (0, 12, 6, 3, 1)), one_ring())
    assert saved(target) == [[0, 103, 104], [106, 107, 108]]


def check_by_hand():
    test_rows_from_a_ring_by_hand()
    test_rows_from_the_step_area_by_hand()


def test_nobody_saves_nothing():
    for saves in (saves_of(), saves_of((-1, 7, 6, 0, 1)), saves_of((-1, -1, -1, -1, -1), (-1, 10**6, 0, 10**6, 9))):
        for step in (None, numbered(1, 4)):
            target = blank(2, 3)
            save_rows(numbered(2, 5), step, target, saves, one_ring(2))
            assert saved(target) == saved(blank(2, 3))


def test_a_sequence_of_no_tokens_has_no_rows():
    target = blank(1, 2)
    save_rows(numbered(1, 5), None, target, saves_of((0, 0, 0, 0, 0)), one_ring())
    assert saved(target) == saved(blank(1, 2))


# --- properties ---


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("layout", ["one block", "two blocks", "pages"])
def test_bytes_of_every_boundary_inside_a_chunk(row_format, layout, seed):
    """Ring and step area hold a sequence's rows where a step put them; each row of each snapshot has its bytes."""
    torch.manual_seed(seed)
    blocks, rows = {"one block": (1, 9), "two blocks": (2, 5), "pages": (16, 4)}[layout]
    tables = tables_of(2, blocks, rows, spare=1)
    written = torch.randn(64, WIDTH)
    ring = CachePool.allocate(2 * blocks + 1, rows, row_format, WIDTH)
    step = CachePool.allocate(1, 40, row_format, WIDTH, block_stride_bytes=ring.block_stride_bytes * 40)
    for pool in (ring, step):
        pool.storage.fill_(0xFF)
    start, first, count, keep = 21, 6, 30, 8
    for position in range(max(0, start - tables.capacity), start):
        write_cache(written[position : position + 1], ring, torch.tensor([slot_of(tables, 1, position)]))
    write_cache(written[start : start + count], step, torch.arange(first, first + count))
    lengths = [24, 28, 32, 36, 51]
    saves = saves_of(*((1, length, start, first, block) for block, length in enumerate(lengths)))
    target = CachePool.allocate(len(lengths) + 1, keep, row_format, WIDTH)
    plain = CachePool.allocate(1, keep, row_format, WIDTH)
    save_rows(ring, step, target, saves, tables.block_tables)
    for block, length in enumerate(lengths):
        write_cache(written[length - keep : length], plain, torch.arange(keep))
        assert torch.equal(target.storage[block], plain.storage[0])
    assert not bool(target.storage[-1].any())


def test_a_request_does_not_depend_on_the_others(seed):
    torch.manual_seed(seed)
    ring, step = numbered(3, 7), numbered(1, 30, first=500)
    mine = (1, 9, 4, 11, 2)
    alone, among = blank(6, 4), blank(6, 4)
    save_rows(ring, step, alone, saves_of(mine), one_ring(3))
    save_rows(ring, step, among, saves_of((0, 5, 3, 0, 0), (-1, 3, 3, 3, 3), mine, (2, 21, 20, 29, 4)), one_ring(3))
    assert saved(among)[2] == saved(alone)[2] and saved(among)[3] == saved(alone)[3]


# --- faults ---


@pytest.mark.parametrize("fault", ["start ignored", "first ignored", "modulo dropped", "one row early"])
def test_faults_are_caught(fault, monkeypatch):
    right = MODULE.reference

    def wrong(ring, step, target, saves, block_tables):
        saves = saves.clone()
        if fault == "start ignored":
            saves[:, 2] = 0
        elif fault == "first ignored":
            saves[:, 3] = 0
        elif fault == "one row early":
            saves[:, 1] -= 1
        else:
            block_tables = torch.nn.functional.pad(block_tables, (0, 99))
        right(ring, step, target, saves, block_tables)

    check_by_hand()
    monkeypatch.setattr(MODULE, "reference", wrong)
    with pytest.raises(AssertionError):
        check_by_hand()


# --- refusals ---


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"ring": torch.zeros(2, 2)}, TypeError, "ring must be a CachePool"),
        ({"step": torch.zeros(2, 2)}, TypeError, "step must be a CachePool"),
        ({"target": torch.zeros(2, 2)}, TypeError, "target must be a CachePool"),
        ({"target": numbered(2, 3, width=4)}, ValueError, "got FP32 of width 2 in ring and FP32 of width 4 in target"),
        (
            {"step": CachePool.allocate(1, 4, RowFormat.BF16, 2)},
            ValueError,
            "BF16 of width 2 in step. Bytes are copied",
        ),
        ({"saves": torch.zeros(1, 4, dtype=torch.int32)}, ValueError, "saves must be"),
        ({"saves": torch.zeros(1, 5, dtype=torch.int64)}, TypeError, "saves must be int32"),
        ({"block_tables": torch.zeros(1, 1, dtype=torch.int64)}, TypeError, "block_tables must be int32"),
        ({"saves": saves_of((1, 3, 0, 0, 0))}, ValueError, r"requests must be -1 or in 0 .. 0, .*; got 1"),
        (
            {"saves": saves_of((0, 9, 0, 0, 0))},
            ValueError,
            "the rows of this step or of the rings must be -1 or in 0 .. 7",
        ),
        ({"saves": saves_of((0, 3, 0, 0, 2))}, ValueError, r"blocks of saves must be in 0 .. 1, .*; got 2"),
        ({"saves": saves_of((0, 3, 0, 0, -1))}, ValueError, r"blocks of saves must be in 0 .. 1, .*; got -1"),
        (
            {"saves": saves_of((0, 3, 0, 0, -1)), "target": blank(2, 1)},  # block -1 of one row is slot -1
            ValueError,
            r"blocks of saves must be in 0 .. 1, .*; got -1",
        ),
        (
            {"saves": saves_of((0, 3, 0, 0, 1), (-1, 3, 0, 0, 0), (0, 2, 0, 0, 1))},
            ValueError,
            r"blocks of saves must be distinct; got \[1, 1\]",
        ),
        ({"block_tables": torch.tensor([[-1]], dtype=torch.int32), "step": None}, ValueError, "negative in the block"),
        ({"block_tables": torch.tensor([[3]], dtype=torch.int32), "step": None}, ValueError, "in 0 .. 4; got 17"),
    ],
)
def test_refusals(change, error, message):
    given = {
        "ring": numbered(1, 5),
        "step": numbered(1, 8),
        "target": blank(2, 3),
        "saves": saves_of((0, 3, 0, 0, 1)),
        "block_tables": one_ring(),
    }
    save_rows(**given)
    with pytest.raises(error, match=message):
        save_rows(**{**given, **change})
