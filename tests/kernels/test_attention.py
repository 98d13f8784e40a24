# SPDX-License-Identifier: Apache-2.0
"""sparse_attention on a GPU where others broke: padded rows, holes, unused bytes, far pages, splits, replays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamoe.formats.cache_rows import CachePool, RowFormat, page_bytes
from megamoe.kernels.attention.sparse_attention import few_tokens, num_splits
from megamoe.ops.dispatch import use
from megamoe.ops.sparse_attention import sparse_attention
from megamoe.verify.cache_inputs import CACHE_INPUTS, block_tables, filled_pool
from megamoe.verify.tolerance import assert_within
from megamoe.verify.values import copied, moved

Arguments = dict[str, Any]
LISTED, VISIBLE = 0, 1  # the ways of calling
WIDTH, WINDOW = 512, 128


def arguments(way: int = LISTED, *, heads: int = 64, tokens: int = 3, entries: int = 200, seed: int = 0) -> Arguments:
    generator = torch.Generator().manual_seed(seed)
    dims = {"H": heads, "C": WIDTH, "W": WINDOW, "J": entries}
    return CACHE_INPUTS["sparse_attention"][way].make(dims, tokens, generator)


def on_gpu(given: Arguments) -> torch.Tensor:
    return sparse_attention(**{name: copied(value, "cuda") for name, value in given.items()}).cpu()


def check(given: Arguments) -> torch.Tensor:
    """Compare with the reference; returns the kernel's result."""
    with use("reference"):
        want = sparse_attention(**given)
    got = on_gpu(given)
    assert_within("sparse_attention", got, want)
    return got


def test_ranges_cover_all_tiles_and_are_at_most_16() -> None:
    for tiles in range(1, 300):
        splits = num_splits(tiles)
        share = -(-tiles // splits)
        assert 1 <= splits <= 16 and share * splits >= tiles
    assert (num_splits(0), num_splits(2), num_splits(10), num_splits(18)) == (1, 2, 5, 6)
    assert few_tokens(4) == few_tokens(64) == 22 and few_tokens(128) == 11


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("way", [LISTED, VISIBLE])
def test_padded_rows_are_nobody_whatever_else_they_hold(way: int, tokens: int) -> None:
    given = arguments(way, tokens=tokens, seed=tokens)
    given["requests"][-2:] = -1
    before = check(given)
    assert not before[-2:].any()
    given["positions"][-2:] = 2**40
    given["num_visible"][-2:] = 2**31 - 1
    given["first_idx"][-2:] = -(2**31)
    given["q"][-2:] = float("nan")
    after = on_gpu(given)
    assert not after[-2:].any()
    assert torch.equal(before[:-2].view(torch.int16), after[:-2].view(torch.int16))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 40])
def test_a_token_without_items_gives_zero(tokens: int) -> None:
    given = arguments(tokens=tokens)
    given["window_size"] = 0
    given["entry_idx"].fill_(-1)
    given["sink"][::2] = -torch.inf
    assert not check(given).any()


@pytest.mark.gpu
@pytest.mark.parametrize("entries", [1, 63, 64, 65])
@pytest.mark.parametrize("way", [LISTED, VISIBLE])
def test_fewer_items_than_a_tile_and_one_more(way: int, entries: int) -> None:
    given = arguments(way, entries=entries)
    given["window_size"] = 0 if entries == 1 else 1
    check(given)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 40])
def test_holes_in_a_list(tokens: int) -> None:
    given = arguments(tokens=tokens, entries=256)
    given["entry_idx"][:, 3:64] = -1
    given["entry_idx"][:, 64:128] = -1  # a whole tile
    given["entry_idx"][::2, 200] = -1
    check(given)


@pytest.mark.gpu
def test_the_first_tile_is_empty_and_the_largest_logit_comes_last() -> None:
    """The running maximum starts below everything, and grows from tile to tile."""
    for tokens in (2, 40):
        given = arguments(tokens=tokens, entries=512)
        given["window_size"] = 0
        given["entry_idx"][:, :64] = -1
        given["q"] = given["q"] * 8  # logits of some tens
        check(given)


@pytest.mark.gpu
def test_one_pool_for_rows_and_entries() -> None:
    given = arguments(tokens=4, entries=64)
    given["entries"], given["entry_tables"] = given["window"], given["window_tables"]
    room = given["window_tables"].shape[1] * given["window"].rows_per_block
    given["entry_idx"] = given["entry_idx"] % room
    check(given)


@pytest.mark.gpu
def test_a_window_that_is_not_full_yet() -> None:
    given = arguments(tokens=200, entries=0)
    given["positions"] = torch.arange(200)
    given["requests"].fill_(1)
    given["window_size"] = 96  # the rings hold 144 rows
    check(given)
    check(arguments(VISIBLE, tokens=70, entries=5))


@pytest.mark.gpu
@pytest.mark.parametrize("way", [LISTED, VISIBLE])
def test_beyond_128k_tokens_and_800_pages(way: int) -> None:
    generator = torch.Generator().manual_seed(1)
    given = arguments(way, tokens=3, entries=64)
    given["entries"] = filled_pool(generator, 2700 * 16, RowFormat.FP8_ROPE_BF16, WIDTH)
    given["entry_tables"] = block_tables(generator, 3, 900)
    given["positions"] = given["positions"] * 0 + 999_999
    if way == LISTED:
        given["entry_idx"] = torch.randint(900 * 16, (3, 64), generator=generator).to(torch.int32)
    else:
        given["step"] = None
        given["num_visible"] = torch.tensor([900 * 16, 8192, 0], dtype=torch.int32)
    check(given)


