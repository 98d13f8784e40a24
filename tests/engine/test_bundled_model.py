# SPDX-License-Identifier: Apache-2.0
"""The engine over the bundled model: every logit of every request has the bits of the plain model alone.

What is compared is all logits at all generated positions, not only the tokens: they are taken where the engine samples
and compared with one pass of the model over the finished sequence. On a GPU kernels add in other orders for other
numbers of tokens, so logits are compared there within the error of that; they must not be those of another sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

import megamoe
from megamoe.cache.pools import LayerPools
from megamoe.engine import engine as module
from megamoe.engine.config import EngineConfig
from megamoe.engine.engine import Engine
from megamoe.engine.sampling_params import SamplingParams
from megamoe.formats.cache_rows import CachePool
from megamoe.models.deepseek_v4 import cache as cache_module
from megamoe.models.deepseek_v4.model import Model
from megamoe.models.deepseek_v4.mtp_drafter import MtpDrafter
from megamoe.models.load import BUNDLED
from megamoe.text.tokenizer import Tokenizer
from megamoe.verify.text import errors_of

PAGE = 128
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def text() -> list[int]:
    sample = (BUNDLED["tiny"] / "sample.txt").read_text(encoding="utf-8")
    return [0, *Tokenizer(BUNDLED["tiny"]).encode(sample)]


@pytest.fixture(scope="module")
def model() -> Model:
    return megamoe.load("tiny")


@pytest.fixture(scope="module", params=DEVICES)
def any_model(request: pytest.FixtureRequest) -> Model:
    """The bundled model, on the CPU and on a GPU."""
    return megamoe.load("tiny", device=request.param)


def agree(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Return whether logits [N, V] are the same: every bit on the CPU, nearly all of nearly all rows on a GPU."""
    if got.device.type == "cpu":
        return torch.equal(got, want)
    errors = errors_of(got.cpu(), want.cpu()) / want.cpu().double().std(dim=-1)
    print(f"logits beside one pass: {', '.join(f'{float(one):.4f}' for one in errors)} of their spread")
    return float(errors.median()) < 0.05 and float((errors < 0.2).double().mean()) >= 0.8


class Recorder:
    """Keeps the logits behind every token; what a rejected draft led to is replaced by what came in its place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits: dict[tuple[str, int], torch.Tensor] = {}
        self.ids: dict[str, list[int]] = {}
        right = module.sample_rows

        def sample_rows(logits, requests, ahead):
            for row, request, offset in zip(logits, requests, ahead, strict=True):
                self.logits[request.request_id, len(request.ids) + offset] = row.clone()
                self.ids[request.request_id] = request.ids
            return right(logits, requests, ahead)

        monkeypatch.setattr(module, "sample_rows", sample_rows)

    def differs(self, model: Model, prompts: dict[str, list[int]]) -> list[str]:
        """Return the requests with a logit that is not the model's."""
        wrong = []
        for request_id, prompt in prompts.items():
            ids = self.ids[request_id]
            assert ids[: len(prompt)] == prompt and len(ids) > len(prompt)
            want = model.logits(ids[:-1])[len(prompt) - 1 :]
            got = torch.stack([self.logits[request_id, at] for at in range(len(prompt), len(ids))])
            if not agree(got, want):
                wrong.append(request_id)
        return wrong


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def run(engine: Engine, prompts: dict[str, list[int]], stagger: int = 0, **params: object) -> dict[str, list[int]]:
    """Add the prompts, some steps apart, run to the end and return the new tokens."""
    tokens: dict[str, list[int]] = {name: [] for name in prompts}

    def step() -> None:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids

    options = {"max_tokens": 8, "ignore_eos": True, "temperature": 0.9, **params}
    for idx, (name, prompt) in enumerate(prompts.items()):
        engine.add(name, prompt, SamplingParams(seed=idx, **options))  # type: ignore[arg-type]
        for _ in range(stagger):
            step()
    while engine.has_work():
        step()
    return tokens


def make(model: Model, **config: object) -> Engine:
    return Engine(model, EngineConfig(**{"tokens_per_page": PAGE, "num_pages": 40, **config}))  # type: ignore[arg-type]


