# SPDX-License-Identifier: Apache-2.0
"""sparse_attention: one softmax over window rows and compressed entries, with a sink, rotated back.

Rows are found by position, which is tested beside the door. What is computed from them is tested where slots are given:
`attend_slots`.
"""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest
import torch

from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.ops.plan_slots import RowTables
from megamoe.ops.read_cache import read_cache
from megamoe.ops.rope import RopeTable, rope, rope_table
from megamoe.ops.sparse_attention import attend_slots, sparse_attention
from megamoe.ops.write_cache import write_cache
from megamoe.verify.tolerance import assert_within

from .steps import Run, slot_of, step_of, tables_of

MODULE = sys.modules[sparse_attention.__module__]
INF = math.inf
OPERANDS = pytest.mark.parametrize("operand_dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def pool_of(rows: torch.Tensor, row_format: RowFormat = RowFormat.FP32, page: int = 8) -> CachePool:
    """A pool whose slot i holds row i; rows after the last one are NaN bytes."""
    pool = CachePool.allocate(max(-(-rows.shape[0] // page), 1), page, row_format, rows.shape[1])
    pool.storage.fill_(0xFF)
    write_cache(rows, pool, torch.arange(rows.shape[0]))
    return pool


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def attend(q, window, window_slots, entries, entry_slots, sink, *, scale, out_dtype=None, operand_dtype=torch.float32):
    """What is computed from slots, before it is rotated."""
    columns = [[(window, window_slots)]]
    if entries is not None:
        columns.append([(entries, entry_slots)])
    return attend_slots(q, columns, sink, scale, q.dtype if out_dtype is None else out_dtype, operand_dtype)


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
    """Two items with logits 2 ln 3 = 0.5 * (4 ln 3) and 0, and a sink of weight 2: weights 9, 1, 2 of 12.

    The row is that of position 0 and so is the token, which rotates nothing.
    """
    arguments = {
        "q": torch.tensor([[[4 * math.log(3.0), 0.0]]]),
        "window": pool_of(torch.tensor([[1.0, 0.0]])),
        "entries": pool_of(torch.tensor([[0.0, 6.0]])),
        "sink": torch.tensor([math.log(2.0)]),
        "positions": torch.tensor([0]),
        "requests": int32(0),
        "first_idx": int32(0),
        "window_size": 1,
        "window_tables": int32([0]),
        "step": None,
        "entry_tables": int32([0]),
        "entry_idx": None,
        "num_visible": int32(1),
        "table": RopeTable(torch.tensor([1.0])),
        "scale": 0.5,
    }
    return sparse_attention(**{**arguments, **change})


def from_slots(**change):
    """The same from slots, without positions."""
    arguments = {
        "q": torch.tensor([[[4 * math.log(3.0), 0.0]]]),
        "window": pool_of(torch.tensor([[1.0, 0.0]])),
        "window_slots": torch.tensor([[0]]),
        "entries": pool_of(torch.tensor([[0.0, 6.0]])),
        "entry_slots": torch.tensor([[0]]),
        "sink": torch.tensor([math.log(2.0)]),
        "scale": 0.5,
    }
    return attend(**{**arguments, **change})


NO_ENTRIES = {"entries": None, "entry_tables": None, "num_visible": None}
NO_ITEM = {"num_visible": int32(0), "window_size": 0}


def tokens_of(num_tokens):
    """Tokens of position 0, each of a request of its own, all of which have one ring and one page."""
    none = torch.zeros(num_tokens, dtype=torch.int32)
    return {
        "positions": torch.zeros(num_tokens, dtype=torch.int64),
        "requests": torch.arange(num_tokens, dtype=torch.int32),
        "first_idx": torch.arange(num_tokens, dtype=torch.int32),
        "window_tables": none[:, None],
        "entry_tables": none[:, None],
        "num_visible": none + 1,
    }


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
    y = hand_made(**NO_ENTRIES, sink=torch.tensor([-INF]), window=pool_of(torch.tensor([[-3.0, 0.25]])))
    assert y.tolist() == [[[-3.0, 0.25]]]


def test_the_output_is_rotated_back():
    """One item at position 3, a quarter turn a position: three quarters back are one quarter forth."""
    row = torch.tensor([[7.0, 1.0, 0.0]])
    y = hand_made(
        **NO_ENTRIES,
        q=torch.zeros(1, 1, 3),
        sink=torch.tensor([-INF]),
        window=pool_of(row.expand(8, 3)),
        positions=torch.tensor([3]),
        table=RopeTable(torch.tensor([math.pi / 2])),
    )
    torch.testing.assert_close(y, torch.tensor([[[7.0, 0.0, 1.0]]]))


def test_an_entry_named_twice_counts_twice():
    """Logits 0 for all rows: one of (1, 0) and two of (0, 6), a sink of weight 1."""
    y = hand_made(q=torch.zeros(1, 1, 2), entry_idx=int32([0, -1, 0]), sink=torch.zeros(1))
    torch.testing.assert_close(y, torch.tensor([[[0.25, 3.0]]]))


def test_a_slot_named_twice_counts_twice():
    """Logits 0 for all rows: two of (1, 0) and one of (0, 6), a sink of weight 1."""
    window, entries = pool_of(torch.tensor([[1.0, 0.0]])), pool_of(torch.tensor([[0.0, 6.0]]))
    slots, one = torch.tensor([[0, -1, 0]]), torch.tensor([[0]])
    y = attend(torch.zeros(1, 1, 2), window, slots, entries, one, torch.zeros(1), scale=0.5)
    torch.testing.assert_close(y, torch.tensor([[[0.5, 1.5]]]))


@pytest.mark.parametrize("sink", [-INF, -1e30, -200.0, 0.0, 200.0, 1e30, INF])
def test_no_item_is_zero(sink):
    """For the only token of a call, for one beside a token that has items, and for nobody's."""
    y = hand_made(**NO_ITEM, sink=torch.tensor([sink]))
    assert y.tolist() == [[[0.0, 0.0]]] and not bool(y.signbit().any())
    several = {**tokens_of(3), "requests": int32(0, 1, -1), "positions": torch.tensor([0, 0, -1])}
    several["window_tables"] = several["entry_tables"] = int32([-1], [0])
    y = hand_made(
        **{**several, "num_visible": int32(0, 1, 0)},
        q=torch.ones(3, 1, 2),
        sink=torch.tensor([sink]),
        window_ends=torch.tensor([-1, 0, -1]),
    )
    assert y[0].tolist() == y[2].tolist() == [[0.0, 0.0]] and not bool(y[::2].signbit().any())
    assert bool(y[1].isfinite().all())


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
        y = from_slots(**change, sink=torch.tensor([sink]))
        torch.testing.assert_close(y[0, 0, 0], torch.tensor((1 + 2.0**-10) / (weight + sunk)), rtol=1e-6, atol=0)


def test_fp16_queries_are_rounded_before_the_scores():
    """q = 1 + 2^-12 is 1 in fp16: both logits are 4096 and the weights equal; in fp32 they are e : 1."""
    change = {"q": torch.tensor([[[1 + 2.0**-12, 1.0]]]), "scale": 4096.0, "sink": torch.tensor([-INF])}
    pools = {"window": pool_of(torch.eye(2)), "window_slots": torch.tensor([[0, 1]])}
    pools |= {"entries": None, "entry_slots": None}
    y = from_slots(**change, **pools, operand_dtype=torch.float16)
    torch.testing.assert_close(y, torch.tensor([[[0.5, 0.5]]]), rtol=1e-3, atol=0)
    y = from_slots(**change, **pools)
    torch.testing.assert_close(y, torch.tensor([[[math.e, 1.0]]]) / (1 + math.e), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sink", [-INF, 0.0, 70.0, 200.0, INF])
def test_fp16_edges(sink):
    """No item, and sinks near and far above every logit."""
    none = torch.tensor([[-1, -1]])
    sinks = {"sink": torch.tensor([sink]), "operand_dtype": torch.float16}
    assert from_slots(window_slots=none, entry_slots=none, **sinks).tolist() == [[[0.0, 0.0]]]
    y = from_slots(q=torch.zeros(1, 1, 2), **sinks)  # two weights of 1: (1, 0) and (0, 6)
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
    y = attend(*arguments, scale=shape[2] ** -0.5)
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

    def some(part):
        slots, compressed = window_slots[part], entry_slots[part]
        settings = {"scale": width**-0.5, "operand_dtype": operand_dtype}
        return attend(q[part], window, slots, entries, compressed, sink, **settings)

    whole = some(slice(None))
    assert whole.dtype == torch.bfloat16
    for t in range(0, 40, 3):
        assert torch.equal(some(slice(t, t + 1))[0], whole[t])
    assert torch.equal(some(slice(5, 22)), whole[5:22])


@pytest.mark.parametrize("num_tokens", [1, 5])
@OPERANDS
def test_a_head_does_not_depend_on_the_others(operand_dtype, num_tokens, seed):
    """Heads as tensor parallelism cuts them: 128 on one rank, or any share of them, first, last or between."""
    torch.manual_seed(seed)
    q, window, window_slots, entries, entry_slots, sink = example(num_tokens, 128, 512, 70, 30, RowFormat.FP8_ROPE_BF16)

    def of_heads(heads):
        arguments = window, window_slots, entries, entry_slots, sink[heads].contiguous()
        return attend(q[:, heads].contiguous(), *arguments, scale=512**-0.5, operand_dtype=operand_dtype)

    whole = of_heads(slice(None))
    for count in (1, 2, 3, 8, 16, 64):
        for first in (0, count, 128 - count):
            part = slice(first, first + count)
            assert torch.equal(of_heads(part), whole[:, part])


@pytest.mark.parametrize("bound", [1, 200_000, 2**22])
def test_groups_of_bounded_memory_change_nothing(bound, monkeypatch, seed):
    torch.manual_seed(seed)
    arguments = example(60, 4, 64, 70, 30)
    whole = attend(*arguments, scale=0.125)
    monkeypatch.setattr(MODULE, "GROUP_BYTES", bound)
    assert torch.equal(attend(*arguments, scale=0.125), whole)


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 640])
@pytest.mark.parametrize("num_rows", [20, 70])
@OPERANDS
def test_trailing_columns_without_items_change_nothing(operand_dtype, num_rows, columns, seed):
    """Neither after the window, where entries must keep their tiles, nor after the entries."""
    torch.manual_seed(seed)
    q, window, window_slots, entries, entry_slots, sink = example(4, 4, 64, num_rows, 1)
    settings = {"scale": 0.125, "operand_dtype": operand_dtype}
    one = attend(q, window, window_slots, entries, entry_slots, sink, **settings)
    trailing = torch.full((4, columns), -1)
    padded = attend(
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
    together = attend(q, window, window_slots, entries, both, sink, **settings)
    alone = attend(q[:1], window, window_slots[:1], entries, entry_slots[:1], sink, **settings)
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
    expected = attend(q, plain, slots, plain, slots[:, :9], sink, scale=0.1)
    num_blocks = -(-100 // page) + 3
    stride = CachePool.allocate(1, page, row_format, width).block_stride_bytes + 144
    pool = CachePool.allocate(num_blocks, page, row_format, width, block_stride_bytes=stride)
    pool.storage.fill_(0xFF)
    order = torch.randperm(num_blocks)
    place = order[torch.arange(100) // page] * page + torch.arange(100) % page
    write_cache(rows, pool, place)
    moved = place[slots]
    assert torch.equal(attend(q, pool, moved, pool, moved[:, :9], sink, scale=0.1), expected)


@pytest.mark.parametrize("shape", [(1, 4, 512, 100, 64), (1, 12, 384, 20, 0), (40, 4, 64, 70, 30)], ids=str)
@OPERANDS
def test_threads_change_nothing(operand_dtype, shape, seed):
    torch.manual_seed(seed)
    arguments, before, results = example(*shape), torch.get_num_threads(), []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        results.append(attend(*arguments, scale=0.125, operand_dtype=operand_dtype))
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
    want = attend(q.float(), *arguments, scale=512**-0.5, operand_dtype=torch.float16)[0]

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
    y = attend(q, *arguments, scale=shape[2] ** -0.5, operand_dtype=torch.float16)
    want = in_fp64(q, *arguments, shape[2] ** -0.5)
    error = (y.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert 1e-6 < float(error.max()) < 2.0**-10


def test_items_in_another_order_agree_to_rounding(seed):
    """Not bit-identical, since columns are added in order; the bound is the rounding of 70 terms."""
    torch.manual_seed(seed)
    q, window, window_slots, entries, entry_slots, sink = example(6, 4, 64, 70, 30)
    y = attend(q, window, window_slots, entries, entry_slots, sink, scale=0.125)
    shuffled = attend(
        q, window, window_slots[:, torch.randperm(70)], entries, entry_slots[:, torch.randperm(30)], sink, scale=0.125
    )
    torch.testing.assert_close(shuffled, y, rtol=1e-5, atol=1e-6)


def test_window_and_entries_are_one_softmax(seed):
    """Moving rows from one pool to the other is only a move of columns."""
    torch.manual_seed(seed)
    rows, q, sink = torch.randn(12, 16), torch.randn(2, 3, 16), torch.randn(3)
    pool, all_slots = pool_of(rows), torch.arange(12).expand(2, 12)
    whole = attend(q, pool, all_slots, None, None, sink, scale=0.25)
    split = attend(q, pool, all_slots[:, :5], pool, all_slots[:, 5:], sink, scale=0.25)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)


def test_the_output_is_rounded_once(seed):
    torch.manual_seed(seed)
    arguments = example(4, 4, 64, 20, 10)
    exact = attend(*arguments, scale=0.125)
    assert exact.dtype == torch.float32
    assert torch.equal(attend(*arguments, scale=0.125, out_dtype=torch.bfloat16), exact.bfloat16())
    q = arguments[0].bfloat16()
    widened = attend(q.float(), *arguments[1:], scale=0.125)
    assert torch.equal(attend(q, *arguments[1:], scale=0.125), widened.bfloat16())


# --- properties of the addresses ---

BOTH_FORMATS = pytest.mark.parametrize("row_format, width", [(RowFormat.FP8_ROPE_BF16, 128), (RowFormat.FP32, 20)])
LONGEST, WINDOW, HEADS = 40, 6, 3


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The window rows and the entries of three requests, by position and by number."""

    window: torch.Tensor
    entries: torch.Tensor
    row_format: RowFormat

    @classmethod
    def random(cls, width: int, row_format: RowFormat) -> Rows:
        return cls(torch.randn(3, LONGEST, width), torch.randn(3, LONGEST, width), row_format)

    def pool(self, rows: torch.Tensor, tables: RowTables, runs: list[tuple[int, int, int]]) -> CachePool:
        """A pool that holds rows `first` to `last` - 1 of requests; the rest are NaN bytes."""
        num_blocks = int(tables.block_tables.max()) + 2
        pool = CachePool.allocate(num_blocks, tables.rows_per_block, self.row_format, rows.shape[2])
        pool.storage.fill_(0xFF)
        for request, first, last in runs:
            numbers = range(max(first, last - tables.capacity, 0), last)
            slots = torch.tensor([slot_of(tables, request, row) for row in numbers], dtype=torch.int64)
            write_cache(rows[request, numbers.start : numbers.stop], pool, slots)
        return pool


def addressed(rows: Rows, runs: list[Run], window: RowTables, entries: RowTables, in_step: bool, chosen, visible, rest):
    """sparse_attention of a step: rows are where a step in the rings or in the step area has put them."""
    step = step_of(*runs)
    ring = rows.pool(rows.window, window, [(r, 0, p if in_step else p + n) for r, p, n in runs if r >= 0])
    area = None
    if in_step:
        num_tokens = step.positions.shape[0]
        area = CachePool.allocate(1, max(num_tokens, 1), rows.row_format, rows.window.shape[2])
        area.storage.fill_(0xFF)
        token = torch.arange(num_tokens).masked_fill(step.positions < 0, -1)
        write_cache(rows.window[step.requests.long(), step.positions], area, token)
    pages = rows.pool(rows.entries, entries, [(request, 0, LONGEST) for request in range(3)])
    return sparse_attention(
        q=rest["q"],
        window=ring,
        entries=pages,
        sink=rest["sink"],
        **step.addresses,
        window_size=WINDOW,
        window_tables=window.block_tables,
        step=area,
        entry_tables=entries.block_tables,
        entry_idx=chosen,
        num_visible=visible,
        table=rest["table"],
        scale=0.2,
    )


def scene(width: int, row_format: RowFormat, runs: list[Run]):
    num_tokens = sum(count for _, _, count in runs)
    rows = Rows.random(width, row_format)
    visible = torch.randint(0, LONGEST, (num_tokens,), dtype=torch.int32)
    numbers = torch.arange(9)
    chosen = torch.rand(num_tokens, LONGEST).argsort(1)[:, :9].to(torch.int32)
    chosen = torch.where(numbers < visible[:, None], chosen, -1).to(torch.int32)
    rest = {"q": torch.randn(num_tokens, HEADS, width), "sink": torch.randn(HEADS), "table": rope_table(8, 1e4)}
    return rows, visible, chosen, rest


RUNS: list[Run] = [(2, 5, 7), (-1, 0, 2), (0, 0, 3), (1, 30, 9), (-1, 0, 3)]
RING = 6 + 9
PAGES = (8, 5)


@BOTH_FORMATS
@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("all_visible", [False, True])
def test_addresses_equal_the_rows_themselves(row_format, width, in_step, all_visible, seed):
    """Every token attends to the rows of its own positions and entries, in that order of columns, bit for bit."""
    torch.manual_seed(seed)
    rows, visible, chosen, rest = scene(width, row_format, RUNS)
    window, pages = tables_of(3, 1, RING, spare=1), tables_of(3, *PAGES, spare=1)
    got = addressed(rows, RUNS, window, pages, in_step, None if all_visible else chosen, visible, rest)
    step, plain = step_of(*RUNS), [pool_of(one.flatten(0, 1), row_format) for one in (rows.window, rows.entries)]
    for t, (position, request) in enumerate(zip(step.positions.tolist(), step.requests.tolist(), strict=True)):
        if request < 0:
            assert not bool(got[t].any())
            continue
        behind = [position - back if back <= position else -1 for back in range(WINDOW - 1, -1, -1)]
        numbers = list(range(int(visible[t]))) if all_visible else chosen[t].tolist()
        slots = [
            torch.tensor([[request * LONGEST + one if one >= 0 else -1 for one in some]], dtype=torch.int64)
            for some in (behind, numbers)
        ]
        o = attend(rest["q"][t : t + 1], plain[0], slots[0], plain[1], slots[1], rest["sink"], scale=0.2)
        assert torch.equal(got[t : t + 1], rope(o, step.positions[t : t + 1], rest["table"], inverse=True)), t


@BOTH_FORMATS
@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("blocks, rows_per_block", [(1, RING + 3), (2, 8), (5, 3), (RING, 1), (10, 4)])
def test_layouts_change_nothing(row_format, width, in_step, blocks, rows_per_block, seed):
    """Rings of one block, of two, of many, and a window in pages as another engine keeps it: the same bits.

    A step in the step area needs no more than the window of earlier rows.
    """
    torch.manual_seed(seed)
    rows, visible, chosen, rest = scene(width, row_format, RUNS)
    ours = addressed(rows, RUNS, tables_of(3, 1, RING), tables_of(3, *PAGES), False, chosen, visible, rest)
    other = tables_of(3, blocks, rows_per_block, spare=2)
    assert torch.equal(addressed(rows, RUNS, other, tables_of(3, 3, 20), in_step, chosen, visible, rest), ours)
    if in_step:
        short = tables_of(3, 1, WINDOW - 1)
        assert torch.equal(addressed(rows, RUNS, short, tables_of(3, 40, 1), True, chosen, visible, rest), ours)


def check_step_area(seed):
    torch.manual_seed(seed)
    rows, visible, chosen, rest = scene(20, RowFormat.FP32, RUNS)
    given = rows, RUNS, tables_of(3, 1, RING), tables_of(3, *PAGES)
    in_rings = addressed(*given, False, chosen, visible, rest)
    assert torch.equal(addressed(*given, True, chosen, visible, rest), in_rings)


def test_the_step_area_gives_the_bits_of_the_rings(seed):
    check_step_area(seed)


@pytest.mark.parametrize("fault", ["first_idx ignored", "one row too many from the step", "step ignored"])
def test_faults_in_the_step_area_are_caught(fault, monkeypatch, seed):
    """Rows that the step has not written to the ring hold NaN there, which no comparison takes for a number."""
    right = MODULE.recent_slots

    def wrong(ends, num_rows, requests, block_tables, rows_per_block, first_idx, tokens=None):
        if first_idx is None:
            return right(ends, num_rows, requests, block_tables, rows_per_block, None)
        if fault == "step ignored":
            in_ring, _ = right(ends, num_rows, requests, block_tables, rows_per_block, None)
            return in_ring, torch.full_like(in_ring, -1)
        by = first_idx if fault == "first_idx ignored" else (first_idx > 0).to(torch.int32)
        return right(ends, num_rows, requests, block_tables, rows_per_block, first_idx - by)

    monkeypatch.setattr(MODULE, "recent_slots", wrong)
    with pytest.raises(AssertionError):
        check_step_area(seed)


@BOTH_FORMATS
@pytest.mark.parametrize("in_step", [False, True])
def test_nobody_changes_nobodys_bits(row_format, width, in_step, seed):
    """Tokens that are nobody's, between the others and after them, with huge numbers and NaN in their queries."""
    torch.manual_seed(seed)
    padded = [(-1, 0, 1), (2, 5, 7), (-1, 0, 2), (0, 0, 3), (1, 30, 9), (-1, 0, 4)]
    is_ours = step_of(*padded).requests >= 0
    rows, visible, chosen, rest = scene(width, row_format, padded)
    window, pages = tables_of(3, 1, RING), tables_of(3, *PAGES)
    runs = [run for run in padded if run[0] >= 0]
    for idx in (chosen, None):
        some = {**rest, "q": rest["q"][is_ours]}
        ours = addressed(
            rows, runs, window, pages, in_step, None if idx is None else idx[is_ours], visible[is_ours], some
        )
        for content in (torch.nan, 1e30, 0.0):
            q, numbers, entry_idx = rest["q"].clone(), visible.clone(), chosen.clone()
            q[~is_ours], numbers[~is_ours], entry_idx[~is_ours] = content, 39, 3
            given = None if idx is None else entry_idx
            got = addressed(rows, padded, window, pages, in_step, given, numbers, {**rest, "q": q})
            assert torch.equal(got[is_ours], ours) and not bool(got[~is_ours].any())


def test_a_window_may_end_elsewhere(seed):
    """Tokens of a draft block see the window of the last certain token, and rotate by their own positions."""
    torch.manual_seed(seed)
    width, tables = 20, int32([1], [0])
    window = pool_of(torch.randn(16, width))
    given = {
        **{**NO_ENTRIES, "q": torch.randn(2, HEADS, width), "window": window, "sink": torch.randn(HEADS)},
        **{"requests": int32(1, 1), "first_idx": int32(0, 1), "window_tables": tables, "window_size": 4},
        "table": rope_table(8, 1e4),
    }
    got = hand_made(**given, positions=torch.tensor([6, 7]), window_ends=torch.tensor([5, 5]))
    slots = torch.tensor([[2, 3, 4, 5]] * 2)
    o = attend(given["q"], window, slots, None, None, given["sink"], scale=0.5)
    assert torch.equal(got, rope(o, torch.tensor([6, 7]), given["table"], inverse=True))


def test_rounded_before_and_after_the_rotation(seed):
    torch.manual_seed(seed)
    q, window = torch.randn(1, HEADS, 20), pool_of(torch.randn(8, 20))
    given = {**NO_ENTRIES, "q": q, "window": window, "sink": torch.randn(HEADS), "window_size": 5}
    given |= {"positions": torch.tensor([7]), "table": rope_table(8, 1e4)}
    o = attend(q, window, torch.tensor([[3, 4, 5, 6, 7]]), None, None, given["sink"], scale=0.5)
    rounded = rope(o.bfloat16(), given["positions"], given["table"], inverse=True)
    assert torch.equal(hand_made(**given, out_dtype=torch.bfloat16), rounded)
    assert not torch.equal(rope(o, given["positions"], given["table"], inverse=True).bfloat16(), rounded)


def test_nan_outside_the_items_stays_outside():
    """Rows that are not named hold NaN bytes (see pool_of), and a query of NaN spoils its own token only."""
    q = torch.ones(2, 1, 2)
    q[1] = torch.nan
    y = hand_made(**tokens_of(2), q=q, entry_idx=int32([0, -1], [0, -1]))
    assert bool(y[0].isfinite().all()) and bool(y[1].isnan().all())


def test_empty():
    for idx in (None, torch.empty(0, 3, dtype=torch.int32)):
        for step in (None, CachePool.allocate(1, 1, RowFormat.FP32, 2)):
            assert hand_made(**tokens_of(0), q=torch.empty(0, 1, 2), entry_idx=idx, step=step).shape == (0, 1, 2)
    no_column, no_table = torch.empty(1, 0, dtype=torch.int32), torch.empty(1, 0, dtype=torch.int32)
    assert hand_made(window_size=0, entry_idx=no_column).tolist() == [[[0.0, 0.0]]]
    assert hand_made(**NO_ITEM, entry_tables=no_table).tolist() == [[[0.0, 0.0]]]
    assert hand_made(window_size=0, entry_tables=no_table, entry_idx=int32([-1, -1])).tolist() == [[[0.0, 0.0]]]
    assert hand_made(**{**NO_ENTRIES, "window_size": 0}, window_tables=no_table).tolist() == [[[0.0, 0.0]]]
    no_pages = {"entries": CachePool.allocate(0, 8, RowFormat.FP32, 2), "num_visible": int32(0)}
    torch.testing.assert_close(hand_made(**no_pages), torch.tensor([[[9 / 11, 0.0]]]))
    assert hand_made(q=torch.empty(1, 0, 2), sink=torch.empty(0)).shape == (1, 0, 2)
    nobody = {"requests": int32(-1), "positions": torch.tensor([-1])}
    assert hand_made(**nobody, window_tables=no_table, entry_tables=no_table).tolist() == [[[0.0, 0.0]]]


# --- faults ---


def check_many_columns(num_columns):
    """Every row of a long table is found: a one-hot value per row gives back its softmax weight."""
    rows = torch.eye(num_columns)
    pool, slots = pool_of(rows, page=16), torch.arange(num_columns)[None]
    q = torch.linspace(-1, 1, num_columns)[None, None]
    y = attend(q, pool, slots, None, None, torch.tensor([-INF]), scale=1.0)
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
        ({"q": torch.zeros(2, 1, 2)}, ValueError, "positions must be"),
        ({"q": torch.zeros(1, 1, 1)}, ValueError, "q must have at least the 2 channels of the rotary table; got C = 1"),
        ({"window": torch.zeros(1, 2)}, TypeError, "window must be a CachePool"),
        ({"positions": int32(0)}, TypeError, "positions must be int64"),
        ({"requests": torch.tensor([0])}, TypeError, "requests must be int32"),
        ({"requests": int32(1)}, ValueError, r"requests must be -1 or in 0 .. 0, .*; got 1"),
        ({"first_idx": int32(0, 0)}, ValueError, "first_idx must be"),
        ({"window_ends": torch.tensor([0, 0])}, ValueError, "window_ends must be"),
        (
            {"window_ends": torch.tensor([0]), "step": CachePool.allocate(1, 1, RowFormat.FP32, 2)},
            ValueError,
            "window_ends goes with step = None",
        ),
        ({"window_size": -1}, ValueError, "window_size must be >= 0; got -1"),
        ({"window_tables": int32([1])}, ValueError, "must be -1 or in 0 .. 7; got 8"),
        ({"window_tables": int32([-1])}, ValueError, "negative in the block table"),
        ({"window_tables": torch.empty(1, 0, dtype=torch.int32)}, ValueError, "the block table is empty"),
        ({"window_tables": torch.tensor([[0]])}, TypeError, "window_tables must be int32"),
        ({"step": torch.zeros(1, 2)}, TypeError, "step must be a CachePool"),
        ({"step": CachePool.allocate(1, 1, RowFormat.FP32, 4)}, ValueError, "step must hold rows of width C = 2"),
        ({"step": CachePool.allocate(0, 1, RowFormat.FP32, 2)}, ValueError, "must be -1 or in 0 .. -1; got 0"),
        (
            {"entry_idx": int32([8])},
            ValueError,
            r"entries must be -1 or in 0 .. 7 \(the rows of 1 blocks of 8\); got 8",
        ),
        ({"entry_idx": int32([-2])}, ValueError, "got -2"),
        ({"entry_idx": torch.tensor([[0]])}, TypeError, "entry_idx must be int32"),
        ({"entry_idx": int32([0], [0])}, ValueError, "entry_idx must be"),
        ({"num_visible": int32(9)}, ValueError, "entries must be -1 or in 0 .. 7 .* got 8. Extend the block table"),
        ({"num_visible": torch.tensor([1])}, TypeError, "num_visible must be int32"),
        ({"num_visible": None}, ValueError, "go together"),
        ({"entry_tables": int32([0], [0])}, ValueError, "entry_tables must be"),
        ({"entry_tables": int32([-1])}, ValueError, "negative in the block table"),
        ({"entry_tables": None}, ValueError, "go together"),
        ({"entries": None}, ValueError, "go together"),
        ({**NO_ENTRIES, "entry_idx": int32([0])}, ValueError, "go together"),
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
