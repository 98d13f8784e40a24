# SPDX-License-Identifier: Apache-2.0
"""compress_kv: blocks of raw rows to entries.

How rows are pooled is tested where their slots are given: `entries_of`. Which rows, and where entries go: by the door.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch

from megamoe.cache.compressor_state import state_capacity
from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.ops.compress_kv import compress_kv, entries_of
from megamoe.ops.plan_slots import RowTables
from megamoe.ops.read_cache import read_cache
from megamoe.ops.rope import RopeTable, rope_table
from megamoe.verify.tolerance import assert_within
from megamoe.verify.values import moved

from .compressor_cases import Sequences, block_slots, pool_of
from .steps import tables_of

MODULE = sys.modules[compress_kv.__module__]
QUARTER_TURN = RopeTable(torch.tensor([math.pi / 2]))


def pooled(pool, slots, norm_weight, entry_pos, table, *, ratio, overlap, eps=1e-6, out_dtype=torch.bfloat16):
    """Entries from the slots of their rows."""
    return entries_of([(pool, slots)], norm_weight, entry_pos, table, ratio, overlap, eps, out_dtype)


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


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
    y = pooled(
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
    y = pooled(
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
    return pooled(
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
    y = pooled(
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
    y = pooled(
        pool_of(torch.full((1, 4), torch.nan)),
        torch.tensor([[-1, -1]]),
        torch.ones(2),
        torch.tensor([5]),
        QUARTER_TURN,
        ratio=2,
        overlap=False,
    )
    assert y.tolist() == [[0.0, 0.0]] and y.dtype == torch.bfloat16


def by_hand(**change):
    """Token 3 completes entry 1 of request 1, whose position 2 lies in its ring; token 0 of the step is request 0's.

    Both rows of the entry have equal scores after `ape`, so the entry is the mean of (1, 6) and (5, 2), turned by half
    a turn at position 2 and normed: -(3, 4) / 12.5^0.5.
    """
    state = CachePool.allocate(2, 3, RowFormat.FP32, 4)
    state.storage[1].view(torch.float32)[8:12] = torch.tensor([1.0, 6.0, 4.0, 6.0])  # row 2 % 3 of ring 1
    arguments = {
        "raw": torch.tensor([[2.0, 3.0, 0.0, 1.0], [5.0, 2.0, 1.0, 2.0]]),
        "ape": torch.tensor([[10.0, 20.0], [3.0, 4.0]]),
        "norm_weight": torch.ones(2),
        "state": state,
        "step": None,
        "entries": CachePool.allocate(2, 2, RowFormat.FP32, 2),
        "positions": torch.tensor([2, 3]),
        "requests": int32(0, 1),
        "first_idx": int32(0, 1),
        "state_tables": int32([0], [1]),
        "state_slots": torch.tensor([2, 3]),
        "entry_slots": torch.tensor([-1, 3]),
        "table": QUARTER_TURN,
        "ratio": 2,
        "overlap": False,
        "eps": 0.0,
        "out_dtype": torch.float32,
    }
    arguments |= change
    compress_kv(**arguments)
    return arguments


def check_by_hand(given):
    entries = read_cache(given["entries"], torch.arange(4))
    torch.testing.assert_close(entries[3], torch.tensor([-3.0, -4.0]) / 12.5**0.5)
    assert not bool(entries[:3].any())


def test_rows_are_stored_and_entries_written_by_hand():
    given = by_hand()
    check_by_hand(given)
    rows = read_cache(given["state"], torch.arange(6))
    assert rows[2].tolist() == [2.0, 3.0, 10.0, 21.0] and rows[3].tolist() == [5.0, 2.0, 4.0, 6.0]
    assert rows[5].tolist() == [1.0, 6.0, 4.0, 6.0] and not bool(rows[[0, 1, 4]].any())


def test_rows_of_a_step_area_by_hand():
    """The same where the rows of the step lie in the step area: the ring is read and not written."""
    step = CachePool.allocate(1, 2, RowFormat.FP32, 4)
    given = by_hand(step=step, state_slots=torch.tensor([0, 1]))
    check_by_hand(given)
    rows = read_cache(given["state"], torch.arange(6))
    assert rows[5].tolist() == [1.0, 6.0, 4.0, 6.0] and not bool(rows[:5].any())
    assert read_cache(step, torch.arange(2)).tolist() == [[2.0, 3.0, 10.0, 21.0], [5.0, 2.0, 4.0, 6.0]]


@pytest.mark.parametrize("fault", ["ape by token", "first_idx ignored", "ape left out"])
def test_faults_are_caught_by_hand(fault, monkeypatch):
    store, recent = MODULE._store_raw_rows, MODULE.recent_slots

    def wrong_rows(raw, ape, positions, pool, slots, ratio):
        positions = torch.arange(positions.shape[0]) if fault == "ape by token" else positions
        store(raw, torch.zeros_like(ape) if fault == "ape left out" else ape, positions, pool, slots, ratio)

    def wrong_slots(ends, num_rows, requests, block_tables, rows_per_block, first_idx, tokens=None):
        first_idx = torch.zeros_like(first_idx) if first_idx is not None else None
        return recent(ends, num_rows, requests, block_tables, rows_per_block, first_idx, tokens)

    monkeypatch.setattr(
        MODULE, *(("recent_slots", wrong_slots) if "first" in fault else ("_store_raw_rows", wrong_rows))
    )
    with pytest.raises(AssertionError):
        if fault == "ape by token":
            check_by_hand(by_hand(raw=torch.tensor([[5.0, 2.0, 1.0, 2.0]]), **ONE_TOKEN))
        else:
            test_rows_of_a_step_area_by_hand()


ONE_TOKEN = {
    "positions": torch.tensor([3]),
    "requests": int32(1),
    "first_idx": int32(0),
    "state_slots": torch.tensor([3]),
    "entry_slots": torch.tensor([3]),
}


def test_one_token_by_hand():
    check_by_hand(by_hand(raw=torch.tensor([[5.0, 2.0, 1.0, 2.0]]), **ONE_TOKEN))


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
    y = pooled(
        pool_of(torch.cat((values, scores), 1)),
        block_slots(range(24 // ratio), ratio, overlap),
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
    slots = block_slots(range(512 // ratio), ratio, overlap)
    norm_weight, table = torch.rand(width), rope_table(min(64, width), 160000.0)

    def entry(part):
        return pooled(pool, slots[part], norm_weight, entries[part] * ratio, table, ratio=ratio, overlap=overlap)

    whole = entry(slice(None))
    for w in range(0, entries.shape[0], 3):
        assert torch.equal(entry(slice(w, w + 1))[0], whole[w])
    assert torch.equal(entry(slice(1, 4)), whole[1:4])


def test_groups_of_bounded_memory_change_nothing(monkeypatch, seed):
    torch.manual_seed(seed)
    pool, entries = pool_of(torch.randn(64, 32)), torch.arange(16)
    arguments = (pool, block_slots(range(16), 4, True), torch.ones(8), entries * 4, rope_table(4, 10000.0))
    whole = pooled(*arguments, ratio=4, overlap=True)
    for bound in (1, 8 * 32 * 4 * 3):
        monkeypatch.setattr(MODULE, "GATHER_BYTES", bound)
        assert torch.equal(pooled(*arguments, ratio=4, overlap=True), whole)


KINDS = pytest.mark.parametrize("ratio, overlap", [(4, True), (8, False), (1, True), (1, False)])
CHUNKS = [[40], [1] * 40, [3, 1, 8, 8, 5, 7, 8], [4] * 10]
PAGES = (5, 8)  # blocks of entries a request has, and entries in each


@KINDS
@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_any_chunking_gives_the_same_entries(ratio, overlap, chunks, in_step, seed):
    """Rows go through rings of the smallest capacity: for a chunk, or for what an entry pools beside its last row."""
    torch.manual_seed(seed)
    one = Sequences(ratio, overlap, 16)
    capacity = max(one.num_rows - 1, 1) if in_step else state_capacity(ratio, overlap, max(chunks))
    ring, pages = RowTables(int32([1], [0], [2]), capacity), tables_of(3, *PAGES)
    written = one.run([[(2, length)] for length in chunks], ring, pages, in_step=in_step)
    assert torch.equal(one.values(written, pages, 2, 40), one.expected(2, 40))


@KINDS
@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("blocks, rows", [(1, 40), (2, 12), (3, 8), (24, 1), (10, 4)])
def test_layouts_change_nothing(ratio, overlap, blocks, rows, in_step, seed):
    """Rings of one block, of some, and rows in pages as another engine keeps them; several requests in one step."""
    torch.manual_seed(seed)
    one = Sequences(ratio, overlap, 16)
    steps = [[(1, 7), (0, 2)], [(0, 1), (2, 8), (1, 1)], [(2, 3), (1, 8)], [(1, 1), (0, 1), (2, 1)]]
    state, pages = tables_of(3, blocks, rows, spare=1), tables_of(3, 40, 1)
    written = one.run(steps, state, pages, in_step=in_step)
    for request, num_tokens in enumerate((4, 17, 12)):
        assert torch.equal(one.values(written, pages, request, num_tokens), one.expected(request, num_tokens))


@pytest.mark.parametrize("row_format", [RowFormat.FP32, RowFormat.BF16, RowFormat.FP8_ROPE_BF16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_row_formats(row_format, out_dtype, seed):
    """An entry is rounded to out_dtype and then as its row format says."""
    torch.manual_seed(seed)
    one = Sequences(4, True, 128, row_format=row_format, out_dtype=out_dtype)
    ring, pages = RowTables(int32([0], [1], [2]), 18), tables_of(3, *PAGES)
    written = one.run([[(0, 9)], [(0, 10)]], ring, pages, in_step=False)
    assert torch.equal(one.values(written, pages, 0, 19), one.expected(0, 19))


STEPS = [[(1, 7), (0, 9)], [(0, 1), (2, 8), (1, 1)], [(2, 3), (1, 8)], [(1, 1), (0, 1), (2, 1)]]


@KINDS
def test_the_step_area_leaves_the_bytes_of_the_rings(ratio, overlap, seed):
    """The same steps straight into the rings, and through the step area: the same bytes in rings and entries."""
    torch.manual_seed(seed)
    one = Sequences(ratio, overlap, 16)
    ring, pages = RowTables(int32([2], [0], [1]), state_capacity(ratio, overlap, 9)), tables_of(3, *PAGES)
    in_rings, in_step = (one.run(STEPS, ring, pages, in_step=in_step) for in_step in (False, True))
    assert in_step.same_bytes(in_rings)
    assert bool(read_cache(in_rings.entries, one.slots(pages, 1, 17)).isfinite().all())


@KINDS
@pytest.mark.parametrize("in_step", [False, True])
def test_nobody_changes_nobodys_bits(ratio, overlap, in_step, seed):
    """Tokens that are nobody's, between the others and after them, write nothing, whatever is in them."""
    torch.manual_seed(seed)
    one = Sequences(ratio, overlap, 16)
    ring, pages = RowTables(int32([2], [0], [1]), state_capacity(ratio, overlap, 9)), tables_of(3, *PAGES)
    expected = one.run(STEPS, ring, pages, in_step=in_step)
    padded = [[(-1, 2), *[part for parts in step for part in (parts, (-1, 3))]] for step in STEPS]
    for content in (torch.nan, 1e30, 0.0):
        assert one.run(padded, ring, pages, in_step=in_step, nobody=content).same_bytes(expected)
    nothing = one.run([[(-1, 4)], [(-1, 1)]], ring, pages, in_step=in_step, nobody=1.0)
    assert bool((nothing.state.storage == 0xFF).all()) and bool((nothing.entries.storage == 0xFF).all())


