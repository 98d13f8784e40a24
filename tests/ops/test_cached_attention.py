# SPDX-License-Identifier: Apache-2.0
"""The cache operations together: decoding, prefill and every split between them give the same bits.

A layer is reduced to what touches a cache: every token brings a latent row, raw compressor rows, queries. Rows are
written, blocks compressed, entries selected and attended to exactly as a model does it, through the slots of
`plan_slots`: straight into the rings, or through a step area. Then the same is done in other layouts, with tokens that
are nobody's, and with one fault at a time, and the comparison has to notice.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import pytest
import torch

from megamoe.cache.compressor_state import state_capacity
from megamoe.formats import fp8, mxfp4
from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.ops.compress_kv import compress_kv
from megamoe.ops.copy_cache import copy_cache
from megamoe.ops.hadamard import hadamard
from megamoe.ops.index_topk import index_topk
from megamoe.ops.plan_slots import EntryTables, RowTables, StepSlots, plan_slots
from megamoe.ops.rope import rope_table
from megamoe.ops.save_rows import save_rows
from megamoe.ops.sparse_attention import sparse_attention
from megamoe.ops.write_cache import write_cache
from megamoe.ops.write_index_keys import write_index_keys

from .steps import step_of, tables_of

HEADS, INDEX_HEADS, WINDOW, TOP_K = 4, 16, 12, 5
REQUESTS = 3
COMPRESS = sys.modules[compress_kv.__module__]
PLAN = sys.modules[plan_slots.__module__]

Part = tuple[int, int]
"""(request, tokens) of a step; request -1 for tokens that are nobody's."""


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

    @property
    def rotates_keys(self) -> bool:
        return self.index_format is not RowFormat.FP32


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
    keep_rows: bool = True  # the last rows of a step area go to the rings


@dataclasses.dataclass(frozen=True)
class Setup:
    """Where rows lie, and how they get there; none of it changes an output.

    Attributes:
        area: "never" (every step goes into the rings), "long" (steps of more than one token of a request go through
            the step area, as in an engine) or "always".
        ring_tokens: tokens of a request that a ring has room for beside what is read; None for the longest step.
        blocks: blocks of a ring; None for one, of ours; -1 for pages of 4 rows that never wrap.
        tokens_per_page: of entries; None for pages of 4 entries.
        poison: what pools are filled with; 0xFF are bytes of NaN, so what is read before it is written shows.
        spare: bytes between blocks.
        seed: of the order of blocks.
        nobody: what is in the tokens that are nobody's.
        drafts: tokens that are tried after every single token of a request and all rejected.
    """

    area: str = "never"
    ring_tokens: int | None = None
    blocks: int | None = None
    tokens_per_page: int | None = None
    poison: int = 0xFF
    spare: int = 0
    seed: int = 0
    nobody: float = 0.0
    drafts: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Pools:
    """What a layer keeps: rings, pages, and snapshots of rings at page boundaries."""

    window: CachePool
    state: CachePool
    index_state: CachePool
    entries: CachePool
    index_keys: CachePool
    saved: dict[str, CachePool]

    def storages(self) -> dict[str, torch.Tensor]:
        named = {name: getattr(self, name) for name in ("window", "state", "index_state", "entries", "index_keys")}
        return {name: pool.storage for name, pool in {**named, **self.saved}.items()}


