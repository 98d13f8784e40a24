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
from megamoe.verify.tolerance import assert_within

MODULE = sys.modules[sparse_attention.__module__]
INF = math.inf
OPERANDS = pytest.mark.parametrize("operand_dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


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

    def wrong(q, rows, is_item, sink, scale, operand_dtype):
        if fault == "scaled with the logits":  # softmax(scale * [q . row, sink])
            sink = sink * scale
        elif fault == "beside unscaled logits":  # softmax([q . row, sink])
            scale = 1.0
        else:  # softmax(scale * (q . row) + sink), which cancels
            sink = torch.full_like(sink, -INF)
        return right(q, rows, is_item, sink, scale, operand_dtype)

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


def test_fp16_weights_are_rounded_and_their_sum_is_not():
    """A weight of 1 + 1.5 * 2^-11 becomes 1 + 2^-10 above the line; below it stands as it was. A sink adds itself."""
    weight = 1 + 1.5 * 2.0**-11
    change = {
        "q": torch.tensor([[[2 * math.log(weight), 0.0]]]),  # scale is 0.5
        "operand_dtype": torch.float16,
        "entries": None,
        "entry_slots": None,
    }
    for sink, sunk in ((-INF, 0.0), (math.log(2.0), 2.0)):
        y = hand_made(**change, sink=torch.tensor([sink]))
        torch.testing.assert_close(y[0, 0, 0], torch.tensor((1 + 2.0**-10) / (weight + sunk)), rtol=1e-6, atol=0)


def test_fp16_queries_are_rounded_before_the_scores():
    """q = 1 + 2^-12 is 1 in fp16: both logits are 4096 and the weights equal; in fp32 they are e : 1."""
    change = {"q": torch.tensor([[[1 + 2.0**-12, 1.0]]]), "scale": 4096.0, "sink": torch.tensor([-INF])}
    pools = {"window": pool_of(torch.eye(2)), "window_slots": torch.tensor([[0, 1]])}
    pools |= {"entries": None, "entry_slots": None}
    y = hand_made(**change, **pools, operand_dtype=torch.float16)
    torch.testing.assert_close(y, torch.tensor([[[0.5, 0.5]]]), rtol=1e-3, atol=0)
    y = hand_made(**change, **pools)
    torch.testing.assert_close(y, torch.tensor([[[math.e, 1.0]]]) / (1 + math.e), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sink", [-INF, 0.0, 70.0, 200.0, INF])
def test_fp16_edges(sink):
    """No item, and sinks near and far above every logit."""
    none = torch.tensor([[-1, -1]])
    sinks = {"sink": torch.tensor([sink]), "operand_dtype": torch.float16}
    assert hand_made(window_slots=none, entry_slots=none, **sinks).tolist() == [[[0.0, 0.0]]]
    y = hand_made(q=torch.zeros(1, 1, 2), **sinks)  # two weights of 1: (1, 0) and (0, 6)
    total = 2.0 + (math.exp(sink) if sink < 80 else INF)
    torch.testing.assert_close(y, torch.tensor([[[1.0 / total, 6.0 / total]]]), rtol=1e-5, atol=0)


def test_fp16_logits_of_any_size():
    """Weights stay below 2^16, however large the logits are."""
    pools = {"window": pool_of(torch.tensor([[1.0, 0.0]])), "entries": pool_of(torch.tensor([[-1.0, 2.0]]))}
    for logit in (-1e5, -1e4, -0.6931472, -1e-3, 0.0, 1e-3, 0.6931472, 0.6931473, 1e4, 1e5):
        big = {"q": torch.tensor([[[1.0 if logit >= 0 else -1.0, 0.0]]]), "scale": abs(logit)}
        y = hand_made(**big, **pools, sink=torch.tensor([-INF]), operand_dtype=torch.float16)
        weight = 1.0 / (1.0 + math.exp(-2.0 * abs(logit)))
        winner, other = (torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 2.0]))[:: 1 if logit >= 0 else -1]
        torch.testing.assert_close(y[0, 0], weight * winner + (1 - weight) * other, rtol=5e-4, atol=5e-4)