def test_a_later_token_does_not_reach_an_earlier_entry(seed):
    """Causality: entry w is a function of the tokens before (w + 1) * ratio alone."""
    torch.manual_seed(seed)
    one = Sequences(4, True, 8, longest=16)
    ring, pages = RowTables(int32([0], [1], [2]), 24), tables_of(3, 4, 1)

    def entries():
        return one.values(one.run([[(0, 16)]], ring, pages, in_step=False), pages, 0, 16)

    before = entries()
    for token in range(16):
        one.raw[0, token] += 1.0
        differs = (entries() != before).any(1).tolist()
        one.raw[0, token] -= 1.0
        before = entries()
        own = token // 4
        assert differs == [w in (own, own + 1) for w in range(4)], token


def test_any_row_stride(seed):
    """Values and scores may be a part of a wider projection."""
    torch.manual_seed(seed)
    wide = torch.randn(2, 9)
    plain, strided = by_hand(raw=wide[:, 2:6].contiguous()), by_hand(raw=wide[:, 2:6])
    for name in ("state", "entries"):
        assert torch.equal(plain[name].storage, strided[name].storage)


def test_empty():
    none, nobody = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
    no_token = {"raw": torch.empty(0, 4), "positions": none, "requests": nobody, "first_idx": nobody}
    no_token |= {"state_slots": none, "entry_slots": none}
    for step in (None, CachePool.allocate(1, 1, RowFormat.FP32, 4)):
        given = by_hand(**no_token, step=step)
        assert not bool(given["entries"].storage.any())
    given = by_hand(entry_slots=torch.tensor([-1, -1]))
    assert not bool(given["entries"].storage.any()) and bool(given["state"].storage[1, :16].any())
    no_table = torch.empty(2, 0, dtype=torch.int32)
    by_hand(entry_slots=torch.tensor([-1, -1]), state_tables=no_table)  # nothing is looked for