class Layer:
    """One compressed layer and the inputs of three sequences of tokens, by request and position."""

    def __init__(self, recipe: Recipe, ratio: int, overlap: bool, num_tokens: int, seed: int) -> None:
        torch.manual_seed(seed)
        coff, many = 2 if overlap else 1, (REQUESTS, num_tokens)
        self.recipe, self.ratio, self.overlap, self.num_tokens = recipe, ratio, overlap, num_tokens
        self.kv = torch.randn(*many, recipe.width)
        self.q = torch.randn(*many, HEADS, recipe.width)
        self.raw = torch.randn(*many, 2 * coff * recipe.width)  # values, then scores
        self.ape = 2 * torch.randn(ratio, coff * recipe.width)
        self.index_raw = torch.randn(*many, 4 * recipe.index_width)
        self.index_ape = torch.randn(ratio, 2 * recipe.index_width)
        self.index_q = torch.randn(*many, INDEX_HEADS, recipe.index_width)
        self.head_weights = torch.randn(*many, INDEX_HEADS)
        self.sink = torch.randn(HEADS)
        self.norm, self.index_norm = torch.rand(recipe.width) + 0.5, torch.rand(recipe.index_width) + 0.5
        self.table = rope_table(8, 10000.0)

    def run(self, chunks: list[int], setup: Setup = Setup(), faults: Faults = Faults()) -> torch.Tensor:
        """Return the attention output [T, H, C] of the first sequence, computed chunk by chunk."""
        outputs, _ = self.steps([[(0, length)] for length in chunks], setup, faults)
        return outputs[0]

    def steps(
        self, steps: list[list[Part]], setup: Setup = Setup(), faults: Faults = Faults()
    ) -> tuple[list[torch.Tensor], Pools]:
        """Return the output of every request, and what is left in the pools."""
        torch.manual_seed(setup.seed)
        ring_tokens = setup.ring_tokens or max((count for parts in steps for _, count in parts), default=1)
        tokens_per_page = setup.tokens_per_page or 4 * self.ratio
        window = self.ring(setup, WINDOW + ring_tokens)
        state = self.ring(setup, state_capacity(self.ratio, self.overlap, ring_tokens))
        index_state = self.ring(setup, state_capacity(self.ratio, True, ring_tokens))
        entries = tables_of(
            REQUESTS, -(-self.num_tokens // tokens_per_page) + 1, tokens_per_page // self.ratio, spare=2
        )
        pools = self.pools(setup, window, state, index_state, entries, tokens_per_page)
        kinds = EntryTables(self.ratio, state, entries), EntryTables(self.ratio, index_state, entries)
        starts, outputs = [0] * REQUESTS, [[torch.empty(0, HEADS, self.recipe.width)] for _ in range(REQUESTS)]
        for certain in steps:
            parts = [self.with_drafts(part, starts, setup) for part in certain]
            longest = max(count for _, count in parts)
            in_rings = setup.area == "never" or (setup.area == "long" and longest <= 1 + setup.drafts)
            y = self.step(parts, starts, pools, window, kinds, in_rings, setup, faults, tokens_per_page)
            first = 0
            for (request, count), (_, num_certain) in zip(parts, certain, strict=True):
                if request >= 0:
                    outputs[request].append(y[first : first + num_certain])
                    starts[request] += num_certain
                else:
                    assert not bool(y[first : first + count].any())
                first += count
        return [torch.cat(one) for one in outputs], pools

    def with_drafts(self, part: Part, starts: list[int], setup: Setup) -> Part:
        request, count = part
        if request < 0 or count > 1:
            return part
        return request, count + min(setup.drafts, self.num_tokens - starts[request] - count)

    def ring(self, setup: Setup, capacity: int) -> RowTables:
        if setup.blocks is None:
            return RowTables(torch.arange(REQUESTS, dtype=torch.int32).flip(0)[:, None], capacity)
        if setup.blocks == -1:
            return tables_of(REQUESTS, -(-self.num_tokens // 4), 4, spare=1)
        return tables_of(REQUESTS, setup.blocks, -(-capacity // setup.blocks), spare=1)

    def pools(self, setup, window, state, index_state, entries, tokens_per_page) -> Pools:
        recipe = self.recipe
        boundaries = REQUESTS * (self.num_tokens // tokens_per_page + 1)

        def allocate(num_blocks: int, rows: int, row_format: RowFormat, width: int) -> CachePool:
            stride = CachePool.allocate(1, rows, row_format, width).block_stride_bytes + setup.spare
            pool = CachePool.allocate(num_blocks, rows, row_format, width, block_stride_bytes=stride)
            pool.storage.fill_(setup.poison)
            return pool

        def of(tables: RowTables, row_format: RowFormat, width: int) -> CachePool:
            return allocate(int(tables.block_tables.max()) + 1, tables.rows_per_block, row_format, width)

        saved = {"saved window": allocate(boundaries, WINDOW - 1, recipe.row_format, recipe.width)}
        if self.overlap:
            saved["saved state"] = allocate(boundaries, self.ratio, RowFormat.FP32, self.raw.shape[2])
        saved["saved index_state"] = allocate(boundaries, self.ratio, RowFormat.FP32, self.index_raw.shape[2])
        return Pools(
            window=of(window, recipe.row_format, recipe.width),
            state=of(state, RowFormat.FP32, self.raw.shape[2]),
            index_state=of(index_state, RowFormat.FP32, self.index_raw.shape[2]),
            entries=of(entries, recipe.row_format, recipe.width),
            index_keys=of(entries, recipe.index_format, recipe.index_width),
            saved=saved,
        )

    def step(self, parts, starts, pools, window, kinds, in_rings, setup, faults, tokens_per_page) -> torch.Tensor:
        """One step: write, compress, select, attend, and bring rows out of the step area."""
        step = step_of(*((request, starts[request] if request >= 0 else 0, count) for request, count in parts))
        is_decode = all(count == 1 for _, count in parts)
        num_tokens, is_nobody = step.positions.shape[0], step.requests < 0
        is_draft = torch.tensor(
            [0 < idx <= n - 1 <= setup.drafts for _, n in parts for idx in range(n)], dtype=torch.bool
        )
        slots = StepSlots.empty(num_tokens, 2, torch.device("cpu"))
        plan_slots(step.tokens, window, kinds, slots, in_rings=in_rings)
        main, index = slots.entries
        area = {} if in_rings else {name: self.area(getattr(pools, name), num_tokens, setup) for name in RINGS}

        def here(of_tokens: torch.Tensor) -> torch.Tensor:
            rows = of_tokens[step.requests.long(), step.positions]
            rows[is_nobody] = setup.nobody
            rows[is_draft] = -rows[is_draft]  # tokens that will turn out to be others
            return rows

        if faults.write_window_in_decode or not is_decode:
            write_cache(here(self.kv), area.get("window", pools.window), slots.window_slots)
        writes = faults.write_entries_in_decode or not is_decode
        given: dict[str, Any] = {**step.addresses, "table": self.table, "ratio": self.ratio, "out_dtype": torch.float32}
        with pytest.MonkeyPatch.context() as patched:
            if faults.ape_of_chunk:
                right = COMPRESS._store_raw_rows
                patched.setattr(
                    COMPRESS,
                    "_store_raw_rows",
                    lambda raw, ape, positions, *rest: right(raw, ape, torch.arange(positions.shape[0]), *rest),
                )
            compress_kv(
                here(self.raw),
                self.ape,
                self.norm,
                pools.state,
                area.get("state"),
                pools.entries,
                state_tables=kinds[0].state.block_tables,
                state_slots=main.state_slots,
                entry_slots=main.entry_slots if writes else torch.full_like(main.entry_slots, -1),
                overlap=self.overlap,
                **given,
            )
            write_index_keys(
                here(self.index_raw),
                self.index_ape,
                self.index_norm,
                pools.index_state,
                area.get("index_state"),
                pools.index_keys,
                state_tables=kinds[1].state.block_tables,
                state_slots=index.state_slots,
                key_slots=index.entry_slots if writes else torch.full_like(index.entry_slots, -1),
                rotate=self.recipe.rotates_keys,
                **given,
            )
        index_q = here(self.index_q)
        chosen = index_topk(
            self.recipe.round_query(index_q) if faults.round_query_in_decode or not is_decode else index_q,
            here(self.head_weights),
            pools.index_keys,
            block_tables=kinds[0].entries.block_tables,
            requests=step.requests,
            num_visible=main.num_visible + faults.visible_ahead,
            top_k=TOP_K,
        )
        y = sparse_attention(
            here(self.q),
            pools.window,
            pools.entries,
            self.sink,
            **step.addresses,
            window_size=WINDOW,
            window_tables=window.block_tables,
            step=area.get("window"),
            entry_tables=kinds[0].entries.block_tables,
            entry_idx=chosen,
            num_visible=main.num_visible,
            table=self.table,
            scale=self.recipe.width**-0.5,
            operand_dtype=self.recipe.operand_dtype,
        )
        self.save(parts, starts, pools, window, kinds, area, tokens_per_page)
        if area and faults.keep_rows:
            copy_cache(area["window"], slots.window_slots, pools.window, slots.window_kept)
            copy_cache(area["state"], main.state_slots, pools.state, main.state_kept)
            copy_cache(area["index_state"], index.state_slots, pools.index_state, index.state_kept)
        return y

    def area(self, ring: CachePool, num_tokens: int, setup: Setup) -> CachePool:
        pool = CachePool.allocate(1, num_tokens, ring.row_format, ring.width)
        pool.storage.fill_(setup.poison)
        return pool

    def save(self, parts, starts, pools, window, kinds, area, tokens_per_page) -> None:
        """Keep the rows that continue the sequences at every page boundary that this step reaches."""
        saves, first, of_request = [], 0, self.num_tokens // tokens_per_page + 1
        for request, count in parts:
            for length in range(tokens_per_page, self.num_tokens + 1, tokens_per_page):
                if request >= 0 and starts[request] < length <= starts[request] + count:
                    block = request * of_request + length // tokens_per_page
                    saves.append((request, length, starts[request], first, block))
            first += count
        rows = torch.tensor(saves, dtype=torch.int32).reshape(-1, 5)
        for name, tables in zip(RINGS, (window, kinds[0].state, kinds[1].state), strict=True):
            if f"saved {name}" in pools.saved:
                target = pools.saved[f"saved {name}"]
                save_rows(getattr(pools, name), area.get(name), target, rows, tables.block_tables)


RINGS = ("window", "state", "index_state")


@functools.cache
def layer(recipe: Recipe = FP4, ratio: int = 4, overlap: bool = True, num_tokens: int = 50) -> Layer:
    """A layer whose 50 tokens see up to 12 entries, of which TOP_K are kept."""
    return Layer(recipe, ratio, overlap, num_tokens, seed=7 * ratio + num_tokens)


@functools.cache
def whole(recipe: Recipe = FP4, ratio: int = 4, overlap: bool = True, num_tokens: int = 50) -> torch.Tensor:
    """The output of one prefill that goes straight into rings as long as it is."""
    return layer(recipe, ratio, overlap, num_tokens).run([num_tokens])


CHUNKS = {
    "decode": [1] * 50,
    "prefill, then decode": [37] + [1] * 13,
    "two chunks": [25, 25],
    "uneven": [3, 1, 16, 1, 1, 13, 15],
}
SPLITS = pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
AREAS = pytest.mark.parametrize(
    "setup",
    [Setup(), Setup(area="long", ring_tokens=1), Setup(area="always", ring_tokens=1)],
    ids=["rings", "long steps in the step area", "all steps in the step area"],
)

# --- properties ---


@RECIPES
@SPLITS
@AREAS
def test_any_split_gives_the_same_bits(recipe, chunks, setup):
    assert torch.equal(layer(recipe).run(chunks, setup), whole(recipe))


@pytest.mark.parametrize("chunks", [CHUNKS["prefill, then decode"], CHUNKS["uneven"]], ids=str)
@AREAS
@pytest.mark.parametrize("ratio, overlap", [(8, False), (5, True), (1, False)])
def test_other_ratios(ratio, overlap, chunks, setup):
    assert torch.equal(layer(FP32, ratio, overlap).run(chunks, setup), whole(FP32, ratio, overlap))


@RECIPES
@pytest.mark.parametrize("tokens_per_page", [4, 12, 256])
def test_page_size_page_order_stride_and_ring_change_nothing(recipe, tokens_per_page):
    setup = Setup(tokens_per_page=tokens_per_page, blocks=1, poison=0x00, spare=192, seed=tokens_per_page)
    for chunks in ([20] + [1] * 30, [30, 20]):
        assert torch.equal(layer(recipe).run(chunks, setup), whole(recipe))


# Several requests in a step: prompts beside single tokens, in changing order.
TOGETHER: list[list[Part]] = [
    [(1, 9), (0, 14)],
    [(0, 1), (1, 1)],
    [(2, 20), (1, 1), (0, 1)],
    [(1, 3), (0, 8), (2, 2)],
    [(2, 1), (0, 1), (1, 1)],
    [(0, 5), (2, 4)],
]
LENGTHS = (30, 15, 27)


@functools.cache
def alone(recipe: Recipe) -> list[torch.Tensor]:
    """Each request of TOGETHER by itself, in one prefill."""
    outputs = [layer(recipe).steps([[(request, count)]])[0][request] for request, count in enumerate(LENGTHS)]
    assert all(bool(one.isfinite().all()) for one in outputs)
    return outputs


def same(outputs: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(outputs, wanted, strict=True))


@RECIPES
@AREAS
@pytest.mark.parametrize("blocks", [None, 2, 5, -1])
def test_requests_and_layouts_change_nothing(recipe, setup, blocks):
    """Several requests in a step equal each alone: in rings of ours, in rings of some blocks, and in pages that never
    wrap, as another engine keeps its windows."""
    outputs, _ = layer(recipe).steps(TOGETHER, dataclasses.replace(setup, blocks=blocks, seed=blocks or 0))
    assert same(outputs, alone(recipe))


@RECIPES
@AREAS
def test_nobody_changes_nobodys_bits(recipe, setup):
    """Tokens that are nobody's, before, between and after the others: no output, no ring, no entry, no snapshot."""
    expected, pools = layer(recipe).steps(TOGETHER, setup)
    padded = [[(-1, 1), *[part for parts in step for part in (parts, (-1, 2))], (-1, 3)] for step in TOGETHER]
    # What decides whether a step is long is its longest request, so nobody's tokens come one by one.
    padded = [[one for part in step for one in ([part] if part[0] >= 0 else [(-1, 1)] * part[1])] for step in padded]
    for content in (1e4, -3.0):
        outputs, others = layer(recipe).steps(padded, dataclasses.replace(setup, nobody=content))
        assert same(outputs, expected) and same_bytes(pools, others) == []


@RECIPES
@pytest.mark.parametrize("drafts, blocks", [(1, None), (4, 3)])
def test_rejected_drafts_leave_nothing_behind(recipe, drafts, blocks):
    """Rings with room for a token and its drafts: rows and entries of rejected tokens are never read."""
    setup = Setup(area="long", ring_tokens=1 + drafts, drafts=drafts, blocks=blocks)
    assert torch.equal(layer(recipe).run([17] + [1] * 33, setup), whole(recipe))


def test_rings_without_room_for_drafts_are_noticed_by_that_test():
    """One token of room too little is a spare row; two make a draft overwrite a row that the next token reads."""
    setup = Setup(area="long", ring_tokens=3, drafts=4, poison=0)
    assert not torch.equal(layer(FP32).run([17] + [1] * 33, setup), whole(FP32))


def same_bytes(pools: Pools, others: Pools) -> list[str]:
    """The pools whose bytes differ."""
    return [name for name, one in pools.storages().items() if not torch.equal(one, others.storages()[name])]


def check_step_area(recipe: Recipe, ratio: int, overlap: bool) -> None:
    one = layer(recipe, ratio, overlap)
    setup = Setup(tokens_per_page=2 * ratio)
    expected, in_rings = one.steps(TOGETHER, setup)
    for pool in in_rings.saved.values():
        assert bool(pool.storage.ne(0xFF).any())
    for area in ("long", "always"):
        outputs, in_step = one.steps(TOGETHER, dataclasses.replace(setup, area=area))
        assert same(outputs, expected) and same_bytes(in_rings, in_step) == []


@pytest.mark.parametrize("recipe, ratio, overlap", [(FP4, 4, True), (FP8, 2, True), (FP32, 5, True), (FP32, 8, False)])
def test_the_step_area_leaves_the_bytes_of_the_rings(recipe, ratio, overlap):
    """Outputs, entries, keys, rings, and the snapshots of every page boundary inside a step."""
    check_step_area(recipe, ratio, overlap)


def test_a_later_token_changes_no_earlier_output():
    """Causality, for every token: outputs before it keep their bits, its own changes."""
    expected = whole(FP32, num_tokens=26)
    changed = Layer(FP32, 4, True, 26, seed=7 * 4 + 26)
    for token in range(26):
        inputs = (changed.kv, changed.raw, changed.index_raw)
        before = [rows[0, token].clone() for rows in inputs]
        for rows in inputs:
            rows[0, token] += 1.0
        differs = (changed.run([26]) != expected).flatten(1).any(1)
        for rows, row in zip(inputs, before, strict=True):
            rows[0, token] = row
        assert not bool(differs[:token].any()) and bool(differs[token])


def test_the_completing_token_sees_its_entry():
    """Token 3 completes entry 0: its raw row reaches its own output through the entry, and no earlier one."""
    changed = Layer(FP32, 4, True, 50, seed=7 * 4 + 50)
    changed.raw[0, 3] += torch.randn(changed.raw.shape[2])
    differs = (changed.run([50]) != whole(FP32)).flatten(1).any(1).tolist()
    assert differs[:4] == [False, False, False, True]


# --- faults: decoding is compared with prefill, and the comparison has to notice ---

ZEROS = Setup(poison=0)


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
    prefill = layer().run([50], ZEROS, faults)
    assert torch.equal(layer().run([30] + [1] * 20, ZEROS), whole())
    assert not torch.equal(layer().run([30] + [1] * 20, ZEROS, faults), prefill)


@pytest.mark.parametrize("fault", ["nothing kept", "one row too few kept", "first rows kept"])
def test_rows_that_do_not_reach_the_rings_are_caught(fault, monkeypatch):
    """A prefill through the step area whose rows do not all go to the rings: the decoding after it notices."""
    setup = Setup(area="long", ring_tokens=1, poison=0)
    right = PLAN._ring_slots

    def wrong(slots, kept, tables, out, in_rings):
        right(slots, kept, tables, out, in_rings)
        if fault == "one row too few kept" and not in_rings:
            kept[-2] = -1
        if fault == "first rows kept" and not in_rings:
            kept.copy_(kept.flip(0))

    monkeypatch.setattr(PLAN, "_ring_slots", wrong)
    faults = Faults(keep_rows=fault != "nothing kept")
    assert not torch.equal(layer().run([37] + [1] * 13, setup, faults), whole())


def test_a_snapshot_of_other_rows_is_caught(monkeypatch):
    """Snapshots taken from the rings alone lack the rows of the step, as long as these lie in the step area."""
    right = save_rows
    monkeypatch.setitem(globals(), "save_rows", lambda ring, step, *rest: right(ring, None, *rest))
    with pytest.raises(AssertionError, match="saved"):
        check_step_area(FP4, 4, True)


def test_entries_from_the_future_are_caught():
    """One entry too many reads later tokens in prefill, and in decode a row that nobody has written."""
    faults, setup = Faults(visible_ahead=1), Setup(tokens_per_page=256)
    with pytest.raises(ValueError, match="NaN"):
        layer().run([1] * 50, setup, faults)
    setup = dataclasses.replace(setup, poison=0)
    assert not torch.equal(layer().run([1] * 50, setup, faults), layer().run([50], setup, faults))


def test_swapped_halves_change_the_first_entry(monkeypatch):
    """Overlap halves swapped: still causal and still equal in decode, but the first entry (token 3) is another one."""

    def swapped(x: torch.Tensor, ratio: int) -> torch.Tensor:
        before, own = x.chunk(2, dim=-1)
        return torch.cat((own[:, :ratio], before[:, ratio:]), dim=1)

    right = whole(FP32)
    monkeypatch.setattr(COMPRESS, "_overlapped", swapped)
    wrong = layer(FP32).run([50])
    assert torch.equal(wrong[:3], right[:3]) and not torch.equal(wrong[3], right[3])


def test_rings_too_small_for_a_chunk_are_refused(monkeypatch):
    """A chunk longer than its ring would overwrite rows that the same step still reads."""
    with pytest.raises(ValueError, match="appears twice"):
        layer().run([WINDOW + 9], Setup(ring_tokens=8))
    monkeypatch.setitem(globals(), "state_capacity", lambda *_: 19)
    with pytest.raises(ValueError, match="appears twice"):
        layer().run([10, 20, 20])