def test_a_query_beyond_fp16_is_nan_in_its_head():
    q = torch.tensor([[[65536.0, 0.0], [1.0, 0.0]]])
    y = hand_made(q=q, sink=torch.zeros(2), operand_dtype=torch.float16)
    assert bool(y[0, 0].isnan().all()) and bool(y[0, 1].isfinite().all())


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
@OPERANDS
def test_a_token_does_not_depend_on_the_others(operand_dtype, row_format, width, num_heads, seed):
    torch.manual_seed(seed)
    q, window, window_slots, entries, entry_slots, sink = example(40, num_heads, width, 70, 30, row_format)
    entry_slots[::3] = -1
    q = q.bfloat16()

    def attend(part):
        slots = window_slots[part], entry_slots[part]
        return sparse_attention(
            q[part], window, slots[0], entries, slots[1], sink, scale=width**-0.5, operand_dtype=operand_dtype
        )

    whole = attend(slice(None))
    assert whole.dtype == torch.bfloat16
    for t in range(0, 40, 3):
        assert torch.equal(attend(slice(t, t + 1))[0], whole[t])
    assert torch.equal(attend(slice(5, 22)), whole[5:22])


@pytest.mark.parametrize("num_tokens", [1, 5])
@OPERANDS
def test_a_head_does_not_depend_on_the_others(operand_dtype, num_tokens, seed):
    """Heads as tensor parallelism cuts them: 128 on one rank, or any share of them, first, last or between."""
    torch.manual_seed(seed)
    q, window, window_slots, entries, entry_slots, sink = example(num_tokens, 128, 512, 70, 30, RowFormat.FP8_ROPE_BF16)

    def attend(heads):
        arguments = window, window_slots, entries, entry_slots, sink[heads].contiguous()
        return sparse_attention(q[:, heads].contiguous(), *arguments, scale=512**-0.5, operand_dtype=operand_dtype)

    whole = attend(slice(None))
    for count in (1, 2, 3, 8, 16, 64):
        for first in (0, count, 128 - count):
            part = slice(first, first + count)
            assert torch.equal(attend(part), whole[:, part])


@pytest.mark.parametrize("bound", [1, 200_000, 2**22])
def test_groups_of_bounded_memory_change_nothing(bound, monkeypatch, seed):
    torch.manual_seed(seed)
    arguments = example(60, 4, 64, 70, 30)
    whole = sparse_attention(*arguments, scale=0.125)
    monkeypatch.setattr(MODULE, "GROUP_BYTES", bound)
    assert torch.equal(sparse_attention(*arguments, scale=0.125), whole)


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 640])
@pytest.mark.parametrize("num_rows", [20, 70])
@OPERANDS
def test_trailing_columns_without_items_change_nothing(operand_dtype, num_rows, columns, seed):
    """Neither after the window, where entries must keep their tiles, nor after the entries."""
    torch.manual_seed(seed)
    q, window, window_slots, entries, entry_slots, sink = example(4, 4, 64, num_rows, 1)
    settings = {"scale": 0.125, "operand_dtype": operand_dtype}
    one = sparse_attention(q, window, window_slots, entries, entry_slots, sink, **settings)
    trailing = torch.full((4, columns), -1)
    padded = sparse_attention(
        q,
        window,
        torch.cat((window_slots, trailing), 1),
        entries,
        torch.cat((entry_slots, trailing), 1),
        sink,
        **settings,
    )
    assert torch.equal(padded, one)