# --- kernel ---


GPU_CHUNKS = [[600], [1] * 140 + [460], [127, 1, 128, 344], [5, 123, 130, 342]]  # from 512 on: several tokens a block


@pytest.mark.gpu
@pytest.mark.parametrize("ratio, overlap", [(4, True), (128, False)])
def test_the_kernel_gives_the_same_bytes_for_any_chunking(ratio, overlap, seed):
    """Prefill equals decoding, through rings and through the step area; near the reference, and fp32 rows exactly."""
    torch.manual_seed(seed)
    given = {"longest": 600, "row_format": RowFormat.FP8_ROPE_BF16, "out_dtype": torch.bfloat16, "rope_dim": 64}
    one = Sequences(ratio, overlap, 512, **given, device="cuda")
    pages = tables_of(3, -(-600 // ratio), 1)
    found = []
    for chunks in GPU_CHUNKS:
        for in_step in (False, True):
            capacity = one.num_rows if in_step else state_capacity(ratio, overlap, max(chunks))
            ring = RowTables(int32([1], [0], [2]), capacity)
            written = one.run([[(2, length)] for length in chunks], ring, pages, in_step=in_step)
            found.append((chunks, in_step, written, one.slots(pages, 2, 600)))
    (*_, first, slots), *others = found
    want = one.expected(2, 600)
    assert_within("compress_kv", read_cache(first.entries, slots), want, rounding=2e-2)
    start = 2 * state_capacity(ratio, overlap, 600)  # the ring of the first way holds all rows
    assert torch.equal(read_cache(first.state, torch.arange(start, start + 600)), one.rows(2))
    for chunks, in_step, written, _ in others:
        assert torch.equal(written.entries.storage, first.entries.storage), (len(chunks), in_step)


@pytest.mark.gpu
@pytest.mark.parametrize("ratio, overlap", [(4, True), (128, False)])
@pytest.mark.parametrize("in_step", [False, True])
def test_the_kernel_passes_nobody_over(ratio, overlap, in_step, seed):
    """Requests side by side, nobody's tokens between them; rings of several blocks; nothing else is written."""
    torch.manual_seed(seed)
    given = {"longest": 300, "row_format": RowFormat.FP8_ROPE_BF16, "out_dtype": torch.bfloat16, "rope_dim": 64}
    one = Sequences(ratio, overlap, 512, **given, device="cuda")
    state, pages = tables_of(3, 3, 100, spare=2), tables_of(3, -(-300 // ratio), 1, spare=2)
    steps = [[(1, 7), (0, 130)], [(0, 1), (2, 128), (1, 1)], [(2, 3), (1, 120)], [(1, 1), (0, 1), (2, 1)]]
    written = one.run(steps, state, pages, in_step=in_step)
    for request, num_tokens in enumerate((132, 129, 132)):
        want = one.expected(request, num_tokens)
        assert_within("compress_kv", one.values(written, pages, request, num_tokens), want, rounding=2e-2)
    padded = [[(-1, 2), *[part for parts in step for part in (parts, (-1, 3))]] for step in steps]
    for content in (torch.nan, 1e30):
        assert one.run(padded, state, pages, in_step=in_step, nobody=content).same_bytes(written)
    spare = sorted(set(range(written.entries.num_blocks)) - set(pages.block_tables.flatten().tolist()))
    assert spare and bool((written.entries.storage[spare] == 0xFF).all())


@pytest.mark.gpu
def test_first_idx_is_not_read_where_rows_go_into_the_rings(seed):
    torch.manual_seed(seed)
    given = {"row_format": RowFormat.FP8_ROPE_BF16, "out_dtype": torch.bfloat16, "rope_dim": 64}
    one = Sequences(4, True, 512, **given, device="cuda")
    ring, pages = RowTables(int32([1], [0], [2]), state_capacity(4, True, 9)), tables_of(3, 10, 1)
    want = one.run(STEPS, ring, pages, in_step=False)
    assert one.run(STEPS, ring, pages, in_step=False, first_idx=0).same_bytes(want)
    assert one.run(STEPS, ring, pages, in_step=False, first_idx=10**9).same_bytes(want)


@pytest.mark.gpu
@pytest.mark.parametrize("far", ["state", "step", "entries"])
def test_the_kernel_reaches_blocks_beyond_4_gib(far, seed):
    """Blocks so far apart that 32 bits do not hold the distance: rows written and read there, entries written."""
    torch.manual_seed(seed)
    width, stride, found = 2048, 2**32 + 4096, []
    ring = {"state_tables": int32([1]), "requests": int32(*[0] * 4), "first_idx": int32(*[0] * 4)}
    given = {
        "positions": torch.arange(4, 8),
        "entry_slots": torch.tensor([-1, -1, -1, 6]),
        "table": rope_table(64, 1e4),
        "ratio": 4,
        "overlap": True,
        **ring,
    }
    data = torch.randn(4, width), torch.randn(4, 1024), torch.ones(512).bfloat16()
    for is_far in (False, True):
        pools = {
            "state": CachePool.allocate(2, 12, RowFormat.FP32, width, "cuda"),
            "step": CachePool.allocate(2, 4, RowFormat.FP32, width, "cuda") if far == "step" else None,
            "entries": CachePool.allocate(2, 5, RowFormat.FP8_ROPE_BF16, 512, "cuda"),
        }
        write_rows(torch.randn(4, width, generator=torch.Generator().manual_seed(1)), pools["state"])
        if is_far:
            near = pools[far]
            whole = torch.zeros(stride + near.page_bytes, dtype=torch.uint8, device="cuda")
            storage = whole.as_strided((2, near.page_bytes), (stride, 1))
            storage.copy_(near.storage)
            pools[far] = CachePool(storage, near.rows_per_block, near.row_format, near.width)
        slots = torch.arange(4) + (4 if far == "step" else 12 + 4)
        arguments = {name: moved(one, "cuda") for name, one in (given | {"state_slots": slots}).items()}
        compress_kv(*moved(data, "cuda"), pools["state"], pools["step"], pools["entries"], **arguments)
        found.append([pool.storage.cpu() for pool in pools.values() if pool is not None])
    for near, distant in zip(*found, strict=True):
        assert torch.equal(near, distant)
    assert bool(found[0][-1][1].any()) and not bool(found[0][-1][0].any())


def write_rows(rows, pool):
    """Write rows of a ring, block 1, from its first on."""
    size = 4 * rows.shape[1]
    pool.storage[1, : len(rows) * size].copy_(rows.view(torch.uint8).flatten())


# --- refusals ---


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"raw": torch.zeros(2, 6)}, ValueError, r"raw must be \[T, 4\] \(values, then scores\) and ape \[ratio, 2\]"),
        ({"raw": torch.zeros(2, 4).bfloat16()}, TypeError, "raw must be float32"),
        ({"raw": torch.zeros(3, 4)}, ValueError, "positions must be"),
        ({"ape": torch.zeros(3, 2)}, ValueError, r"got \[2, 4\] and \[3, 2\] for ratio 2"),
        ({"ape": torch.zeros(2, 2, dtype=torch.float64)}, TypeError, "ape must be"),
        ({"norm_weight": torch.ones(3)}, ValueError, r"for D = 3 raw must be \[T, 6\]"),
        ({"norm_weight": torch.ones(2, dtype=torch.float64)}, TypeError, "norm_weight must be"),
        (
            {"state": CachePool.allocate(2, 3, RowFormat.BF16, 4)},
            ValueError,
            "state must hold FP32 rows of width 4; got",
        ),
        ({"state": CachePool.allocate(2, 3, RowFormat.FP32, 8)}, ValueError, "got FP32 rows of width 8. Allocate the"),
        ({"state": torch.zeros(4, 4)}, TypeError, "state must be a CachePool"),
        ({"step": torch.zeros(4, 4)}, TypeError, "step must be a CachePool"),
        ({"step": CachePool.allocate(1, 3, RowFormat.BF16, 4)}, ValueError, "step must hold FP32 rows of width 4"),
        ({"entries": CachePool.allocate(1, 3, RowFormat.FP32, 4)}, ValueError, "entries must hold rows of width 2"),
        ({"entries": torch.zeros(4, 2)}, TypeError, "entries must be a CachePool"),
        ({"positions": int32(2, 3)}, TypeError, "positions must be int64"),
        ({"requests": torch.tensor([0, 1])}, TypeError, "requests must be int32"),
        ({"requests": int32(0, 2)}, ValueError, r"requests must be -1 or in 0 .. 1, .*; got 2"),
        ({"first_idx": int32(0)}, ValueError, "first_idx must be"),
        ({"state_tables": int32([0], [-1])}, ValueError, "negative in the block table"),
        ({"state_tables": torch.tensor([[0], [1]])}, TypeError, "state_tables must be int32"),
        ({"state_slots": torch.tensor([2, 6])}, ValueError, "slots must be -1 or in 0 .. 5; got 6"),
        ({"state_slots": torch.tensor([2, -2])}, ValueError, "got -2"),
        ({"state_slots": torch.tensor([3, 3])}, ValueError, "slot 3 appears twice"),
        ({"state_slots": int32(2, 3)}, TypeError, "state_slots must be int64"),
        ({"entry_slots": torch.tensor([-1, 4])}, ValueError, "slots must be -1 or in 0 .. 3; got 4"),
        ({"entry_slots": torch.tensor([0])}, ValueError, "entry_slots must be"),
        ({"overlap": True}, ValueError, r"for D = 2 with overlap raw must be \[T, 8\]"),
        ({"ratio": 0}, ValueError, "for ratio 0"),
        ({"out_dtype": torch.float16}, ValueError, "out_dtype must be"),
    ],
)
def test_refusals(change, error, message):
    by_hand()
    with pytest.raises(error, match=message):
        by_hand(**change)
