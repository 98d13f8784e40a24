# SPDX-License-Identifier: Apache-2.0
"""index_scores and index_topk: which entries a token attends to."""

from __future__ import annotations

import sys

import pytest
import torch

from megamoe.formats import fp8, mxfp4
from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.ops.hadamard import hadamard
from megamoe.ops.index_topk import index_scores, index_topk
from megamoe.ops.read_cache import read_cache
from megamoe.ops.write_cache import write_cache

MODULE = sys.modules[index_topk.__module__]
FORMATS = [RowFormat.INDEX_FP4, RowFormat.INDEX_FP8, RowFormat.BF16, RowFormat.FP32]


def rounded(q: torch.Tensor, row_format: RowFormat):
    """A query as it is rounded beside keys of a format."""
    if row_format is RowFormat.INDEX_FP4:
        return mxfp4.quantize(q)
    if row_format is RowFormat.INDEX_FP8:
        return fp8.quantize_rows(q, group=q.shape[-1])
    return q.bfloat16() if row_format is RowFormat.BF16 else q


def values(q) -> torch.Tensor:
    """The values of a query, by the formats' own functions."""
    if isinstance(q, mxfp4.MxFp4Tensor):
        return mxfp4.dequantize(q)
    return fp8.dequantize(q) if isinstance(q, fp8.Fp8RowTensor) else q.float()


def one_token(q, index):
    """One token of a query of any kind."""
    if isinstance(q, mxfp4.MxFp4Tensor):
        return mxfp4.MxFp4Tensor(q.codes[index], q.scales[index])
    if isinstance(q, fp8.Fp8RowTensor):
        return fp8.Fp8RowTensor(q.codes[index], q.scales[index], q.group)
    return q[index]