# -- invariance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["exact", "w4a16", "w4a4"])
def test_batches_chunks_and_prefixes_change_no_logit(recipe: str, text: list[int], recorder: Recorder) -> None:
    """Five requests, three of which share a prefix that is a page, two pages, and two pages but for the last token."""
    model = megamoe.load("tiny", recipe=recipe)
    prompts = {
        "first": text[:270],
        "two pages": text[:256] + text[300:310],
        "a page": text[:200],
        "just a page": text[: PAGE + 1],
        "other": text[310:340],
    }
    engine = make(model, prefill_chunk=100, max_step_tokens=130, max_sequences=4)
    run(engine, prompts, stagger=3)
    assert recorder.differs(model, prompts) == []
    assert engine.stats().prefix_hit_tokens == 256 + 128 + 128


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_every_page_boundary_inside_one_chunk_can_be_continued(
    any_model: Model, text: list[int], recorder: Recorder, num_drafts: int
) -> None:
    """A chunk of four pages: rings hold its last rows alone, so three snapshots are taken while it runs."""
    engine = make(any_model, prefill_chunk=600, max_step_tokens=600, max_sequences=2, speculative_tokens=num_drafts)
    run(engine, {"first": text[: 4 * PAGE + 5]}, max_tokens=1)
    assert engine.stats().steps <= 2 and engine.plan.size.ring_tokens == 1 + num_drafts
    hits = 0
    for num_pages in (1, 2, 3, 4):
        shared = {f"{num_pages} pages": text[: num_pages * PAGE] + text[:20]}
        run(engine, shared)
        hits += num_pages * PAGE
        assert engine.stats().prefix_hit_tokens == hits and recorder.differs(any_model, shared) == []


def test_a_step_that_broke_off_in_the_middle_changes_no_logit(
    model: Model, text: list[int], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers have overwritten the neighbour's rings with its long chunk before the third fails for the victim."""
    prompts = {"neighbour": text[:150]}
    right, block = type(model.blocks[2]).__call__, model.blocks[2]

    def differs() -> list[str]:
        engine = make(model, max_sequences=2, prefill_chunk=64)
        engine.add("neighbour", prompts["neighbour"], SamplingParams(max_tokens=6, ignore_eos=True))
        engine.step()

        def call(self, streams, plan, pools):
            victim = engine._requests.get("victim")
            if self is block and victim is not None and victim.ring in plan.slots.requests.tolist():
                raise RuntimeError("injected")
            return right(self, streams, plan, pools)

        monkeypatch.setattr(type(block), "__call__", call)
        engine.add("victim", text[:40], SamplingParams(max_tokens=6))
        ends = {}
        while engine.has_work():
            ends |= {output.request_id: output.finish_reason for output in engine.step()}
        assert ends == {"neighbour": "length", "victim": "error"}
        return recorder.differs(model, prompts)

    assert differs() == []
    monkeypatch.setattr(Engine, "_rebuild", lambda self, chunk: None)
    assert differs() == ["neighbour"], "the fault that this test is for"


def test_preemption_changes_no_logit(any_model: Model, text: list[int], recorder: Recorder) -> None:
    prompts = {"old": text[:125], "young": text[200:326], "youngest": text[20:140]}
    engine = make(any_model, num_pages=5, prefill_chunk=64, max_sequence_tokens=400)
    run(engine, prompts, max_tokens=12)
    assert engine.stats().preemptions > 0
    assert recorder.differs(any_model, prompts) == []


def test_neighbours_that_are_aborted_change_no_logit(any_model: Model, text: list[int], recorder: Recorder) -> None:
    prompts = {"stays": text[:140]}
    engine = make(any_model, speculative_tokens=1)
    engine.add("goes", text[5:100], SamplingParams(max_tokens=50))
    engine.add("never runs", text[5:100], SamplingParams(max_tokens=50))
    engine.abort("never runs")
    for _ in range(3):
        engine.step()
    engine.add("stays", prompts["stays"], SamplingParams(max_tokens=8, ignore_eos=True))
    for _ in range(3):
        engine.step()
    assert engine.abort("goes")
    assert engine.stats().pages_used == 2
    while engine.has_work():
        engine.step()
    assert recorder.differs(any_model, prompts) == []


# -- speculation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafts_change_no_token_and_no_logit(
    model: Model, text: list[int], recorder: Recorder, temperature: float
) -> None:
    prompts = {"a": text[:118], "b": text[100:160], "c": text[:129]}
    plain = run(make(model), prompts, max_tokens=16, temperature=temperature)
    for speculative_tokens in (1, 3):
        engine = make(model, speculative_tokens=speculative_tokens, prefill_chunk=50)
        assert run(engine, prompts, 2, max_tokens=16, temperature=temperature) == plain
        assert recorder.differs(model, prompts) == []
        stats = engine.stats()
        assert 0 < stats.accepted_tokens < stats.draft_tokens, "some drafts must be right and some wrong"


