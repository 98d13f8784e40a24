# SPDX-License-Identifier: Apache-2.0
"""An error in any stage of a step ends the request it belongs to, and changes nothing for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import megamoe.engine.sampler as sampler
from megamoe.engine.containment import Contained
from megamoe.engine.engine import Engine
from megamoe.engine.outputs import RequestOutput
from megamoe.engine.request import Request
from megamoe.engine.sampling_params import SamplingParams

from ..fakes import BOS
from .test_engine import collect, make_engine, spread, tokens_of

TRUNK = [BOS, *range(2, 21)]  # two pages of eight, and a part of a third
NEIGHBOURS: dict[str, tuple[list[int], SamplingParams]] = {
    "a": (TRUNK, SamplingParams(max_tokens=24, ignore_eos=True, logprobs=1)),
    "b": ([BOS, 7], SamplingParams(max_tokens=30, temperature=0.9, seed=5)),
    "c": (TRUNK[:9], SamplingParams(max_tokens=20, temperature=1.0, seed=6, repetition_penalty=1.2, min_tokens=4)),
}
VICTIM = (TRUNK, SamplingParams(max_tokens=20, temperature=1.0, seed=3, ignore_eos=True, logprobs=2))


class Injected(Exception):
    """What a stage is made to fail with."""


class Everything:
    """A filter that allows all, for the stages that only filters have."""

    def allowed(self) -> torch.Tensor | None:
        return None

    def accept(self, token_id: int) -> None:
        pass


def victim_of(engine: Engine) -> Request | None:
    return engine._requests.get("victim")


def fails_if(owner: Any, name: str, is_its: Callable[..., bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a function raise where its arguments belong to the victim."""
    right = getattr(owner, name)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        if is_its(*args, **kwargs):
            raise Injected(name)
        return right(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrong)


