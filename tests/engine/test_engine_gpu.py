# SPDX-License-Identifier: Apache-2.0
"""The engine over the bundled model on a GPU: after "ready" a decode step compiles, allocates and waits for nothing.

What requests get is compared with the same engine without graphs, in every bit, and with the CPU, within the error of
other orders of addition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megamoe.engine.config import EngineConfig
from megamoe.engine.engine import Engine
from megamoe.engine.outputs import RequestOutput
from megamoe.engine.runner import Graphs
from megamoe.engine.sampling_params import SamplingParams
from megamoe.engine.warm_up import run_every_bucket
from megamoe.kernels.store import store_for, target_of
from megamoe.models.deepseek_v4.model import Model
from megamoe.models.load import BUNDLED, load
from megamoe.text.tokenizer import Tokenizer

from ..gpu_watch import Seen, quiet
from ..lent import OUTSIDE_OF_GRAPHS, lend

pytestmark = pytest.mark.gpu

CONFIG = EngineConfig(max_sequences=5, max_step_tokens=300, prefill_chunk=200, num_pages=24, tokens_per_page=128)


@pytest.fixture(scope="module")
def lent_for_all() -> Iterator[list[str]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield lend(monkeypatch)


@pytest.fixture(scope="module", params=["w4a16", "w4a4"])
def model(request: pytest.FixtureRequest, lent_for_all: list[str]) -> Model:
    return load("tiny", recipe=request.param, device="cuda")


@pytest.fixture(scope="module")
def captures(lent_for_all: list[str]) -> None:
    inside = set(lent_for_all) - OUTSIDE_OF_GRAPHS
    if inside:
        pytest.skip(f"a decode step cannot be captured without a kernel for {', '.join(sorted(inside))}")


@pytest.fixture(scope="module")
def text() -> list[int]:
    sample = (BUNDLED["tiny"] / "sample.txt").read_text(encoding="utf-8")
    return [0, *Tokenizer(BUNDLED["tiny"]).encode(sample)]


class Watched(Graphs):
    """Graphs whose replays are watched."""

    def __init__(self) -> None:
        super().__init__(torch.device("cuda"))
        self.seen: list[Seen] = []

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        with quiet() as seen:
            super().replay(graph)
        self.seen.append(seen)


class Even:
    """A filter that allows even ids alone, and notes what it was told."""

    def __init__(self, vocab_size: int) -> None:
        self.told: list[int] = []
        self._allowed = torch.arange(vocab_size) % 2 == 0

    def allowed(self) -> torch.Tensor:
        return self._allowed

    def accept(self, token_id: int) -> None:
        self.told.append(token_id)


def requests(text: list[int]) -> dict[str, tuple[list[int], SamplingParams]]:
    """Return requests of every kind; two share a page, and some decode over the end of one."""
    greedy = {"max_tokens": 20, "ignore_eos": True}
    return {
        "short": (text[:1], SamplingParams(**greedy, logprobs=2)),
        "page": (text[:120], SamplingParams(**greedy)),
        "shares": (text[:128] + text[300:320], SamplingParams(**greedy, temperature=0.9, seed=3, top_p=0.9)),
        "long": (text[:400], SamplingParams(**greedy, logprobs=0)),
        "penalties": (
            text[40:60],
            SamplingParams(**greedy, temperature=0.7, seed=1, repetition_penalty=1.2, frequency_penalty=0.2),
        ),
        "least": (text[60:90], SamplingParams(max_tokens=12, min_tokens=8, top_k=20, temperature=1.0, seed=8)),
        "again": (text[:400], SamplingParams(**greedy, logprobs=0)),
    }


def serve(engine: Engine, text: list[int], *, abort: str | None = None) -> dict[str, list[RequestOutput]]:
    """Run all requests, which come a step apart, and one of which may be dropped."""
    found: dict[str, list[RequestOutput]] = {}

    def step() -> None:
        for output in engine.step():
            assert output.error is None, output.error
            found.setdefault(output.request_id, []).append(output)

    for name, (ids, params) in requests(text).items():
        engine.add(name, ids, params)
        step()
    even = Even(engine.model.config.vocab_size)
    engine.add("even", text[:70], SamplingParams(max_tokens=9, ignore_eos=True), logits_filter=even)
    if abort is not None:
        engine.abort(abort)
    while engine.has_work():
        step()
    assert len(even.told) == 9 and all(token_id % 2 == 0 for token_id in even.told)
    return found


def ready(model: Model, **options: Any) -> tuple[Engine, Watched]:
    runner = Watched()
    engine = Engine(model, dataclasses.replace(CONFIG, **options), runner=runner)
    run_every_bucket(engine)
    runner.seal()
    return engine, runner


def test_after_ready_replays_are_quiet_and_no_step_asks_for_a_segment(
    model: Model, text: list[int], captures: None
) -> None:
    engine, runner = ready(model)
    store = store_for(target_of(model.device))
    assert runner.buckets == [1, 2, 3, 4, 5]
    torch.cuda.synchronize()
    before, kernels = torch.cuda.memory_stats(), len(store.ledger)
    runner.seen.clear()
    first = serve(engine, text, abort="again")
    serve(engine, text)
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    print(f"{model.recipe.name}: {len(runner.seen)} replays; graphs {runner.num_bytes:,} bytes; {engine.stats()}")
    names = ("segment.all.allocated", "segment.all.current", "reserved_bytes.all.current", "allocated_bytes.all.peak")
    print({name: (before[name], after[name]) for name in names})
    assert len(runner.seen) > 30 and len(first["long"]) == 20
    assert set(map(dataclasses.astuple, runner.seen)) == {(0, 0, 0, 0)}
    assert after["segment.all.allocated"] == before["segment.all.allocated"]
    assert len(store.ledger) == kernels
    assert engine.stats().prefix_hit_tokens > 128


def test_replays_have_the_bits_of_calls(model: Model, text: list[int], captures: None) -> None:
    engine, _ = ready(model)
    called = Engine(model, dataclasses.replace(CONFIG, decode_graphs=False))
    assert serve(engine, text) == serve(called, text)
    engine.reset_prefix_cache()
    called.reset_prefix_cache()
    assert serve(engine, text, abort="page") == serve(called, text, abort="page")


def test_logprobs_are_the_cpus_within_the_error(model: Model, text: list[int]) -> None:
    beside = load("tiny", recipe=model.recipe.name)
    engine = Engine(model, dataclasses.replace(CONFIG, decode_graphs=False))
    found: list[RequestOutput] = []
    engine.add("one", text[:200], SamplingParams(max_tokens=24, ignore_eos=True, logprobs=3))
    while engine.has_work():
        found += engine.step()
    ids = text[:200] + [token for one in found for token in one.token_ids]
    want = beside.logits(ids[:-1])[199:].log_softmax(-1)
    got = [one for output in found for one in output.logprobs or ()]
    errors = [abs(one.logprob - float(want[at, ids[200 + at]])) for at, one in enumerate(got)]
    print(f"{model.recipe.name}: log-probabilities beside the CPU's: largest error {max(errors):.4f}")
    error = {"w4a16": 0.1, "w4a4": 0.5}[model.recipe.name]
    assert len(got) == 24 and sorted(errors)[12] < error and max(errors) < 5 * error


def test_drafts_run_beside_graphs(model: Model, text: list[int], captures: None) -> None:
    engine, runner = ready(model, speculative_tokens=1)
    assert runner.buckets == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    serve(engine, text)
    assert engine.stats().accepted_tokens > 0
    assert set(map(dataclasses.astuple, runner.seen)) == {(0, 0, 0, 0)}
    print(f"{model.recipe.name}: {engine.stats().acceptance_rate:.2f} of the drafts were right")