def visible_rows(cache, ring: int, pages: list[int], length: int) -> list[torch.Tensor]:
    """Return the bytes of all rows that a sequence of `length` tokens can still read, layer by layer."""
    found = []
    for layer in (*cache.layers, *cache.draft_layers):
        for name, pool in ((one.name, getattr(layer, one.name)) for one in dataclasses.fields(LayerPools)):
            if not isinstance(pool, CachePool):
                continue
            if name in ("entries", "index_keys"):
                ratio = PAGE // pool.rows_per_block
                at = torch.arange(length // ratio)
                block, row = torch.tensor(pages)[at // pool.rows_per_block], at % pool.rows_per_block
            else:
                back = {"window": 127, "state": 128, "index_state": 8}[name]
                if name == "state" and layer.index_keys is not None:
                    back = 8
                first = length // 128 * 128 if name == "state" and layer.index_keys is None else length - back
                # An MTP row belongs to its position and the token after it: the newest one is not written yet.
                last = length - 1 if layer in cache.draft_layers else length
                at = torch.arange(max(0, first), last)
                block, row = torch.full_like(at, ring), at % pool.rows_per_block
            found += [pool.data_rows[block, row].clone(), pool.scale_rows[block, row].clone()]
    return found


def test_rejected_drafts_leave_every_cache_as_if_never_written(model: Model, text: list[int]) -> None:
    """Byte for byte: after the same tokens, with drafts of which many were wrong and with the right ones fed alone."""

    def rows_after(wrong: bool):
        engine = make(model, speculative_tokens=3, max_sequences=1, prefix_cache=False)
        engine.add("a", text[:122], SamplingParams(max_tokens=60, ignore_eos=True))
        (request,) = engine._requests.values()
        while len(request.ids) < 150:
            if not wrong:
                request.drafts = []
            elif request.drafts:
                request.drafts = [(one + len(request.ids) % 3) % 4096 for one in request.drafts]  # two of three wrong
            engine.step()
        pages = list(engine._pages.block_table(request.number))
        # The rows of the shorter sequence are compared; a right draft may have carried one run further.
        return list(request.ids), (engine._cache, request.ring, pages), request.num_computed

    ids, where, length = rows_after(wrong=False)
    other_ids, other_where, other_length = rows_after(wrong=True)
    common = min(length, other_length)
    assert ids[:common] == other_ids[:common] and abs(length - other_length) <= 3
    rows, other_rows = visible_rows(*where, common), visible_rows(*other_where, common)
    assert len(rows) == 2 * 15 and sum(row.numel() for row in rows) > 400_000
    assert all(torch.equal(one, other) for one, other in zip(rows, other_rows, strict=True))


def test_more_than_half_of_the_drafts_are_right(any_model: Model, text: list[int]) -> None:
    engine = make(any_model, speculative_tokens=1)
    prompts = {str(start): text[start : start + 40] for start in range(0, 320, 40)}
    run(engine, prompts, max_tokens=40, temperature=0.0)
    assert engine.stats().draft_tokens > 150 and engine.stats().acceptance_rate > 0.5


def test_f22_drafts_after_a_prefix_hit_are_those_without_one(
    model: Model, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage's rows are restored too: same guesses, hit or miss. The last row before the boundary is not shared."""
    prompts = {"first": text[:200], "other": text[:PAGE] + text[250:262], "same": text[:190]}

    def guesses(**config: object) -> tuple[list[object], int]:
        engine = make(model, speculative_tokens=2, max_sequences=1, **config)
        found, right = [], engine._drafter.observe

        def observe(hidden, commit, num_tokens, choose):
            drafts = right(hidden, commit, num_tokens, lambda logits, ahead: keep(logits, choose(logits, ahead)))
            return drafts

        def keep(logits, ids):
            found.append(logits.clone())
            return ids

        engine._drafter.observe = observe
        run(engine, prompts, temperature=0.0)
        return found, engine.stats().prefix_hit_tokens

    missed, num_missed = guesses(prefix_cache=False)
    hit, num_hit = guesses()
    assert (num_missed, num_hit) == (0, 2 * PAGE)
    assert len(hit) == len(missed) and all(torch.equal(one, two) for one, two in zip(hit, missed, strict=True))

    def stale(self: MtpDrafter, snapshot_idx: int, ring_idx: int, length: int) -> None:
        self._lengths[ring_idx] = length  # as if the row before the boundary were shared

    monkeypatch.setattr(MtpDrafter, "restore", stale)
    hit, _ = guesses()
    assert len(hit) != len(missed) or not all(torch.equal(one, two) for one, two in zip(hit, missed, strict=True))


# -- injected faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["window", "state", "index_state"])
def test_f22_each_kind_of_row_must_be_restored(
    model: Model, text: list[int], recorder: Recorder, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cache_module.restore

    def restore(layers: Sequence[LayerPools], snapshot_idx: int, ring_idx: int, length: int) -> None:
        assert any(getattr(layer.saved, part) is not None for layer in layers)
        without = [dataclasses.replace(one, saved=dataclasses.replace(one.saved, **{part: None})) for one in layers]
        right(without, snapshot_idx, ring_idx, length)

    monkeypatch.setattr(cache_module, "restore", restore)
    # Three pages: far more entries than the indexer selects, so that one wrong key shows in the following tokens.
    engine = make(model, max_sequences=2)
    run(engine, {"first": text[: 3 * PAGE + 10]}, max_tokens=1)
    second = {"between": text[300:340], "second": text[: 3 * PAGE] + text[280:340]}
    for layer in engine._cache.layers:
        pool = getattr(layer, part)
        if pool is not None:
            pool.storage.zero_()
    run(engine, second)
    assert engine.stats().prefix_hit_tokens == 3 * PAGE
    assert recorder.differs(model, second) == ["second"]


def test_hca_needs_no_raw_rows_at_a_page_boundary(any_model: Model, text: list[int], recorder: Recorder) -> None:
    engine = make(any_model, max_sequences=2)
    run(engine, {"first": text[:270]})
    for layer in engine._cache.layers:
        if layer.state is not None and layer.index_keys is None:
            layer.state.storage.fill_(0x55)
    second = {"second": text[:256] + text[260:290]}
    run(engine, second)
    assert engine.stats().prefix_hit_tokens == 256 and recorder.differs(any_model, second) == []


# -- layouts ----------------------------------------------------------------------------------------------------------


def packed(layers: tuple[LayerPools, ...], names: tuple[str, ...]) -> tuple[LayerPools, ...]:
    """Return the layers with the named pools side by side in common blocks: every block stride exceeds a page."""
    members = [(idx, name) for idx, layer in enumerate(layers) for name in names if getattr(layer, name) is not None]
    pools = [getattr(layers[idx], name) for idx, name in members]
    sizes = [-(-pool.page_bytes // 64) * 64 + 64 for pool in pools]
    block = torch.zeros(pools[0].num_blocks, sum(sizes), dtype=torch.uint8)
    result, offset = list(layers), 0
    for (idx, name), pool, size in zip(members, pools, sizes, strict=True):
        storage = block[:, offset : offset + pool.page_bytes]
        view = CachePool(storage, pool.rows_per_block, pool.row_format, pool.width)
        assert view.block_stride_bytes > view.page_bytes
        result[idx] = dataclasses.replace(result[idx], **{name: view})
        offset += size
    return tuple(result)


def test_layers_that_share_blocks_change_no_logit(model: Model, text: list[int], recorder: Recorder) -> None:
    """Pages of all layers side by side in one block, rings too: another engine's layout, the same operations."""
    prompts = {"a": text[:140], "b": text[100:170], "c": text[:135]}
    engine = make(model, prefill_chunk=90)
    layers = packed(engine._cache.layers, ("entries", "index_keys"))
    engine._cache.layers = packed(layers, ("window", "state", "index_state"))
    run(engine, prompts, stagger=2)
    assert recorder.differs(model, prompts) == [] and engine.stats().prefix_hit_tokens > 0


def test_pages_in_any_order_change_no_logit(any_model: Model, text: list[int], recorder: Recorder) -> None:
    engine = make(any_model)
    engine._pages._free.reverse()
    prompts = {"a": text[:300]}
    run(engine, prompts)
    assert recorder.differs(any_model, prompts) == []