@OPERANDS
def test_columns_another_token_uses_change_nothing(operand_dtype, seed):
    """J of a call is that of its longest token; a token with 1 entry beside one with 640 keeps its bits."""
    torch.manual_seed(seed)
    q, window, window_slots, entries, entry_slots, sink = example(2, 4, 64, 20, 1)
    long = torch.randint(0, 80, (1, 640))
    both = torch.cat((torch.nn.functional.pad(entry_slots[:1], (0, 639), value=-1), long))
    settings = {"scale": 0.125, "operand_dtype": operand_dtype}
    together = sparse_attention(q, window, window_slots, entries, both, sink, **settings)
    alone = sparse_attention(q[:1], window, window_slots[:1], entries, entry_slots[:1], sink, **settings)
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
@OPERANDS
def test_threads_change_nothing(operand_dtype, shape, seed):
    torch.manual_seed(seed)
    arguments, before, results = example(*shape), torch.get_num_threads(), []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        results.append(sparse_attention(*arguments, scale=0.125, operand_dtype=operand_dtype))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def in_tiles(q, rows, sink, scale, num_splits, power_of_two=True):
    """What a kernel does: maxima of the tiles seen so far, log2 e inside the scale, splits over keys and a combine."""
    q, scale, columns = q.half().float(), torch.tensor(scale / math.log(2.0)), range(0, rows.shape[0], 64)
    per_split = -(-len(columns) // num_splits)
    parts = []
    for first in range(0, len(columns), per_split):
        top, total, y = torch.full((q.shape[0], 1), -INF), torch.zeros(q.shape[0], 1), torch.zeros_like(q)
        for column in columns[first : first + per_split]:
            tile = rows[column : column + 64]
            logits = sum(q[:, k::4] @ tile[:, k::4].T for k in range(4)) * scale  # another order of the sum
            best = logits.amax(1, keepdim=True)
            before, top = top, torch.maximum(top, best.ceil() if power_of_two else best)
            weights = torch.exp2(logits - top + 15)
            total = total * torch.exp2(before - top) + weights.sum(1, keepdim=True)
            y = y * torch.exp2(before - top) + weights.half().float() @ tile
        parts.append((top, total, y))
    top = torch.stack([part[0] for part in parts]).amax(0)
    total, y = torch.exp2(sink[:, None] / math.log(2.0) - top + 15), torch.zeros_like(q)
    for one_top, one_total, one_y in parts:
        total, y = total + one_total * torch.exp2(one_top - top), y + one_y * torch.exp2(one_top - top)
    return y / total


@pytest.mark.parametrize("num_splits", [1, 2, 3, 10])
def test_fp16_weights_do_not_depend_on_splits_or_the_maximum_of_a_tile(num_splits, seed):
    """Nearly all weights round alike in any split; with the largest logit instead of a power of two, nearly none."""
    torch.manual_seed(seed)
    pool = pool_of(torch.randn(640, 512), RowFormat.FP8_ROPE_BF16, page=64)
    slots, sink, q = torch.arange(640), torch.randn(32), 2.0 * torch.randn(1, 32, 512).bfloat16()
    arguments = (pool, slots[None], None, None, sink)
    want = sparse_attention(q.float(), *arguments, scale=512**-0.5, operand_dtype=torch.float16)[0]

    def distance(power_of_two):
        got = in_tiles(q[0].float(), read_cache(pool, slots), sink, 512**-0.5, num_splits, power_of_two)
        assert_within("sparse_attention", got, want)
        return float((got - want).norm() / want.norm())

    assert distance(True) < 5e-5 < 1.5e-4 < distance(False)


@pytest.mark.parametrize("shape", [(3, 4, 16, 8, 5), (2, 64, 16, 63, 64), (1, 4, 512, 100, 64)], ids=str)
def test_fp16_operands_stay_near_the_definition(shape, seed):
    """Half a step of fp16, 2^-11, in every weight; the queries are fp16 numbers here."""
    torch.manual_seed(seed)
    q, *arguments = example(*shape)
    q = q.half().float()
    y = sparse_attention(q, *arguments, scale=shape[2] ** -0.5, operand_dtype=torch.float16)
    want = in_fp64(q, *arguments, shape[2] ** -0.5)
    error = (y.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert 1e-6 < float(error.max()) < 2.0**-10


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

    def first_tile(q, rows, *others):
        rows = rows[:, : MODULE.COLUMN_BLOCK].repeat(1, rows.shape[1] // MODULE.COLUMN_BLOCK, 1)
        return right(q, rows, *others)

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
        ({"operand_dtype": torch.bfloat16}, ValueError, "operand_dtype must be float16 or float32; got bfloat16"),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        hand_made(**change)