@pytest.mark.gpu
def test_page_strides_of_584_and_of_multiples_of_576() -> None:
    given = arguments(tokens=2, entries=64)
    pool, results = given["entries"], []
    wanted = page_bytes(pool.row_format, pool.rows_per_block, WIDTH)
    for stride in (wanted, -(-wanted // 576) * 576, wanted + 16):
        whole = torch.full((pool.num_blocks, stride), 0xFF, dtype=torch.uint8)
        whole[:, :wanted] = pool.storage
        given["entries"] = CachePool(whole[:, :wanted], pool.rows_per_block, pool.row_format, WIDTH)
        results.append(check(given).view(torch.int16))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 40])
def test_bytes_of_rows_that_nobody_attends_to_are_never_multiplied(tokens: int) -> None:
    """NaN codes 0x7F, scale bytes 0 and 255: 0 x NaN would be NaN."""
    given = arguments(tokens=tokens, entries=100)
    before = on_gpu(given)
    pool, idx = given["entries"], given["entry_idx"]
    used = torch.zeros(pool.num_slots, dtype=torch.bool)
    for request in range(3):
        rows = idx[given["requests"] == request]
        rows = rows[rows >= 0].long()
        table = given["entry_tables"][request].long()
        used[table[rows // pool.rows_per_block] * pool.rows_per_block + rows % pool.rows_per_block] = True
    unused = (~used).view(pool.num_blocks, pool.rows_per_block)
    assert unused.any()
    pool.data_rows[unused] = 0x7F
    pool.scale_rows[unused] = torch.tensor([0, 255] * 4, dtype=torch.uint8)
    assert torch.equal(before.view(torch.int16), on_gpu(given).view(torch.int16))


@pytest.mark.gpu
def test_scales_from_the_smallest_to_the_largest() -> None:
    given = arguments(tokens=2, entries=64)
    for exponent in (127 - 22, 127 - 15, 127, 127 + 7):
        given["entries"].scale_rows[..., :7] = exponent
        given["q"] = given["q"].float().mul(2.0 ** min(0, 127 - exponent)).bfloat16()
        check(given)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [4, 64, 128])
def test_split_or_not_the_sink_is_added_once(heads: int) -> None:
    """The last tokens of a step with one more token than few, and the same ones alone."""
    few = few_tokens(heads)
    given = arguments(heads=heads, tokens=few + 1, entries=512)
    given["sink"] = given["sink"] + 4.0
    together = check(given)
    per_token = ("q", "positions", "requests", "first_idx", "num_visible", "entry_idx")
    alone = {**given, **{name: given[name][-3:] for name in per_token}}
    assert_within("sparse_attention", check(alone), together[-3:])


@pytest.mark.gpu
@pytest.mark.parametrize("way", [LISTED, VISIBLE])
@pytest.mark.parametrize("tokens", [4, 40])
def test_bits_do_not_depend_on_other_tokens(tokens: int, way: int) -> None:
    given = arguments(way, tokens=tokens, entries=300)
    before = on_gpu(given)
    given["q"][1:] = given["q"][1:].flip(0)
    if way == VISIBLE:
        given["num_visible"][1:] = 3
    else:
        given["entry_idx"][1:] = given["entry_idx"][1:].flip(1)
    assert torch.equal(before[:1].view(torch.int16), on_gpu(given)[:1].view(torch.int16))


@pytest.mark.gpu
def test_a_query_beyond_fp16_is_nan_in_its_head_alone() -> None:
    for tokens in (2, 40):
        given = arguments(tokens=tokens, entries=64)
        given["q"][1, 3, 7] = 1e6
        got = check({**given, "q": given["q"].clamp(-60000, 60000)})
        broken = on_gpu(given)
        assert broken[1, 3].isnan().all()
        broken[1, 3] = got[1, 3]
        assert torch.equal(broken.view(torch.int16), got.view(torch.int16))


@pytest.mark.gpu
def test_pages_beyond_2_gib() -> None:
    given = arguments(tokens=2, entries=64)
    before = check(given)
    on_device = {name: moved(value, "cuda") for name, value in given.items()}
    pool: CachePool = on_device["entries"]
    stride = -(-((5 << 30) // pool.num_blocks) // 16) * 16
    whole = torch.empty(pool.num_blocks * stride, dtype=torch.uint8, device="cuda")
    far = whole.view(pool.num_blocks, stride)[:, : pool.page_bytes]
    far.copy_(pool.storage)
    on_device["entries"] = CachePool(far, pool.rows_per_block, pool.row_format, WIDTH)
    got = sparse_attention(**on_device).cpu()
    assert torch.equal(before.view(torch.int16), got.view(torch.int16))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("way", [LISTED, VISIBLE])
def test_a_replay_sees_new_lengths(way: int, tokens: int) -> None:
    given = arguments(way, tokens=tokens, entries=300)
    on_device = {name: moved(value, "cuda") for name, value in given.items()}
    sparse_attention(**on_device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse_attention(**on_device)
    for turn in range(3):
        for name in ("num_visible", "entry_idx", "requests"):
            if given[name] is not None:
                given[name] = given[name].flip(0) if turn else given[name]
                on_device[name].copy_(given[name])
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out.cpu().view(torch.int16), on_gpu(given).view(torch.int16))
