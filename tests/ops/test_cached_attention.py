# SPDX-License-Identifier: Apache-2.0
"""The cache operations together: decoding, prefill and every split between them give the same bits.

A layer is reduced to what touches a cache: every token brings a latent row, raw compressor rows, queries. Rows are
written, blocks compressed, entries selected and attended to exactly as a model does it, through the slots of
`megamoe.cache`. Then the same is done with one fault at a time, and the comparison has to notice.
"""

from __future__ import annotations

import dataclasses
import functools
import sys

import pytest
import torch

from megamoe.cache import compressor_state
from megamoe.cache.pages import PageAllocator
from megamoe.cache.pools import CacheSize, LayerCacheSpec, LayerPools, pool_shapes
from megamoe.cache.ring import paged_slots, ring_slots, window_read_slots
from megamoe.formats import fp8, mxfp4
from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.ops.compress_kv import compress_kv
from megamoe.ops.hadamard import hadamard
from megamoe.ops.index_topk import entry_slots, index_topk
from megamoe.ops.rope import rope_table
from megamoe.ops.sparse_attention import sparse_attention
from megamoe.ops.write_cache import write_cache

HEADS, INDEX_HEADS, WINDOW, TOP_K = 4, 16, 12, 5
COMPRESS = sys.modules[compress_kv.__module__]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How rows, keys and index queries are rounded."""

    name: str
    width: int
    index_width: int
    row_format: RowFormat
    index_format: RowFormat
    operand_dtype: torch.dtype = torch.float32

    def round_query(self, q: torch.Tensor):
        if self.index_format is RowFormat.INDEX_FP4:
            return mxfp4.quantize(hadamard(q))
        if self.index_format is RowFormat.INDEX_FP8:
            return fp8.quantize_rows(hadamard(q), group=q.shape[-1])
        return q

    def round_key(self, k: torch.Tensor) -> torch.Tensor:
        return k if self.index_format is RowFormat.FP32 else hadamard(k)


FP32 = Recipe("fp32", 16, 16, RowFormat.FP32, RowFormat.FP32)
FP4 = Recipe("fp8 rows, fp4 keys", 128, 128, RowFormat.FP8_ROPE_BF16, RowFormat.INDEX_FP4, torch.float16)
FP8 = Recipe("bf16 rows, fp8 keys", 32, 128, RowFormat.BF16, RowFormat.INDEX_FP8)
RECIPES = pytest.mark.parametrize("recipe", [FP32, FP4, FP8], ids=lambda recipe: recipe.name)


@dataclasses.dataclass(frozen=True)
class Faults:
    """What a wrong implementation would do; the default is right."""

    write_window_in_decode: bool = True  # F8
    write_entries_in_decode: bool = True
    round_query_in_decode: bool = True  # F18
    visible_ahead: int = 0  # causality: w < (t + 1) // r, plus this many
    ape_of_chunk: bool = False  # ape row by the index in the chunk rather than by position


class Layer:
    """One compressed layer and the inputs of a sequence of tokens."""

    def __init__(self, recipe: Recipe, ratio: int, overlap: bool, num_tokens: int, seed: int) -> None:
        torch.manual_seed(seed)
        coff = 2 if overlap else 1
        self.recipe, self.ratio, self.overlap, self.num_tokens = recipe, ratio, overlap, num_tokens
        self.kv = torch.randn(num_tokens, recipe.width)
        self.q = torch.randn(num_tokens, HEADS, recipe.width)
        self.values = torch.randn(num_tokens, coff * recipe.width)
        self.scores = torch.randn(num_tokens, coff * recipe.width)
        self.ape = 2 * torch.randn(ratio, coff * recipe.width)
        self.index_rows = torch.randn(num_tokens, 2 * coff * recipe.index_width)
        self.index_q = torch.randn(num_tokens, INDEX_HEADS, recipe.index_width)
        self.head_weights = torch.randn(num_tokens, INDEX_HEADS)
        self.sink = torch.randn(HEADS)
        self.norm, self.index_norm = torch.rand(recipe.width) + 0.5, torch.rand(recipe.index_width) + 0.5
        self.table = rope_table(8, 10000.0)

    @property
    def spec(self) -> LayerCacheSpec:
        r = self.recipe
        return LayerCacheSpec(r.width, r.row_format, WINDOW, self.ratio, self.overlap, r.index_width, r.index_format)

    def run(self, chunks, faults=Faults(), *, tokens_per_page=None, num_rings=1, shuffle=False, poison=0xFF, spare=0):
        """Return the attention output [T, H, C] of the whole sequence, computed chunk by chunk."""
        size = CacheSize(num_rings, 30, tokens_per_page or 4 * self.ratio, max(chunks))
        pools = LayerPools(
            **{
                name: CachePool.allocate(
                    shape.num_blocks,
                    shape.rows_per_block,
                    shape.row_format,
                    shape.width,
                    block_stride_bytes=shape.block_bytes + spare,
                )
                for name, shape in pool_shapes(self.spec, size).items()
            }
        )
        for field in dataclasses.fields(pools):
            getattr(pools, field.name).storage.fill_(poison)  # bytes of NaN: what is read before it is written shows
        order = torch.randperm(size.num_pages).tolist() if shuffle else None
        pages = PageAllocator(size.num_pages, size.tokens_per_page, order=order)
        pages.alloc(0)
        start, outputs = 0, []
        for length in chunks:
            table = torch.tensor([pages.extend(0, length)], dtype=torch.int32)
            outputs.append(self.step(start, length, pools, table, num_rings - 1, faults))
            start += length
        return torch.cat(outputs)

    def step(self, start, length, pools, table, ring, faults):
        """One chunk: write, compress, select, attend."""
        is_decode = length == 1
        here = torch.arange(start, start + length)
        capacity = pools.window.rows_per_block
        if faults.write_window_in_decode or not is_decode:
            write_cache(self.kv[here], pools.window, ring_slots(here, capacity, ring_idx=ring))
        ape = self.ape[(here - start if faults.ape_of_chunk else here) % self.ratio]
        raw = torch.cat((self.values[here], self.scores[here] + ape), 1)
        entries = self.compress(raw, here, pools.state, self.norm, ring)
        keys = self.compress(self.index_rows[here], here, pools.index_state, self.index_norm, ring)
        done = compressor_state.completed_entries(start, length, self.ratio)
        slots = paged_slots(torch.arange(done.start, done.stop), table[0], pools.entries.rows_per_block)
        if faults.write_entries_in_decode or not is_decode:
            write_cache(entries, pools.entries, slots)
            write_cache(self.recipe.round_key(keys), pools.index_keys, slots)
        starts = torch.tensor([0, length], dtype=torch.int32)
        index_q = self.index_q[here]
        chosen = index_topk(
            self.recipe.round_query(index_q) if faults.round_query_in_decode or not is_decode else index_q,
            self.head_weights[here],
            pools.index_keys,
            block_tables=table,
            query_starts=starts,
            num_visible=compressor_state.num_visible_entries(here + faults.visible_ahead * self.ratio, self.ratio),
            top_k=TOP_K,
        )
        return sparse_attention(
            self.q[here],
            pools.window,
            window_read_slots(here, WINDOW, capacity, ring_idx=ring),
            pools.entries,
            entry_slots(chosen, table, starts, pools.entries.rows_per_block),
            self.sink,
            scale=self.recipe.width**-0.5,
            operand_dtype=self.recipe.operand_dtype,
        )

    def compress(self, raw, here, state, norm, ring):
        """Store raw rows and return the entries that `here` completes."""
        capacity = state.rows_per_block
        write_cache(raw, state, ring_slots(here, capacity, ring_idx=ring))
        done = compressor_state.completed_entries(int(here[0]), here.shape[0], self.ratio)
        entries = torch.arange(done.start, done.stop)
        return compress_kv(
            state,
            compressor_state.block_row_slots(entries, self.ratio, self.overlap, capacity, ring_idx=ring),
            norm,
            entries * self.ratio,
            self.table,
            ratio=self.ratio,
            overlap=self.overlap,
            out_dtype=torch.float32,
        )

    def whole(self):
        """The output of one prefill."""
        return self.run([self.num_tokens])


@functools.cache
def layer(recipe: Recipe = FP4, ratio: int = 4, overlap: bool = True, num_tokens: int = 50) -> Layer:
    """A layer whose 50 tokens see up to 12 entries, of which TOP_K are kept."""
    return Layer(recipe, ratio, overlap, num_tokens, seed=7 * ratio + num_tokens)


CHUNKS = {
    "decode": [1] * 50,
    "prefill, then decode": [37] + [1] * 13,
    "two chunks": [25, 25],
    "uneven": [3, 1, 16, 1, 1, 13, 15],
}
SPLITS = pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())

# --- properties ---


@RECIPES
@SPLITS
def test_any_split_gives_the_same_bits(recipe, chunks):
    assert torch.equal(layer(recipe).run(chunks), layer(recipe).whole())


@SPLITS
@pytest.mark.parametrize("ratio, overlap", [(8, False), (5, True), (1, False)])
def test_other_ratios(ratio, overlap, chunks):
    assert torch.equal(layer(FP32, ratio, overlap).run(chunks), layer(FP32, ratio, overlap).whole())


@RECIPES
@pytest.mark.parametrize("tokens_per_page", [4, 12, 256])
def test_page_size_page_order_stride_and_ring_change_nothing(recipe, tokens_per_page):
    one = layer(recipe)
    expected = one.whole()
    for chunks in ([1] * 50, [30, 20]):
        got = one.run(chunks, tokens_per_page=tokens_per_page, num_rings=3, shuffle=True, poison=0x00, spare=192)
        assert torch.equal(got, expected)


def test_a_later_token_changes_no_earlier_output():
    """Causality, for every token: outputs before it keep their bits, its own changes."""
    one = layer(FP32, num_tokens=26)
    expected = one.whole()
    for token in range(26):
        changed = Layer(FP32, 4, True, 26, seed=7 * 4 + 26)
        for rows in (changed.kv, changed.values, changed.scores, changed.index_rows):
            rows[token] += 1.0
        differs = (changed.whole() != expected).flatten(1).any(1)
        assert not bool(differs[:token].any()) and bool(differs[token])


def test_the_completing_token_sees_its_entry():
    """Token 3 completes entry 0: its raw row reaches its own output through the entry, and no earlier one."""
    one, changed = layer(FP32), Layer(FP32, 4, True, 50, seed=7 * 4 + 50)
    changed.values[3] += 1.0
    differs = (changed.whole() != one.whole()).flatten(1).any(1).tolist()
    assert differs[:4] == [False, False, False, True]


# --- faults: decoding is compared with prefill, and the comparison has to notice ---


@pytest.mark.parametrize(
    "faults",
    [
        Faults(write_window_in_decode=False),
        Faults(write_entries_in_decode=False),
        Faults(round_query_in_decode=False),
        Faults(ape_of_chunk=True),
    ],
    ids=["window never written (F8)", "entries never written (F8)", "index numerics differ (F18)", "ape by chunk"],
)
def test_decode_against_prefill_catches(faults):
    """Zero bytes in the pools, as a fresh allocation has them: nothing raises, only numbers are wrong."""
    prefill = layer().run([50], faults, poison=0)
    assert torch.equal(layer().run([30] + [1] * 20, poison=0), layer().whole())
    assert not torch.equal(layer().run([30] + [1] * 20, faults, poison=0), prefill)


def test_entries_from_the_future_are_caught():
    """One entry too many reads later tokens in prefill, and in decode a row that nobody has written."""
    one, faults = layer(), Faults(visible_ahead=1)
    with pytest.raises(ValueError, match="NaN"):
        one.run([1] * 50, faults, tokens_per_page=256)
    decode = one.run([1] * 50, faults, tokens_per_page=256, poison=0)
    assert not torch.equal(decode, one.run([50], faults, tokens_per_page=256, poison=0))


def test_swapped_halves_change_the_first_entry(monkeypatch):
    """Overlap halves swapped: still causal and still equal in decode, but the first entry (token 3) is another one."""
    right = layer(FP32).whole()

    def swapped(x: torch.Tensor, ratio: int) -> torch.Tensor:
        before, own = x.chunk(2, dim=-1)
        return torch.cat((own[:, :ratio], before[:, ratio:]), dim=1)

    monkeypatch.setattr(COMPRESS, "_overlapped", swapped)
    wrong = layer(FP32).whole()
    assert torch.equal(wrong[:3], right[:3]) and not torch.equal(wrong[3], right[3])


def test_rings_too_small_for_a_chunk_are_refused(monkeypatch):
    """A chunk longer than its ring would overwrite rows that the same step still reads."""
    one = layer()
    window = CachePool.allocate(1, WINDOW, one.recipe.row_format, one.recipe.width)
    with pytest.raises(ValueError, match="appears twice"):
        write_cache(one.kv[: WINDOW + 1], window, ring_slots(torch.arange(WINDOW + 1), WINDOW))
    monkeypatch.setattr("megamoe.cache.pools.state_capacity", lambda *_: 19)
    with pytest.raises(ValueError, match="appears twice"):
        one.run([10, 20, 20])
