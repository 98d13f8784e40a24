# SPDX-License-Identifier: Apache-2.0
"""sparse_attention: one softmax over window rows and compressed entries, with a sink."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.ops.read_cache import read_cache
from megamoe.ops.sparse_attention import sparse_attention
from megamoe.ops.write_cache import write_cache

MODULE = sys.modules[sparse_attention.__module__]
INF = math.inf


def pool_of(rows: torch.Tensor, row_format: RowFormat = RowFormat.FP32, page: int = 8) -> CachePool:
    """A pool whose slot i holds row i; rows after the last one are NaN bytes."""
    pool = CachePool.allocate(max(-(-rows.shape[0] // page), 1), page, row_format, rows.shape[1])
    pool.storage.fill_(0xFF)
    write_cache(rows, pool, torch.arange(rows.shape[0]))
    return pool


def in_fp64(q, window, window_slots, entries, entry_slots, sink, scale):
    """The definition, token by token and head by head."""
    y = torch.zeros(q.shape, dtype=torch.float64)
    for t in range(q.shape[0]):
        rows = [read_cache(window, window_slots[t][window_slots[t] >= 0])]
        if entries is not None:
            rows.append(read_cache(entries, entry_slots[t][entry_slots[t] >= 0]))
        items = torch.cat(rows).double()
        for h in range(q.shape[1]):
            logits = scale * (items @ q[t, h].double())
            top = max([float(sink[h]), *logits.tolist(), -1e300])
            weights = torch.exp(logits - top)
            total = float(weights.sum()) + (math.exp(float(sink[h]) - top) if float(sink[h]) > -INF else 0.0)
            if total:
                y[t, h] = weights @ items / total
    return y


def example(num_tokens, num_heads, width, window, num_entries, row_format=RowFormat.FP32, holes=0.2):
    """Random arguments with -1 in random columns."""
    rows, compressed = torch.randn(100, width), torch.randn(80, width)
    window_slots = torch.rand(num_tokens, 100).argsort(1)[:, :window]
    entry_slots = torch.rand(num_tokens, 80).argsort(1)[:, :num_entries]
    window_slots[torch.rand(window_slots.shape) < holes] = -1
    entry_slots[torch.rand(entry_slots.shape) < holes] = -1
    return (
        torch.randn(num_tokens, num_heads, width),
        pool_of(rows, row_format),
        window_slots,
        pool_of(compressed, row_format),
        entry_slots,
        torch.randn(num_heads),
    )


# --- known answers ---


def hand_made(**change):
    """Two items with logits 2 ln 3 = 0.5 * (4 ln 3) and 0, and a sink of weight 2: weights 9, 1, 2 of 12."""
    arguments = {
        "q": torch.tensor([[[4 * math.log(3.0), 0.0]]]),
        "window": pool_of(torch.tensor([[1.0, 0.0]])),
        "window_slots": torch.tensor([[0]]),
        "entries": pool_of(torch.tensor([[0.0, 6.0]])),
        "entry_slots": torch.tensor([[0]]),
        "sink": torch.tensor([math.log(2.0)]),
        "scale": 0.5,
    }
    return sparse_attention(**{**arguments, **change})


def check_hand_made():
    torch.testing.assert_close(hand_made(), torch.tensor([[[0.75, 0.5]]]))


def test_weights_nine_one_and_a_sink_of_two():
    check_hand_made()


def test_without_a_sink():
    torch.testing.assert_close(hand_made(sink=torch.tensor([-INF])), torch.tensor([[[0.9, 0.6]]]))


@pytest.mark.parametrize("fault", ["scaled with the logits", "beside unscaled logits", "added to every logit"])
def test_sink_faults_are_caught(fault, monkeypatch):
    """Fault F10: the known answer above fails with each of the wrong sinks."""
    right = MODULE._attend

    def wrong(q, rows, is_item, sink, scale):
        if fault == "scaled with the logits":  # softmax(scale * [q . row, sink])
            sink = sink * scale
        elif fault == "beside unscaled logits":  # softmax([q . row, sink])
            scale = 1.0
        else:  # softmax(scale * (q . row) + sink), which cancels
            sink = torch.full_like(sink, -INF)
        return right(q, rows, is_item, sink, scale)

    monkeypatch.setattr(MODULE, "_attend", wrong)
    with pytest.raises(AssertionError):
        check_hand_made()


def test_a_row_is_key_and_value():
    """One item and no sink: the row itself, whatever the query."""
    y = hand_made(
        entries=None, entry_slots=None, sink=torch.tensor([-INF]), window=pool_of(torch.tensor([[-3.0, 0.25]]))
    )
    assert y.tolist() == [[[-3.0, 0.25]]]


def test_a_slot_named_twice_counts_twice():
    """Logits 0 for both rows: two of (1, 0) and one of (0, 6), a sink of weight 1."""
    y = hand_made(q=torch.zeros(1, 1, 2), window_slots=torch.tensor([[0, -1, 0]]), sink=torch.zeros(1))
    torch.testing.assert_close(y, torch.tensor([[[0.5, 1.5]]]))


@pytest.mark.parametrize("sink", [-INF, -1e30, -200.0, 0.0, 200.0, 1e30, INF])
def test_no_item_is_zero(sink):
    """For the only token of a call, and for one beside a token that has items."""
    none = torch.tensor([[-1, -1]])
    y = hand_made(window_slots=none, entry_slots=none, sink=torch.tensor([sink]))
    assert y.tolist() == [[[0.0, 0.0]]] and not bool(y.signbit().any())
    some = torch.tensor([[-1, -1], [0, -1]])
    y = hand_made(q=torch.ones(2, 1, 2), window_slots=some, entry_slots=some, sink=torch.tensor([sink]))
    assert y[0].tolist() == [[0.0, 0.0]] and not bool(y[0].signbit().any()) and bool(y[1].isfinite().all())


def test_an_infinite_sink_takes_everything():
    assert hand_made(sink=torch.tensor([INF])).tolist() == [[[0.0, 0.0]]]
    y = hand_made(q=torch.ones(1, 2, 2), sink=torch.tensor([INF, 0.0]))
    assert y[0, 0].tolist() == [0.0, 0.0] and int(y[0, 1].count_nonzero()) == 2


def test_large_numbers_do_not_overflow():
    """Logits of +-1e4 and sinks beside them: the largest logit is subtracted first."""
    pools = {"window": pool_of(torch.tensor([[1.0, 0.0]])), "entries": pool_of(torch.tensor([[-1.0, 2.0]]))}
    big = torch.tensor([[[2e4, 0.0]]])
    assert hand_made(q=big, **pools).tolist() == [[[1.0, 0.0]]]
    assert hand_made(q=-big, **pools).tolist() == [[[-1.0, 2.0]]]
    assert hand_made(q=big, sink=torch.tensor([3e4]), **pools).tolist() == [[[0.0, 0.0]]]
    torch.testing.assert_close(hand_made(q=big, sink=torch.tensor([1e4]), **pools), torch.tensor([[[0.5, 0.0]]]))


# --- properties ---


@pytest.mark.parametrize(
    "shape",
    [
        (3, 4, 16, 8, 5),
        (2, 64, 16, 63, 64),
        (2, 1, 128, 64, 65),
        (2, 3, 5, 65, 1),
        (1, 4, 512, 100, 64),
        (5, 2, 8, 1, 0),
        (5, 2, 8, 0, 1),
        (2, 2, 600, 3, 3),
    ],
    ids=str,
)
def test_equals_the_definition_in_fp64(shape, seed):
    torch.manual_seed(seed)
    arguments = example(*shape)
    y = sparse_attention(*arguments, scale=shape[2] ** -0.5)
    torch.testing.assert_close(y.double(), in_fp64(*arguments, shape[2] ** -0.5), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "row_format, width", [(RowFormat.FP8_ROPE_BF16, 512), (RowFormat.BF16, 128), (RowFormat.FP32, 20)]
)
@pytest.mark.parametrize("num_heads", [4, 64])
def test_a_token_does_not_depend_on_the_others(row_format, width, num_heads, seed):
    torch.manual_seed(seed)
    q, window, window_slots, entries, entry_slots, sink = example(40, num_heads, width, 70, 30, row_format)
    entry_slots[::3] = -1
    q = q.bfloat16()

    def attend(part):
        return sparse_attention(
            q[part], window, window_slots[part], entries, entry_slots[part], sink, scale=width**-0.5
        )

    whole = attend(slice(None))
    assert whole.dtype == torch.bfloat16
    for t in range(0, 40, 3):
        assert torch.equal(attend(slice(t, t + 1))[0], whole[t])
    assert torch.equal(attend(slice(5, 22)), whole[5:22])


@pytest.mark.parametrize("bound", [1, 200_000, 2**22])
def test_groups_of_bounded_memory_change_nothing(bound, monkeypatch, seed):
    torch.manual_seed(seed)
    arguments = example(60, 4, 64, 70, 30)
    whole = sparse_attention(*arguments, scale=0.125)
    monkeypatch.setattr(MODULE, "GROUP_BYTES", bound)
    assert torch.equal(sparse_attention(*arguments, scale=0.125), whole)


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 640])
def test_trailing_columns_without_items_change_nothing(columns, seed):
    torch.manual_seed(seed)
    q, window, window_slots, entries, entry_slots, sink = example(4, 4, 64, 20, 1)
    one = sparse_attention(q, window, window_slots, entries, entry_slots, sink, scale=0.125)
    trailing = torch.full((4, columns), -1)
    padded = sparse_attention(
        q,
        window,
        torch.cat((window_slots, trailing), 1),
        entries,
        torch.cat((entry_slots, trailing), 1),
        sink,
        scale=0.125,
    )
    assert torch.equal(padded, one)


def test_columns_another_token_uses_change_nothing(seed):
    """J of a call is that of its longest token; a token with 1 entry beside one with 640 keeps its bits."""
    torch.manual_seed(seed)
    q, window, window_slots, entries, entry_slots, sink = example(2, 4, 64, 20, 1)
    long = torch.randint(0, 80, (1, 640))
    both = torch.cat((torch.nn.functional.pad(entry_slots[:1], (0, 639), value=-1), long))
    together = sparse_attention(q, window, window_slots, entries, both, sink, scale=0.125)
    alone = sparse_attention(q[:1], window, window_slots[:1], entries, entry_slots[:1], sink, scale=0.125)
    assert torch.equal(together[:1], alone)


@pytest.mark.parametrize("page", [1, 7, 64])
@pytest.mark.parametrize("row_format, width", [(RowFormat.FP8_ROPE_BF16, 128), (RowFormat.BF16, 16)])
def test_pages_change_nothing(page, row_format, width, seed):
    """Page size, order of pages, space between pages, and what else is in the pool."""
    torch.manual_seed(seed)
    rows = torch.randn(100, width)
    q, sink = torch.randn(3, 4, width), torch.randn(4)
    slots = torch.rand(3, 100).argsort(1)[:, :70]
    plain = pool_of(rows, row_format)
    expected = sparse_attention(q, plain, slots, plain, slots[:, :9], sink, scale=0.1)
    num_blocks = -(-100 // page) + 3
    stride = CachePool.allocate(1, page, row_format, width).block_stride_bytes + 144
    pool = CachePool.allocate(num_blocks, page, row_format, width, block_stride_bytes=stride)
    pool.storage.fill_(0xFF)
    order = torch.randperm(num_blocks)
    place = order[torch.arange(100) // page] * page + torch.arange(100) % page
    write_cache(rows, pool, place)
    moved = place[slots]
    assert torch.equal(sparse_attention(q, pool, moved, pool, moved[:, :9], sink, scale=0.1), expected)


@pytest.mark.parametrize("shape", [(1, 4, 512, 100, 64), (1, 12, 384, 20, 0), (40, 4, 64, 70, 30)], ids=str)
def test_threads_change_nothing(shape, seed):
    torch.manual_seed(seed)
    arguments, before, results = example(*shape), torch.get_num_threads(), []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        results.append(sparse_attention(*arguments, scale=0.125))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_items_in_another_order_agree_to_rounding(seed):
    """Not bit-identical, since columns are added in order; the bound is the rounding of 70 terms."""
    torch.manual_seed(seed)
    q, window, window_slots, entries, entry_slots, sink = example(6, 4, 64, 70, 30)
    y = sparse_attention(q, window, window_slots, entries, entry_slots, sink, scale=0.125)
    shuffled = sparse_attention(
        q, window, window_slots[:, torch.randperm(70)], entries, entry_slots[:, torch.randperm(30)], sink, scale=0.125
    )
    torch.testing.assert_close(shuffled, y, rtol=1e-5, atol=1e-6)


def test_window_and_entries_are_one_softmax(seed):
    """Moving rows from one pool to the other is only a move of columns."""
    torch.manual_seed(seed)
    rows, q, sink = torch.randn(12, 16), torch.randn(2, 3, 16), torch.randn(3)
    pool, all_slots = pool_of(rows), torch.arange(12).expand(2, 12)
    whole = sparse_attention(q, pool, all_slots, None, None, sink, scale=0.25)
    split = sparse_attention(q, pool, all_slots[:, :5], pool, all_slots[:, 5:], sink, scale=0.25)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)


def test_the_output_is_rounded_once(seed):
    torch.manual_seed(seed)
    arguments = example(4, 4, 64, 20, 10)
    exact = sparse_attention(*arguments, scale=0.125)
    assert exact.dtype == torch.float32
    assert torch.equal(sparse_attention(*arguments, scale=0.125, out_dtype=torch.bfloat16), exact.bfloat16())
    q = arguments[0].bfloat16()
    widened = sparse_attention(q.float(), *arguments[1:], scale=0.125)
    assert torch.equal(sparse_attention(q, *arguments[1:], scale=0.125), widened.bfloat16())


def test_nan_outside_the_items_stays_outside():
    """Rows that are not named hold NaN bytes (see pool_of), and a query of NaN spoils its own token only."""
    q = torch.ones(2, 1, 2)
    q[1] = torch.nan
    slots = torch.tensor([[0, -1], [0, -1]])
    y = hand_made(q=q, window_slots=slots, entry_slots=slots)
    assert bool(y[0].isfinite().all()) and bool(y[1].isnan().all())


def test_empty():
    no_token = torch.empty(0, 3, dtype=torch.int64)
    assert hand_made(q=torch.empty(0, 1, 2), window_slots=no_token, entry_slots=no_token).shape == (0, 1, 2)
    no_column = torch.empty(1, 0, dtype=torch.int64)
    assert hand_made(window_slots=no_column, entry_slots=no_column).tolist() == [[[0.0, 0.0]]]
    assert hand_made(window_slots=no_column, entries=None, entry_slots=None).tolist() == [[[0.0, 0.0]]]
    assert hand_made(q=torch.empty(1, 0, 2), sink=torch.empty(0)).shape == (1, 0, 2)


# --- faults ---


def check_many_columns(num_columns):
    """Every row of a long table is found: a one-hot value per row gives back its softmax weight."""
    rows = torch.eye(num_columns)
    pool, slots = pool_of(rows, page=16), torch.arange(num_columns)[None]
    q = torch.linspace(-1, 1, num_columns)[None, None]
    y = sparse_attention(q, pool, slots, None, None, torch.tensor([-INF]), scale=1.0)
    torch.testing.assert_close(y[0, 0], q[0, 0].softmax(-1), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("num_columns", [1, 63, 64, 65, 256])
def test_every_column_is_read(num_columns):
    check_many_columns(num_columns)


def test_a_loop_that_always_loads_tile_0_is_caught(monkeypatch):
    """Fault F9: passes with one block of columns, wrong with two."""
    right = MODULE._attend

    def first_tile(q, rows, is_item, sink, scale):
        rows = rows[:, : MODULE.COLUMN_BLOCK].repeat(1, rows.shape[1] // MODULE.COLUMN_BLOCK, 1)
        return right(q, rows, is_item, sink, scale)

    monkeypatch.setattr(MODULE, "_attend", first_tile)
    check_many_columns(64)
    with pytest.raises(AssertionError):
        check_many_columns(65)


# --- refusals ---


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.zeros(1, 1, 2, dtype=torch.float16)}, TypeError, "q must be bfloat16 or float32"),
        ({"q": torch.zeros(1, 1, 3)}, ValueError, "window must hold rows of width C = 3"),
        ({"q": torch.zeros(2, 1, 2)}, ValueError, "window_slots must be"),
        ({"window": torch.zeros(1, 2)}, TypeError, "window must be a CachePool"),
        ({"window_slots": torch.tensor([[8]])}, ValueError, "window_slots must be -1 or in 0 .. 7; got 8"),
        ({"window_slots": torch.tensor([[-2]])}, ValueError, "got -2"),
        ({"window_slots": torch.tensor([[0]], dtype=torch.int32)}, TypeError, "window_slots must be int64"),
        ({"entry_slots": torch.tensor([[99]])}, ValueError, "entry_slots must be -1 or in 0 .. 7; got 99"),
        ({"entry_slots": torch.tensor([[0], [0]])}, ValueError, "entry_slots must be"),
        ({"entry_slots": None}, ValueError, "go together"),
        ({"entries": None}, ValueError, "go together"),
        ({"entries": torch.zeros(1, 2)}, TypeError, "entries must be a CachePool"),
        ({"entries": CachePool.allocate(1, 8, RowFormat.FP32, 4)}, ValueError, "entries must hold rows of width C = 2"),
        ({"sink": torch.zeros(2)}, ValueError, "sink must be"),
        ({"sink": torch.zeros(1).bfloat16()}, TypeError, "sink must be float32"),
        ({"out_dtype": torch.float64}, ValueError, "out_dtype must be"),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        hand_made(**change)