def keys_of(rows: torch.Tensor, row_format: RowFormat, page: int = 64) -> CachePool:
    """A pool whose slot i holds key i."""
    pool = CachePool.allocate(-(-rows.shape[0] // page), page, row_format, rows.shape[1])
    write_cache(rows, pool, torch.arange(rows.shape[0]))
    return pool


def select(q, head_weights, keys, num_visible, top_k, table=None, requests=None):
    """index_topk of one request in consecutive pages, unless told otherwise."""
    table = torch.arange(keys.num_blocks)[None] if table is None else table
    requests = [0] * head_weights.shape[0] if requests is None else requests
    entry_idx = index_topk(
        q,
        head_weights,
        keys,
        block_tables=table.to(torch.int32),
        requests=torch.as_tensor(requests, dtype=torch.int32),
        num_visible=torch.as_tensor(num_visible, dtype=torch.int32),
        top_k=top_k,
    )
    assert entry_idx.dtype == torch.int32
    return entry_idx


# --- known answers ---


def test_scores_by_hand():
    """Two heads: relu per head before the weights, which may be negative."""
    q = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    keys = keys_of(torch.tensor([[3.0, 1.0], [-3.0, 1.0], [-1.0, -1.0], [2.0, 5.0]]), RowFormat.FP32)
    scores = index_scores(q, torch.tensor([[0.5, -1.0]]), keys, torch.tensor([0, 1, 2, 3, -1]))
    assert scores.tolist() == [[0.5 * 3 - 2, -2.0, 0.0, 0.5 * 2 - 10, 0.0]]


def test_scores_of_hand_made_fp4_bytes():
    """A key of 68 bytes, byte by byte, with scales 2^1 and 2^-1, and a query of the same kind with scale 2^2."""
    keys = CachePool.allocate(1, 1, RowFormat.INDEX_FP4, 128)
    page = keys.storage[0]
    assert page.shape[0] == 68
    page[0] = 0x97  # channels 0, 1: 6.0, -0.5
    page[16] = 0x02  # channel 32: 1.0
    page[64:68] = torch.tensor([128, 126, 127, 127], dtype=torch.uint8)
    codes = torch.zeros(1, 2, 64, dtype=torch.uint8)
    codes[0, 0, 0] = 0x43  # head 0: 1.5, 2.0
    codes[0, 0, 16] = 0x05  # channel 32: 3.0
    codes[0, 1, 0] = 0x0F  # head 1: -6.0
    scales = torch.full((1, 2, 4), 129, dtype=torch.uint8)
    q = mxfp4.MxFp4Tensor(codes, scales.view(torch.float8_e8m0fnu))
    # head 0: (1.5*6 + 2*-0.5) * 2 * 4 + 3*1 * 0.5 * 4 = 64 + 6; head 1: negative, so 0
    assert index_scores(q, torch.tensor([[0.25, 8.0]]), keys, torch.tensor([0])).item() == 17.5


def test_scores_of_hand_made_fp8_bytes():
    """A key of 132 bytes: codes 1.0 and -448, scale 2^-3; a query of codes 2.0 and 0.5, scale 2^1."""
    keys = CachePool.allocate(1, 1, RowFormat.INDEX_FP8, 128)
    page = keys.storage[0]
    assert page.shape[0] == 132
    page[0:2] = torch.tensor([0x38, 0xFE], dtype=torch.uint8)
    page[128:132] = torch.tensor([0.125]).view(torch.uint8)
    codes = torch.zeros(1, 2, 128, dtype=torch.uint8)
    codes[0, 0, 0] = 0x40  # head 0: 2.0
    codes[0, 1, 1] = 0xB0  # head 1: -0.5
    scales = torch.full((1, 2, 1), 128, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    q = fp8.Fp8RowTensor(codes.view(torch.float8_e4m3fn), scales, 128)
    # head 0: 2 * 1 * 2 / 8 = 0.5; head 1: 0.5 * 448 * 2 / 8 = 56
    assert index_scores(q, torch.tensor([[3.0, -0.5]]), keys, torch.tensor([0])).item() == 1.5 - 28.0


def test_best_entries_in_ascending_order():
    keys = keys_of(torch.tensor([[1.0], [4.0], [2.0], [3.0], [9.0]]), RowFormat.FP32)
    q, one = torch.ones(1, 1, 1), torch.ones(1, 1)
    assert select(q, one, keys, [4], 2).tolist() == [[1, 3]]  # entry 4 is the best but not visible
    assert select(q, -one, keys, [4], 2).tolist() == [[0, 2]]
    assert select(q, one, keys, [3], 2).tolist() == [[1, 2]]
    assert select(q, one, keys, [4], 4).tolist() == [[0, 1, 2, 3]]
    assert select(q, one, keys, [2], 4).tolist() == [[0, 1, -1, -1]]
    assert select(q, one, keys, [0], 2).tolist() == [[-1, -1]]
    assert select(q, one, keys, [5], 0).tolist() == [[]]
    assert select(q, one, keys, [5], 1).tolist() == [[4]]


def test_ties_take_the_lowest_entry():
    """All relus off is an exact tie of zeros, of either sign."""
    rows = -torch.ones(200, 4)
    rows[150] = 1.0
    keys = keys_of(rows, RowFormat.FP32)
    q = torch.ones(2, 1, 4)
    weights = torch.tensor([[1.0], [-1.0]])
    assert select(q, weights, keys, [200, 200], 3).tolist() == [[0, 1, 150], [0, 1, 2]]
    assert select(q, weights, keys, [150, 150], 3).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_scores_of_minus_infinity_are_still_visible():
    keys = keys_of(torch.tensor([[1.0], [1.0], [1.0], [1.0]]), RowFormat.FP32)
    q, weights = torch.ones(1, 1, 1), torch.full((1, 1), -torch.inf)
    assert select(q, weights, keys, [3], 2).tolist() == [[0, 1]]


def test_nobody_selects_nothing():
    """Whatever its number of visible entries, and whether it is scored or not."""
    keys, q = keys_of(torch.ones(200, 4), RowFormat.FP32), torch.ones(4, 1, 4)
    selected = select(q, torch.ones(4, 1), keys, [200, 200, 2, 9999], 3, requests=[-1, 0, -1, -1])
    assert selected.tolist() == [[-1] * 3, [0, 1, 2], [-1] * 3, [-1] * 3]


# --- properties ---


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("num_heads, num_keys", [(1, 1), (16, 127), (16, 128), (16, 129), (64, 300)])
def test_scores_equal_the_definition_in_fp64(row_format, num_heads, num_keys, seed):
    torch.manual_seed(seed)
    q = rounded(torch.randn(3, num_heads, 128), row_format)
    weights = torch.randn(3, num_heads)
    keys = keys_of(torch.randn(num_keys, 128), row_format)
    scores = index_scores(q, weights, keys, torch.arange(num_keys))
    logits = torch.einsum("thk,nk->thn", values(q).double(), read_cache(keys, torch.arange(num_keys)).double())
    expected = (logits.clamp(min=0) * weights.double()[..., None]).sum(1)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("num_heads", [3, 16])
def test_a_score_depends_on_its_query_and_key_alone(row_format, num_heads, seed):
    """The same bits for 1 of 300 tokens, for 5 of 700 keys, and in any order of keys."""
    torch.manual_seed(seed)
    q = rounded(torch.randn(300, num_heads, 128), row_format)
    weights = torch.randn(300, num_heads)
    keys = keys_of(torch.randn(700, 128), row_format)
    whole = index_scores(q, weights, keys, torch.arange(700))
    for t in (0, 7, 299):
        alone = one_token(q, slice(t, t + 1))
        assert torch.equal(index_scores(alone, weights[t : t + 1], keys, torch.arange(700))[0], whole[t])
        assert torch.equal(index_scores(alone, weights[t : t + 1], keys, torch.arange(5))[0], whole[t, :5])
    some = torch.randperm(700)[:129]
    part = slice(10, 27)
    assert torch.equal(index_scores(one_token(q, part), weights[part], keys, some), whole[part][:, some])


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("page", [1, 3, 16, 128])
def test_pages_change_nothing(row_format, page, seed):
    torch.manual_seed(seed)
    rows = torch.randn(150, 128)
    q, weights = rounded(torch.randn(4, 16, 128), row_format), torch.randn(4, 16)
    expected = select(q, weights, keys_of(rows, row_format), [150, 149, 60, 3], 20)
    num_blocks = -(-150 // page)
    stride = CachePool.allocate(1, page, row_format, 128).block_stride_bytes + 64
    pool = CachePool.allocate(num_blocks + 2, page, row_format, 128, block_stride_bytes=stride)
    pool.storage.fill_(0xFF)  # what is not a visible key must not be read: it is NaN
    table = torch.randperm(num_blocks + 2)[:num_blocks]
    slots = table[torch.arange(150) // page] * page + torch.arange(150) % page
    write_cache(rows, pool, slots)
    padded = torch.cat((table, torch.tensor([-1, 10**6])))[None]
    assert torch.equal(select(q, weights, pool, [150, 149, 60, 3], 20, table=padded), expected)


@pytest.mark.parametrize("row_format", FORMATS)
def test_a_selection_does_not_depend_on_the_call(row_format, seed):
    """Alone, in a chunk, and beside requests of other lengths: the same entries."""
    torch.manual_seed(seed)
    keys = keys_of(torch.randn(320, 128), row_format, page=16)
    tables = torch.stack((torch.arange(10), torch.arange(10) + 10))
    q, weights = rounded(torch.randn(40, 16, 128), row_format), torch.randn(40, 16)
    visible = torch.randint(0, 161, (40,))
    whole = select(q, weights, keys, visible, 12, table=tables, requests=[0] * 23 + [1] * 17)
    for t in range(40):
        own = slice(t, t + 1)
        alone = select(one_token(q, own), weights[own], keys, visible[own], 12, table=tables[0 if t < 23 else 1][None])
        assert torch.equal(alone[0], whole[t])
    assert bool((whole[:, 1:][whole[:, 1:] >= 0] > whole[:, :-1][whole[:, 1:] >= 0]).all())
    assert torch.equal((whole >= 0).sum(1), visible.clamp(max=12))
    order = torch.randperm(40)  # tokens of requests need not stand together
    requests = (order >= 23).to(torch.int32)
    shuffled = select(one_token(q, order), weights[order], keys, visible[order], 12, table=tables, requests=requests)
    assert torch.equal(shuffled, whole[order])


@pytest.mark.parametrize("row_format", FORMATS)
def test_nobody_changes_nobodys_selection(row_format, seed):
    """Tokens that are nobody's, between the others and after them, with other contents and any number of entries."""
    torch.manual_seed(seed)
    keys = keys_of(torch.randn(320, 128), row_format, page=16)
    tables = torch.randperm(20).view(2, 10)
    q, weights = torch.randn(20, 16, 128), torch.randn(20, 16)
    requests, visible = torch.tensor([1] * 9 + [0] * 11), torch.randint(0, 161, (20,))
    ours = torch.cat((torch.arange(4), torch.arange(6, 11), torch.arange(12, 18)))
    nobody = [4, 5, 11, 18, 19]
    expected = select(
        rounded(q[ours], row_format), weights[ours], keys, visible[ours], 12, table=tables, requests=requests[ours]
    )
    requests[nobody] = -1
    for content, number in ((0.0, 0), (1e4, 160), (-3.0, 10**6)):
        q[nobody], weights[nobody], visible[nobody] = content, content, number
        padded = select(rounded(q, row_format), weights, keys, visible, 12, table=tables, requests=requests)
        assert torch.equal(padded[ours], expected) and bool((padded[nobody] == -1).all())


@pytest.mark.parametrize("fault", ["requests ignored", "nobody is request 0"])
def test_faults_in_requests_are_caught(fault, monkeypatch, seed):
    right = MODULE.reference

    def wrong(q, head_weights, keys, block_tables, requests, num_visible, top_k):
        requests = requests.clamp(min=0) if fault == "nobody is request 0" else requests.clamp(max=0)
        return right(q, head_weights, keys, block_tables, requests, num_visible, top_k)

    monkeypatch.setattr(MODULE, "reference", wrong)
    with pytest.raises((AssertionError, ValueError)):
        if fault == "nobody is request 0":
            test_nobody_selects_nothing()
        else:
            test_a_selection_does_not_depend_on_the_call(RowFormat.FP32, seed)


def test_decode_equals_prefill_and_unequal_numerics_are_caught(seed):
    """Fault F18: queries rounded to FP4 in prefill but left plain in decode select other entries."""
    torch.manual_seed(seed)
    num_tokens = 64
    x, weights = torch.randn(num_tokens, 16, 128), torch.randn(num_tokens, 16)
    keys = keys_of(hadamard(torch.randn(num_tokens, 128)), RowFormat.INDEX_FP4, page=16)
    visible = torch.arange(num_tokens) + 1
    prefill = select(mxfp4.quantize(hadamard(x)), weights, keys, visible, 8)

    def decode(round_query):
        return torch.cat(
            [
                select(round_query(x[t : t + 1]), weights[t : t + 1], keys, visible[t : t + 1], 8)
                for t in range(num_tokens)
            ]
        )

    assert torch.equal(decode(lambda q: mxfp4.quantize(hadamard(q))), prefill)
    for fault in (hadamard, mxfp4.quantize, lambda q: fp8.quantize_rows(hadamard(q))):
        assert not torch.equal(decode(fault), prefill)


def test_a_loop_that_always_loads_tile_0_is_caught(monkeypatch, seed):
    """Fault F9: right at 128 keys, wrong beyond."""
    torch.manual_seed(seed)
    q, weights, rows = torch.randn(2, 16, 128), torch.randn(2, 16), torch.randn(256, 128)
    keys = keys_of(rows, RowFormat.FP32)
    expected = index_scores(q, weights, keys, torch.arange(256))
    right = MODULE._key_tiles

    def first_tile(keys, key_slots):
        tiles = right(keys, key_slots)
        return tiles[:1].expand_as(tiles)

    monkeypatch.setattr(MODULE, "_key_tiles", first_tile)
    assert torch.equal(index_scores(q, weights, keys, torch.arange(128)), expected[:, :128])
    assert not torch.equal(index_scores(q, weights, keys, torch.arange(256)), expected)


@pytest.mark.parametrize("num_tokens, num_keys", [(1, 100), (1, 700), (30, 300)])
def test_threads_change_nothing(num_tokens, num_keys, seed):
    torch.manual_seed(seed)
    q, weights = torch.randn(num_tokens, 16, 128), torch.randn(num_tokens, 16)
    keys, before, results = keys_of(torch.randn(num_keys, 128), RowFormat.FP32), torch.get_num_threads(), []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        results.append(index_scores(q, weights, keys, torch.arange(num_keys)))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_memory_bounds_change_nothing(monkeypatch, seed):
    torch.manual_seed(seed)
    q, weights = torch.randn(9, 4, 32), torch.randn(9, 4)
    keys = keys_of(torch.randn(700, 32), RowFormat.FP32)
    scores, entries = index_scores(q, weights, keys, torch.arange(700)), select(q, weights, keys, [700] * 9, 30)
    for group_bytes, key_group in ((1, 128), (4 * 4 * 128 * 2, 256), (2**20, 512)):
        monkeypatch.setattr(MODULE, "GROUP_BYTES", group_bytes)
        monkeypatch.setattr(MODULE, "KEY_GROUP", key_group)
        assert torch.equal(index_scores(q, weights, keys, torch.arange(700)), scores)
        assert torch.equal(select(q, weights, keys, [700] * 9, 30), entries)


def test_scoring_is_skipped_when_every_visible_entry_is_selected(monkeypatch):
    keys = keys_of(torch.full((8, 4), 1.0), RowFormat.FP32)
    keys.storage.fill_(0xFF)
    monkeypatch.setattr(MODULE, "scores_reference", None)
    entries = select(torch.full((2, 1, 4), torch.nan), torch.ones(2, 1), keys, [3, 4], 4)
    assert entries.tolist() == [[0, 1, 2, -1], [0, 1, 2, 3]]


def test_empty():
    quantized = keys_of(torch.ones(4, 128), RowFormat.INDEX_FP4, page=4)
    no_token = rounded(torch.empty(0, 2, 128), RowFormat.INDEX_FP4)
    assert select(no_token, torch.empty(0, 2), quantized, [], 3).shape == (0, 3)
    keys = keys_of(torch.ones(4, 4), RowFormat.FP32, page=4)
    none = torch.empty(0, 2, 4)
    assert index_scores(none, torch.empty(0, 2), keys, torch.arange(4)).shape == (0, 4)
    assert index_scores(torch.ones(3, 2, 4), torch.ones(3, 2), keys, torch.arange(0)).shape == (3, 0)
    assert select(none, torch.empty(0, 2), keys, [], 3).shape == (0, 3)
    empty_request = select(torch.ones(1, 2, 4), torch.ones(1, 2), keys, [4], 2, torch.tensor([[9], [0]]), [1])
    assert empty_request.tolist() == [[0, 1]]
    assert select(torch.ones(2, 2, 4), torch.ones(2, 2), keys, [4, 0], 0).shape == (2, 0)
    no_request = torch.empty(0, 1)
    assert select(torch.ones(1, 2, 4), torch.ones(1, 2), keys, [4], 2, no_request, [-1]).tolist() == [[-1, -1]]
    no_keys = CachePool.allocate(0, 4, RowFormat.FP32, 4)
    assert select(torch.ones(1, 2, 4), torch.ones(1, 2), no_keys, [0], 2, torch.full((1, 3), -1)).tolist() == [[-1, -1]]
    assert select(torch.ones(2, 2, 4), torch.ones(2, 2), keys, [0, 0], 2, torch.empty(1, 0)).tolist() == [[-1, -1]] * 2


# --- refusals ---


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.zeros(2, 3, 4, dtype=torch.float16)}, TypeError, "q must be"),
        ({"q": torch.zeros(2, 3, 8)}, ValueError, r"q must be \[T, Hi, 4\]"),
        ({"head_weights": torch.zeros(2, 4)}, ValueError, "head_weights must be"),
        ({"head_weights": torch.zeros(2, 3).bfloat16()}, TypeError, "head_weights must be float32"),
        ({"keys": torch.zeros(2, 4)}, TypeError, "keys must be a CachePool"),
        ({"num_visible": torch.tensor([1, 9], dtype=torch.int32)}, ValueError, "num_visible must be in 0 .. 8"),
        ({"num_visible": torch.tensor([1, -1], dtype=torch.int32)}, ValueError, "got -1"),
        ({"num_visible": torch.tensor([1, 2])}, TypeError, "num_visible must be int32"),
        ({"num_visible": torch.tensor([1], dtype=torch.int32)}, ValueError, "num_visible must be"),
        ({"block_tables": torch.tensor([[0, 1]])}, TypeError, "block_tables must be int32"),
        (
            {"block_tables": torch.tensor([[0, -1]], dtype=torch.int32)},
            ValueError,
            "request 0 sees entries on block -1",
        ),
        ({"block_tables": torch.tensor([[2, 1]], dtype=torch.int32)}, ValueError, "blocks are in 0 .. 1"),
        ({"requests": torch.tensor([0, 0])}, TypeError, "requests must be int32"),
        ({"requests": torch.tensor([0], dtype=torch.int32)}, ValueError, "requests must be"),
        (
            {"requests": torch.tensor([0, 1], dtype=torch.int32)},
            ValueError,
            "requests must be -1 or in 0 .. 0, the rows of block_tables; got 1",
        ),
        ({"top_k": -1}, ValueError, "top_k must be >= 0"),
    ],
)
def test_topk_refusals(change, error, message):
    arguments = {
        "q": torch.zeros(2, 3, 4),
        "head_weights": torch.zeros(2, 3),
        "keys": CachePool.allocate(2, 4, RowFormat.FP32, 4),
        "block_tables": torch.tensor([[0, 1]], dtype=torch.int32),
        "requests": torch.tensor([0, 0], dtype=torch.int32),
        "num_visible": torch.tensor([3, 8], dtype=torch.int32),
        "top_k": 2,
    }
    index_topk(**arguments)
    with pytest.raises(error, match=message):
        index_topk(**{**arguments, **change})


def test_scores_refusals():
    keys = CachePool.allocate(2, 4, RowFormat.FP32, 4)
    q, weights = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="key_slots must be -1 or in 0 .. 7; got 8"):
        index_scores(q, weights, keys, torch.tensor([8]))
    with pytest.raises(ValueError, match=r"q must be \[T, Hi, 4\]"):
        index_scores(q[..., :2], weights, keys, torch.tensor([0]))
    with pytest.raises(TypeError, match="key_slots must be int64"):
        index_scores(q, weights, keys, torch.tensor([0], dtype=torch.int32))
