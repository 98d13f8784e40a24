# SPDX-License-Identifier: Apache-2.0
"""compress_kv: blocks of raw rows to entries."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from megamoe.cache.compressor_state import block_row_slots, completed_entries, state_capacity
from megamoe.cache.ring import ring_slots
from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.ops.compress_kv import compress_kv
from megamoe.ops.rope import RopeTable, rope_table
from megamoe.ops.write_cache import write_cache

MODULE = sys.modules[compress_kv.__module__]
QUARTER_TURN = RopeTable(torch.tensor([math.pi / 2]))


def pool_of(rows: torch.Tensor) -> CachePool:
    """A pool whose slot i holds row i."""
    pool = CachePool.allocate(1, max(rows.shape[0], 1), RowFormat.FP32, rows.shape[1])
    write_cache(rows, pool, torch.arange(rows.shape[0]))
    return pool


def in_fp64(values, scores, first, last, overlap, norm_weight, position, inv_freq, eps=1e-6):
    """One entry straight from the definition, token by token and channel by channel."""
    ratio, width = last - first, norm_weight.shape[0]
    items = []  # (score [D], value [D])
    if overlap:
        for t in range(max(first - ratio, 0), first):
            items.append((scores[t, :width], values[t, :width]))
    for t in range(first, last):
        items.append((scores[t, -width:], values[t, -width:]))
    entry = torch.zeros(width, dtype=torch.float64)
    for c in range(width):
        top = max(float(score[c]) for score, _ in items)
        weights = [math.exp(float(score[c]) - top) for score, _ in items]
        entry[c] = sum(w * float(value[c]) for w, (_, value) in zip(weights, items, strict=True)) / sum(weights)
    entry = entry * (entry.square().mean() + eps).rsqrt() * norm_weight.double()
    rope_dim = 2 * inv_freq.shape[0]
    for pair in range(rope_dim // 2):
        even = width - rope_dim + 2 * pair
        angle = float(torch.tensor(float(position)) * inv_freq[pair])
        e, o = float(entry[even]), float(entry[even + 1])
        entry[even] = e * math.cos(angle) - o * math.sin(angle)
        entry[even + 1] = o * math.cos(angle) + e * math.sin(angle)
    return entry


# --- known answers ---


def test_equal_scores_give_the_mean():
    """Means 3 and 4; their root mean square is 12.5^0.5."""
    pool = pool_of(torch.tensor([[1.0, 6.0, 0.0, 5.0], [5.0, 2.0, 0.0, 5.0]]))
    y = compress_kv(
        pool,
        torch.tensor([[0, 1]]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([0]),
        QUARTER_TURN,
        ratio=2,
        overlap=False,
        eps=0.0,
        out_dtype=torch.float32,
    )
    torch.testing.assert_close(y, torch.tensor([[3.0, 8.0]]) / 12.5**0.5)


def test_weights_per_channel_norm_weight_and_rotation():
    """Scores ln 3 against 0 weigh 3 to 1 in channel 0 and 1 to 3 in channel 1; position 2 turns by half a turn."""
    ln3 = math.log(3.0)
    pool = pool_of(torch.tensor([[4.0, 8.0, ln3, 0.0], [8.0, 4.0, 0.0, ln3]]))
    y = compress_kv(
        pool,
        torch.tensor([[0, 1]]),
        torch.tensor([1.0, 3.0]),
        torch.tensor([2]),
        QUARTER_TURN,
        ratio=2,
        overlap=False,
        out_dtype=torch.float32,
    )
    torch.testing.assert_close(y, torch.tensor([[-1.0, -3.0]]))  # both means are 5, their root mean square too


OVERLAP_ROWS = torch.tensor(
    # values: first half, second half; scores: first half, second half
    [
        [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0],
        [3.0, 3.0, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0],
        [90.0, 90.0, 5.0, 5.0, 9.0, 9.0, 0.0, 0.0],
        [90.0, 90.0, 7.0, 15.0, 9.0, 9.0, 0.0, 0.0],
    ]
)


def overlap_answer(row_slots) -> torch.Tensor:
    return compress_kv(
        pool_of(OVERLAP_ROWS),
        torch.tensor([row_slots]),
        torch.ones(2),
        torch.tensor([0]),
        QUARTER_TURN,
        ratio=2,
        overlap=True,
        eps=0.0,
        out_dtype=torch.float32,
    )[0]


def test_overlap_takes_the_first_half_of_older_rows_and_the_second_of_newer():
    """All used scores are 0: channel 0 is the mean of 1, 3, 5, 7 and channel 1 of 1, 3, 5, 15."""
    torch.testing.assert_close(overlap_answer([0, 1, 2, 3]), torch.tensor([4.0, 6.0]) / 26.0**0.5)


def test_first_overlapping_block_has_no_older_rows():
    torch.testing.assert_close(overlap_answer([-1, -1, 2, 3]), torch.tensor([6.0, 10.0]) / 68.0**0.5)


def test_swapped_halves_are_caught(monkeypatch):
    """Fault: newer rows give the first half. The known answer above fails with it."""

    def swapped(x: torch.Tensor, ratio: int) -> torch.Tensor:
        before, own = x.chunk(2, dim=-1)
        return torch.cat((own[:, :ratio], before[:, ratio:]), dim=1)

    monkeypatch.setattr(MODULE, "_overlapped", swapped)
    with pytest.raises(AssertionError):
        test_overlap_takes_the_first_half_of_older_rows_and_the_second_of_newer()


def test_large_scores_do_not_overflow():
    pool = pool_of(torch.tensor([[1.0, 1.0, 500.0, -3e38], [3.0, 3.0, 500.0, 3e38]]))
    y = compress_kv(
        pool,
        torch.tensor([[0, 1]]),
        torch.ones(2),
        torch.tensor([0]),
        QUARTER_TURN,
        ratio=2,
        overlap=False,
        eps=0.0,
        out_dtype=torch.float32,
    )
    torch.testing.assert_close(y, torch.tensor([[2.0, 3.0]]) / 6.5**0.5)


def test_a_block_without_rows_is_zero():
    y = compress_kv(
        pool_of(torch.full((1, 4), torch.nan)),
        torch.tensor([[-1, -1]]),
        torch.ones(2),
        torch.tensor([5]),
        QUARTER_TURN,
        ratio=2,
        overlap=False,
    )
    assert y.tolist() == [[0.0, 0.0]] and y.dtype == torch.bfloat16


# --- properties ---


@pytest.mark.parametrize(
    "ratio, overlap, width", [(4, True, 16), (8, False, 16), (3, True, 6), (1, False, 2), (1, True, 4)]
)
def test_equals_the_definition_in_fp64(ratio, overlap, width, seed):
    torch.manual_seed(seed)
    coff = 2 if overlap else 1
    values, scores = torch.randn(24, coff * width), 2 * torch.randn(24, coff * width)
    norm_weight, table = torch.rand(width) + 0.5, rope_table(2, 10000.0)
    entries = torch.arange(24 // ratio)
    y = compress_kv(
        pool_of(torch.cat((values, scores), 1)),
        block_row_slots(entries, ratio, overlap, 24),
        norm_weight,
        entries * ratio,
        table,
        ratio=ratio,
        overlap=overlap,
        out_dtype=torch.float32,
    )
    for w in range(24 // ratio):
        expected = in_fp64(values, scores, w * ratio, (w + 1) * ratio, overlap, norm_weight, w * ratio, table.inv_freq)
        torch.testing.assert_close(y[w].double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("ratio, overlap, width", [(4, True, 512), (4, True, 128), (128, False, 512), (8, False, 16)])
def test_an_entry_does_not_depend_on_the_others(ratio, overlap, width, seed):
    torch.manual_seed(seed)
    pool = pool_of(torch.randn(512, 2 * (2 if overlap else 1) * width))
    entries = torch.arange(512 // ratio)
    slots = block_row_slots(entries, ratio, overlap, 512)
    norm_weight, table = torch.rand(width), rope_table(min(64, width), 160000.0)

    def entry(part):
        return compress_kv(pool, slots[part], norm_weight, entries[part] * ratio, table, ratio=ratio, overlap=overlap)

    whole = entry(slice(None))
    for w in range(0, entries.shape[0], 3):
        assert torch.equal(entry(slice(w, w + 1))[0], whole[w])
    assert torch.equal(entry(slice(1, 4)), whole[1:4])


def test_groups_of_bounded_memory_change_nothing(monkeypatch, seed):
    torch.manual_seed(seed)
    pool, entries = pool_of(torch.randn(64, 32)), torch.arange(16)
    arguments = (pool, block_row_slots(entries, 4, True, 64), torch.ones(8), entries * 4, rope_table(4, 10000.0))
    whole = compress_kv(*arguments, ratio=4, overlap=True)
    for bound in (1, 8 * 32 * 4 * 3):
        monkeypatch.setattr(MODULE, "GATHER_BYTES", bound)
        assert torch.equal(compress_kv(*arguments, ratio=4, overlap=True), whole)


@pytest.mark.parametrize("ratio, overlap", [(4, True), (8, False)])
@pytest.mark.parametrize("chunks", [[40], [1] * 40, [3, 1, 8, 8, 5, 7, 8], [4] * 10])
def test_any_chunking_gives_the_same_entries(ratio, overlap, chunks, seed):
    """Rows go through a ring of the smallest capacity, as decoding writes them."""
    torch.manual_seed(seed)
    width, max_chunk = 16, max(chunks)
    rows = torch.randn(40, 2 * (2 if overlap else 1) * width)
    norm_weight, table = torch.rand(width), rope_table(8, 160000.0)
    arguments = {"ratio": ratio, "overlap": overlap}
    everything = torch.arange(40 // ratio)
    expected = compress_kv(
        pool_of(rows),
        block_row_slots(everything, ratio, overlap, 40),
        norm_weight,
        everything * ratio,
        table,
        **arguments,
    )
    capacity = state_capacity(ratio, overlap, max_chunk)
    ring = CachePool.allocate(3, capacity, RowFormat.FP32, rows.shape[1])
    ring.storage.fill_(0xFF)  # NaN: a row that is read before it is written shows
    start, parts = 0, []
    for length in chunks:
        positions = torch.arange(start, start + length)
        write_cache(rows[positions], ring, ring_slots(positions, capacity, ring_idx=2))
        done = completed_entries(start, length, ratio)
        entries = torch.arange(done.start, done.stop)
        slots = block_row_slots(entries, ratio, overlap, capacity, ring_idx=2)
        parts.append(compress_kv(ring, slots, norm_weight, entries * ratio, table, **arguments))
        start += length
    assert torch.equal(torch.cat(parts), expected)


def test_a_later_token_does_not_reach_an_earlier_entry(seed):
    """Causality: entry w is a function of the tokens before (w + 1) * ratio alone."""
    torch.manual_seed(seed)
    rows = torch.randn(16, 32)
    entries = torch.arange(4)
    rest = (torch.ones(8), entries * 4, rope_table(4, 10000.0))

    def entries_of(rows):
        return compress_kv(pool_of(rows), block_row_slots(entries, 4, True, 16), *rest, ratio=4, overlap=True)

    before = entries_of(rows)
    for token in range(16):
        changed = rows.clone()
        changed[token] += 1.0
        differs = (entries_of(changed) != before).any(1).tolist()
        own = token // 4
        assert differs == [w in (own, own + 1) for w in range(4)], token


def test_nothing_completed():
    y = compress_kv(
        pool_of(torch.zeros(1, 4)),
        torch.empty(0, 2, dtype=torch.int64),
        torch.ones(2),
        torch.empty(0, dtype=torch.int64),
        QUARTER_TURN,
        ratio=2,
        overlap=False,
        out_dtype=torch.float32,
    )
    assert y.shape == (0, 2) and y.dtype == torch.float32


# --- refusals ---


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"row_slots": torch.tensor([[0, 1, 2]])}, ValueError, "ratio columns"),
        ({"row_slots": torch.tensor([[0, 4]])}, ValueError, "row_slots must be -1 or in 0 .. 3; got 4"),
        ({"row_slots": torch.tensor([[0, -2]])}, ValueError, "got -2"),
        ({"row_slots": torch.tensor([[0, 1]], dtype=torch.int32)}, TypeError, "row_slots must be int64"),
        ({"entry_pos": torch.tensor([0, 1])}, ValueError, "entry_pos must be"),
        ({"norm_weight": torch.ones(3)}, ValueError, "pool must hold FP32 rows of width 6"),
        ({"norm_weight": torch.ones(2, dtype=torch.float64)}, TypeError, "norm_weight must be"),
        ({"pool": CachePool.allocate(1, 4, RowFormat.BF16, 4)}, ValueError, "got BF16 rows of width 4"),
        ({"pool": torch.zeros(4, 4)}, TypeError, "pool must be a CachePool"),
        ({"overlap": True}, ValueError, r"2 \* ratio columns"),
        ({"ratio": 0}, ValueError, "ratio columns"),
        ({"out_dtype": torch.float16}, ValueError, "out_dtype must be"),
    ],
)
def test_refusals(change, error, message):
    arguments = {
        "pool": CachePool.allocate(1, 4, RowFormat.FP32, 4),
        "row_slots": torch.tensor([[0, 1]]),
        "norm_weight": torch.ones(2),
        "entry_pos": torch.tensor([0]),
        "table": QUARTER_TURN,
        "ratio": 2,
        "overlap": False,
    }
    compress_kv(**arguments)
    with pytest.raises(error, match=message):
        compress_kv(**{**arguments, **change})