def inject(engine: Engine, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one stage of a step fail for the victim."""

    def number() -> int:
        victim = victim_of(engine)
        return -1 if victim is None else victim.number

    def ring() -> int | None:
        victim = victim_of(engine)
        return None if victim is None else victim.ring

    def is_victims(requests: Any) -> bool:
        return any(request is victim_of(engine) for request in requests)

    last_rings: list[Any] = [()]

    def planned(batch: Any) -> bool:
        last_rings[0] = batch.rings.tolist()
        return False

    fails_if(engine._cache, "plan", planned, monkeypatch)

    def in_batch(*_: Any) -> bool:
        return ring() is not None and ring() in last_rings[0]

    match stage:
        case "match":
            fails_if(engine._prefix, "match", lambda ids: engine._scheduler._turn is victim_of(engine), monkeypatch)
        case "alloc":
            fails_if(engine._pages, "alloc", lambda one, *_, **__: one == number(), monkeypatch)
        case "extend":
            fails_if(engine._pages, "extend", lambda one, *_: one == number(), monkeypatch)
        case "restore":
            fails_if(engine._cache, "restore", lambda snapshot, one, length: one == ring(), monkeypatch)
        case "restore drafts":
            fails_if(engine._drafter, "restore", lambda snapshot, one, length: one == ring(), monkeypatch)
        case "plan":
            fails_if(engine._cache, "plan", lambda batch: ring() in batch.rings.tolist(), monkeypatch)
        case "run":
            fails_if(engine.model, "run", in_batch, monkeypatch)
        case "logits":
            fails_if(engine.model, "logits_of", in_batch, monkeypatch)
        case "draw":
            fails_if(sampler, "_draw", lambda logits, requests, ahead: is_victims(requests), monkeypatch)
        case "logprobs":
            fails_if(sampler, "_with_logprobs", lambda *arguments: is_victims(arguments[-1]), monkeypatch)
        case "allowed" | "accept":
            fails_if(Everything, stage, lambda *_: True, monkeypatch)
        case "take":
            fails_if(engine, "_take", lambda chunk, *_: chunk.request is victim_of(engine), monkeypatch)
        case "draft":
            fails_if(
                engine._drafter, "observe", lambda hidden, commit, *_: ring() in commit.rings.tolist(), monkeypatch
            )
        case "insert":
            fails_if(
                engine._prefix,
                "insert",
                lambda ids, *_: victim_of(engine) and ids is victim_of(engine).ids,
                monkeypatch,
            )
        case "save":
            fails_if(engine._cache, "save", lambda one, *_: one == ring(), monkeypatch)


STAGES = "match alloc extend restore plan run logits draw logprobs allowed accept take insert save".split()
DRAFT_STAGES = ["restore drafts", "draft"]


def serve(engine: Engine, outputs: dict[str, list[RequestOutput]], *, late: bool) -> None:
    """Let the neighbours run, the victim come in the middle, and all end."""
    for request_id, (prompt, params) in NEIGHBOURS.items():
        engine.add(request_id, prompt, params)
    for _ in range(4 if late else 0):
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    engine.add("victim", *VICTIM, logits_filter=Everything() if late else None)
    collect(engine, outputs)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    engine = make_engine()
    outputs: dict[str, list[RequestOutput]] = {}
    serve(engine, outputs, late=True)
    return {request_id: tokens_of(found) for request_id, found in outputs.items()}


CASES = [(stage, count) for stage in STAGES for count in (0, 2)] + [(stage, 2) for stage in DRAFT_STAGES]


@pytest.mark.parametrize(("stage", "num_drafts"), CASES)
def test_an_error_ends_the_request_it_belongs_to(
    stage: str, num_drafts: int, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(speculative_tokens=num_drafts, num_pages=100, max_sequences=4)
    inject(engine, stage, monkeypatch)
    outputs: dict[str, list[RequestOutput]] = {}
    serve(engine, outputs, late=True)
    last = outputs["victim"][-1]
    assert last.finish_reason == "error" and isinstance(last.error, Injected) and last.token_ids == ()
    assert all(output.finish_reason is None for output in outputs["victim"][:-1])
    for request_id in NEIGHBOURS:
        assert tokens_of(outputs[request_id]) == undisturbed[request_id]
    stats = engine.stats()
    assert (stats.failed, stats.finished, stats.waiting, stats.running, stats.pages_used) == (1, 3, 0, 0, 0)
    assert len(engine._scheduler._free_rings) == 4
    # And nothing wrong was left behind for whoever comes next with the same tokens: every page of them may be found.
    monkeypatch.undo()
    longer = [*TRUNK, *undisturbed["victim"][0]]
    engine.add("again", longer, VICTIM[1])
    other = make_engine()
    other.add("again", longer, VICTIM[1])
    assert tokens_of(collect(engine)["again"]) == tokens_of(collect(other)["again"])
    engine.reset_prefix_cache()
    assert engine._pages.num_free_pages == 100


def test_an_error_of_all_is_an_error_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request is told; the engine is there for what comes when the trouble is over."""
    engine = make_engine()
    fails_if(engine.model, "run", lambda *_: True, monkeypatch)
    outputs: dict[str, list[RequestOutput]] = {}
    serve(engine, outputs, late=False)
    assert {request_id: [one.finish_reason for one in found] for request_id, found in outputs.items()} == {
        request_id: ["error"] for request_id in ("a", "b", "c", "victim")
    }
    monkeypatch.undo()
    engine.add("again", [BOS, 7], SamplingParams(max_tokens=3))
    assert tokens_of(collect(engine)["again"])[2] in ("stop", "length")


def test_logits_that_are_no_numbers_end_their_request(undisturbed: dict[str, Any]) -> None:
    """A NaN row is an error of its request and no end of another's."""

    def rule(ids: list[int]) -> torch.Tensor:
        logits = spread(ids)
        return torch.full_like(logits, torch.nan) if ids[1:3] == [40, 41] else logits

    engine = make_engine(rule=rule)
    engine.add("nan", [BOS, 40, 41], SamplingParams(max_tokens=9))
    outputs: dict[str, list[RequestOutput]] = {}
    serve(engine, outputs, late=True)
    assert [one.finish_reason for one in outputs["nan"]] == ["error"]
    assert "finite maximum and no NaN" in str(outputs["nan"][0].error)
    for request_id in NEIGHBOURS:
        assert tokens_of(outputs[request_id]) == undisturbed[request_id]


def test_a_row_with_nothing_left_ends_only_its_request(undisturbed: dict[str, Any]) -> None:
    """The model itself gives every token but its end no chance, and min_tokens forbids the end."""

    def rule(ids: list[int]) -> torch.Tensor:
        logits = spread(ids)
        if ids[1:3] == [40, 41]:
            logits[torch.arange(len(logits)) != 1] = -torch.inf
        return logits

    engine = make_engine(rule=rule)
    engine.add("dead", [BOS, 40, 41], SamplingParams(max_tokens=9, min_tokens=2))
    outputs: dict[str, list[RequestOutput]] = {}
    serve(engine, outputs, late=True)
    assert [(one.token_ids, one.finish_reason) for one in outputs["dead"]] == [((), "stop")]
    for request_id in NEIGHBOURS:
        assert tokens_of(outputs[request_id]) == undisturbed[request_id]


def test_a_vocabulary_of_stops_is_refused() -> None:
    engine = make_engine()
    stops = SamplingParams(max_tokens=4, min_tokens=1, stop_token_ids=tuple(range(64)))
    with pytest.raises(ValueError, match="min_tokens 1 leaves no token to choose"):
        engine.add("a", [BOS], stops)
    all_but_eos = tuple(token_id for token_id in range(64) if token_id != 1)
    with pytest.raises(ValueError, match="leaves no token to choose"):
        engine.add("a", [BOS], SamplingParams(max_tokens=4, min_tokens=1, stop_token_ids=all_but_eos))
    engine.add("a", [BOS], SamplingParams(max_tokens=4, min_tokens=4, stop_token_ids=all_but_eos, ignore_eos=True))
    assert tokens_of(collect(engine)["a"]) == ([1] * 4, [], "length"), "one token is left, again and again"
    engine.add("a", [BOS], SamplingParams(max_tokens=4, stop_token_ids=tuple(range(64))))
    assert tokens_of(collect(engine)["a"])[2] == "stop"


def test_what_is_not_contained() -> None:
    """The end of the process, and a device that is lost for every later call."""
    for error in (KeyboardInterrupt(), SystemExit(), torch.AcceleratorError("an illegal memory access")):
        with pytest.raises(type(error)), Contained():
            raise error
    with Contained() as fault:
        raise torch.OutOfMemoryError("too large")
    assert isinstance(fault.error, torch.OutOfMemoryError)
