# SPDX-License-Identifier: Apache-2.0
"""The engine over a model that costs nothing: requests come, run together, and go; what they get never changes."""

from __future__ import annotations

import pathlib
import random

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from megamoe.engine.config import EngineConfig
from megamoe.engine.engine import Engine
from megamoe.engine.outputs import QueueFull, RequestOutput
from megamoe.engine.request import NewRequest
from megamoe.engine.sampling_params import SamplingParams

from ..fakes import BOS, EOS, FakeConfig, FakeModel, FakeSharedCache, next_after

NOWHERE = pathlib.Path("nowhere")
CONFIG = FakeConfig(vocab_size=64, max_position_embeddings=200)


def spread(ids: list[int]) -> torch.Tensor:
    """Return logits that depend on all ids, with an end-of-sequence id that comes up now and then."""
    generator = torch.Generator().manual_seed(sum((idx + 1) * token_id for idx, token_id in enumerate(ids)) % 2**31)
    return torch.randn(CONFIG.vocab_size, generator=generator) * 2


def make_engine(rule=spread, *, wrong_every: int = 3, **config: object) -> Engine:
    return Engine(FakeModel(NOWHERE, rule, CONFIG, wrong_every=wrong_every), EngineConfig(**config))  # type: ignore


def collect(engine: Engine, outputs: dict[str, list[RequestOutput]] | None = None) -> dict[str, list[RequestOutput]]:
    outputs = {} if outputs is None else outputs
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def tokens_of(outputs: list[RequestOutput]) -> tuple[list[int], list[object], str | None]:
    """Return a request's tokens, logprobs and reason, however many steps they took."""
    assert all(output.finish_reason is None for output in outputs[:-1])
    logprobs = [one for output in outputs for one in output.logprobs or ()]
    return [token for output in outputs for token in output.token_ids], logprobs, outputs[-1].finish_reason


def random_requests(seed: int, count: int = 14) -> dict[str, tuple[list[int], SamplingParams]]:
    """Return requests of every kind; many begin alike."""
    rng = random.Random(seed)
    trunk = [BOS, *(rng.randrange(2, 64) for _ in range(60))]
    requests = {}
    for idx in range(count):
        prompt = trunk[: rng.choice([1, 7, 8, 9, 16, 17, 33, 40])] + [
            rng.randrange(2, 64) for _ in range(rng.randrange(9))
        ]
        options: list[dict[str, object]] = [
            {},
            {"temperature": 0.8, "seed": idx},
            {"temperature": 1.5, "seed": 7, "top_k": 20, "min_p": 0.02, "logprobs": 2},
            {"logprobs": 0, "ignore_eos": True},
            {"temperature": 1.0, "seed": idx, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
            {"temperature": 1.0, "seed": idx, "logit_bias": {EOS: 4.0}, "min_tokens": 3, "logprobs": 1},
            {"stop_token_ids": tuple(range(2, 30))},
        ]
        params = SamplingParams(max_tokens=rng.randint(3, 45), **rng.choice(options))  # type: ignore[arg-type]
        requests[f"r{idx}"] = (prompt, params)
    return requests


@pytest.fixture(scope="module")
def solo() -> dict[int, dict[str, tuple[list[int], list[object], str | None]]]:
    """What every request of some seeds gets alone, without drafts, in single tokens."""
    found = {}
    for seed in range(4):
        found[seed] = {}
        for request_id, (prompt, params) in random_requests(seed).items():
            engine = make_engine(max_sequences=1, max_step_tokens=1, prefill_chunk=1, prefix_cache=False)
            engine.add(request_id, prompt, params)
            found[seed][request_id] = tokens_of(collect(engine)[request_id])
    return found


# known answers


def test_one_request() -> None:
    engine = make_engine(rule=lambda ids: 2 + len(ids))
    engine.add("a", [BOS, 5, 6], SamplingParams(max_tokens=3))
    outputs = collect(engine)["a"]
    assert [output.token_ids for output in outputs] == [(5,), (6,), (7,)]
    assert [output.finish_reason for output in outputs] == [None, None, "length"]
    assert outputs[0].prompt_tokens == 3 and outputs[0].cached_tokens == 0 and outputs[0].logprobs is None
    assert engine.step() == []


def test_drafts_that_are_right_come_in_one_step() -> None:
    engine = make_engine(rule=lambda ids: 2 + len(ids), wrong_every=1000, speculative_tokens=3)
    engine.add("a", [BOS, 5, 6], SamplingParams(max_tokens=10))
    outputs = collect(engine)["a"]
    assert [len(output.token_ids) for output in outputs] == [1, 4, 4, 1]
    stats = engine.stats()
    assert (stats.draft_tokens, stats.accepted_tokens, stats.steps) == (6, 6, 4)
    assert stats.acceptance_rate == 1.0


def test_drafts_that_are_wrong_cost_steps_alone() -> None:
    engine = make_engine(rule=lambda ids: 2 + len(ids), wrong_every=1, speculative_tokens=3)
    engine.add("a", [BOS, 5, 6], SamplingParams(max_tokens=10))
    assert [len(output.token_ids) for output in collect(engine)["a"]] == [1] * 10
    assert engine.stats().acceptance_rate == 0.0


def test_a_stop_inside_right_drafts_ends_there() -> None:
    engine = make_engine(rule=lambda ids: 2 + len(ids), wrong_every=1000, speculative_tokens=3)
    engine.add("a", [BOS, 5, 6], SamplingParams(max_tokens=10, stop_token_ids=(7,)))
    outputs = collect(engine)["a"]
    assert tokens_of(outputs)[0] == [5, 6, 7] and outputs[-1].finish_reason == "stop"
    assert engine.stats().generated_tokens == 3 and engine.stats().pages_used == 0


def test_eos_stops_unless_ignored() -> None:
    engine = make_engine(rule=lambda ids: EOS if len(ids) == 4 else next_after(ids) % 60 + 2)
    engine.add("a", [BOS, 5], SamplingParams(max_tokens=6))
    engine.add("b", [BOS, 5], SamplingParams(max_tokens=6, ignore_eos=True))
    outputs = collect(engine)
    assert tokens_of(outputs["a"])[0][-1] == EOS and tokens_of(outputs["a"])[2] == "stop"
    assert len(tokens_of(outputs["b"])[0]) == 6 and tokens_of(outputs["b"])[2] == "length"


def test_no_tokens_wanted() -> None:
    engine = make_engine()
    engine.add("a", [BOS], SamplingParams(max_tokens=0))
    assert engine.has_work()
    (output,) = engine.step()
    assert (output.token_ids, output.finish_reason) == ((), "length")
    assert not engine.has_work() and engine.stats().steps == 0


def test_the_longest_sequence_ends_requests() -> None:
    engine = make_engine(max_sequence_tokens=10)
    engine.add("a", [BOS] * 8, SamplingParams(max_tokens=100, ignore_eos=True))
    tokens, _, reason = tokens_of(collect(engine)["a"])
    assert len(tokens) == 3 and reason == "length"


class Alternate:
    """Allows even tokens after odd ones and the other way round; ends after five."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allowed(self) -> torch.Tensor | None:
        if len(self.accepted) == 5:
            return torch.zeros(64, dtype=torch.bool)
        return torch.arange(64) % 2 == len(self.accepted) % 2

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


@pytest.mark.parametrize("speculative_tokens", [0, 2])
def test_a_filter_is_asked_and_told_once_per_token(speculative_tokens: int) -> None:
    engine = make_engine(speculative_tokens=speculative_tokens)
    grammar = Alternate()
    engine.add("a", [BOS, 9], SamplingParams(max_tokens=9, ignore_eos=True), logits_filter=grammar)
    engine.add("b", [BOS, 9], SamplingParams(max_tokens=9, ignore_eos=True))
    outputs = collect(engine)
    tokens, _, reason = tokens_of(outputs["a"])
    assert tokens == grammar.accepted and [token % 2 for token in tokens] == [0, 1, 0, 1, 0] and reason == "stop"
    assert len(tokens_of(outputs["b"])[0]) == 9


# properties: invariance


CONFIGS = {
    "batch": {},
    "two at a time": {"max_sequences": 2},
    "small chunks": {"prefill_chunk": 3, "max_step_tokens": 11},
    "large pages": {"tokens_per_page": 32},
    "no reuse": {"prefix_cache": False},
    "few snapshots": {"num_snapshots": 2, "num_pages": 60},
    "few pages": {"num_pages": 12, "max_sequence_tokens": 96},
    "drafts": {"speculative_tokens": 1},
    "many drafts, few pages": {"speculative_tokens": 4, "num_pages": 13, "max_sequence_tokens": 96},
    "drafts, small chunks": {"speculative_tokens": 2, "prefill_chunk": 3, "max_step_tokens": 24},
}


@pytest.mark.parametrize("config", list(CONFIGS.values()), ids=list(CONFIGS))
@pytest.mark.parametrize("seed", range(4))
def test_company_changes_nothing(config: dict[str, int], seed: int, solo) -> None:
    """Tokens, log-probabilities (to the bit) and reasons are those of the request alone."""
    engine = make_engine(**config)
    outputs: dict[str, list[RequestOutput]] = {}
    rng = random.Random(seed)
    for request_id, (prompt, params) in random_requests(seed).items():
        engine.add(request_id, prompt, params)
        for _ in range(rng.randrange(4)):
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
    collect(engine, outputs)
    assert {request_id: tokens_of(found) for request_id, found in outputs.items()} == solo[seed]
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.pages_used, stats.finished) == (0, 0, 0, 14)
    if config.get("num_pages", 100) < 20 and seed != 2:
        assert stats.preemptions > 0, "this case must preempt"
    if config.get("prefix_cache", True) and "num_pages" not in config:
        assert stats.prefix_hit_tokens > 0 or config.get("tokens_per_page")
    engine.reset_prefix_cache()
    assert engine.stats().pages_cached == 0 and engine._pages.num_free_pages == engine._pages.num_pages


@pytest.mark.parametrize("speculative_tokens", [0, 2])
@pytest.mark.parametrize("seed", range(4))
def test_neighbours_that_are_aborted_change_nothing(speculative_tokens: int, seed: int, solo) -> None:
    engine = make_engine(speculative_tokens=speculative_tokens, num_pages=30)
    requests = random_requests(seed)
    for request_id, (prompt, params) in requests.items():
        engine.add(request_id, prompt, params)
    rng, outputs, aborted = random.Random(seed), {}, set()
    while engine.has_work():
        if rng.random() < 0.3:
            victim = rng.choice(sorted(requests))
            if engine.abort(victim):
                aborted.add(victim)
                assert victim not in {request.request_id for request in engine._scheduler.running}
        for output in engine.step():
            assert output.request_id not in aborted
            outputs.setdefault(output.request_id, []).append(output)
    assert aborted and engine.stats().aborted == len(aborted) and engine.stats().pages_used == 0
    for request_id in set(requests) - aborted:
        assert tokens_of(outputs[request_id]) == solo[seed][request_id]


SOLO: dict[tuple[tuple[int, ...], int, int, float], object] = {}


def alone(prompt: list[int], seed: int, max_tokens: int, temperature: float) -> object:
    """Return what a request gets alone, remembered."""
    key = (tuple(prompt), seed, max_tokens, temperature)
    if key not in SOLO:
        engine = make_engine(max_sequences=1, prefix_cache=False)
        engine.add("a", prompt, SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, logprobs=1))
        SOLO[key] = tokens_of(collect(engine)["a"])
    return SOLO[key]


@hypothesis.settings(max_examples=40, stateful_step_count=40)
class Server(RuleBasedStateMachine):
    """Requests come, go and are aborted in any order over few pages; each gets what it gets alone, no page is lost."""

    @initialize(
        num_pages=strategies.integers(6, 20),
        drafts=strategies.sampled_from([0, 0, 1, 3]),
        snapshots=strategies.integers(0, 8),
        chunk=strategies.integers(4, 20),
        rings=strategies.integers(1, 4),
    )
    def start(self, num_pages: int, drafts: int, snapshots: int, chunk: int, rings: int) -> None:
        self.engine = make_engine(
            num_pages=num_pages,
            speculative_tokens=drafts,
            num_snapshots=snapshots,
            prefill_chunk=chunk,
            max_sequences=rings,
            max_step_tokens=rings * (1 + drafts) + 7,
        )
        self.wanted: dict[str, tuple[list[int], int, int, float]] = {}
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.next_id = 0

    @rule(
        length=strategies.integers(1, 30),
        tail=strategies.integers(2, 4),
        max_tokens=strategies.integers(1, 15),
        greedy=strategies.booleans(),
    )
    def add(self, length: int, tail: int, max_tokens: int, greedy: bool) -> None:
        request_id, self.next_id = str(self.next_id), self.next_id + 1
        prompt = [BOS, *range(10, 10 + length), tail]
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0 if greedy else 1.0, seed=tail, logprobs=1)
        self.engine.add(request_id, prompt, params)
        self.wanted[request_id] = (prompt, tail, max_tokens, params.temperature)

    @rule(count=strategies.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            for output in self.engine.step():
                self.outputs.setdefault(output.request_id, []).append(output)

    @rule(pick=strategies.integers(0, 100))
    def abort(self, pick: int) -> None:
        if self.wanted:
            request_id = sorted(self.wanted)[pick % len(self.wanted)]
            if self.engine.abort(request_id):
                del self.wanted[request_id]
                self.outputs.pop(request_id, None)

    @rule()
    def forget_prefixes(self) -> None:
        self.engine.reset_prefix_cache()

    @invariant()
    def pages_add_up(self) -> None:
        engine = self.engine
        held = {page for one in engine._pages.sequence_ids for page in engine._pages.block_table(one)}
        kept = set(engine._prefix.pages()) if engine._prefix else set()
        assert len(held | kept) == engine._pages.num_pages - engine._pages.num_free_pages
        assert engine.stats().pages_used == len(held)
        assert len(engine._pages.sequence_ids) == engine.stats().running

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        collect(self.engine, self.outputs)
        assert self.engine.stats().pages_used == 0
        for request_id, wanted in self.wanted.items():
            assert tokens_of(self.outputs[request_id]) == alone(*wanted)
        assert set(self.outputs) == set(self.wanted)


TestServer = Server.TestCase


def test_speculation_leaves_the_distribution_alone() -> None:
    """Three tokens from each of 3000 seeds, by drafts from a wrong distribution: chi-square of the third token."""
    base = torch.tensor([-9.0, -9.0, 1.0, 0.0, 0.5, -0.5, *[-9.0] * 58])

    def rule(ids: list[int]) -> torch.Tensor:
        return base.roll(ids[-1] % 2)

    engine = make_engine(rule, wrong_every=2, speculative_tokens=2, max_sequences=64, max_step_tokens=400)
    third: list[int] = []
    for seed in range(3000):
        engine.add(str(seed), [BOS], SamplingParams(max_tokens=3, temperature=1.0, seed=seed, ignore_eos=True))
        if seed % 250 == 249:
            third += [tokens_of(found)[0][2] for found in collect(engine).values()]
    first = base.double().softmax(0)
    probabilities = first.clone() * 0
    for one in range(64):
        second = base.roll(one % 2).double().softmax(0)
        for two in range(64):
            probabilities += first[one] * second[two] * base.roll(two % 2).double().softmax(0)
    observed = torch.bincount(torch.tensor(third), minlength=64).double()
    used = probabilities * 3000 >= 5
    assert int(used.sum()) == 5 and 0 < engine.stats().acceptance_rate < 1
    statistic = float((((observed - probabilities * 3000)[used]) ** 2 / (probabilities * 3000)[used]).sum())
    assert statistic < 20.5, "chi-square with 5 degrees of freedom exceeds this once in a thousand"


def test_a_seedless_request_draws_its_own_numbers() -> None:
    engine = make_engine(rule=lambda ids: torch.zeros(64))
    for name in "ab":
        engine.add(name, [BOS], SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True))
    outputs = collect(engine)
    assert tokens_of(outputs["a"])[0] != tokens_of(outputs["b"])[0]


def test_an_id_can_be_used_again() -> None:
    engine = make_engine()
    for _ in range(2):
        engine.add("a", [BOS, 5], SamplingParams(max_tokens=4))
        assert engine.abort("a") and not engine.abort("a")
        engine.add("a", [BOS, 5], SamplingParams(max_tokens=4))
        engine.step()
        collect(engine)
        assert not engine.abort("a")


def test_a_conversation_reuses_its_own_answer() -> None:
    engine = make_engine()
    prompt = [BOS, *range(2, 22)]
    engine.add("a", prompt, SamplingParams(max_tokens=12, ignore_eos=True))
    answer = tokens_of(collect(engine)["a"])[0]
    engine.add("b", [*prompt, *answer, 7], SamplingParams(max_tokens=2))
    (output, *_) = collect(engine)["b"]
    assert output.cached_tokens == (len(prompt) + len(answer) - 1) // 8 * 8 == 32
    assert engine.stats().prefix_hit_rate == 32 / (21 + 34)


# injected faults: the comparisons above must notice


def faulty_run(seed: int, solo, **config: int) -> bool:
    """Return whether a run differs from the solo runs, or dies."""
    engine = make_engine(**config)
    for request_id, (prompt, params) in random_requests(seed).items():
        engine.add(request_id, prompt, params)
    try:
        outputs = collect(engine)
    except (AssertionError, IndexError):
        return True
    return {request_id: tokens_of(found) for request_id, found in outputs.items()} != solo[seed]


def test_f22_a_prefix_without_its_rings_is_noticed(solo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeSharedCache, "restore", lambda self, snapshot, ring, length: self.rings[ring].fill(-2))
    assert any(faulty_run(seed, solo) for seed in range(4))


def test_f22_a_snapshot_of_another_ring_is_noticed(solo, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FakeSharedCache.save
    monkeypatch.setattr(
        FakeSharedCache, "save", lambda self, ring, length, snapshot: right(self, (ring + 1) % 8, length, snapshot)
    )
    assert any(faulty_run(seed, solo) for seed in range(4))


def test_drafts_accepted_unseen_are_noticed(solo, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Engine._take

    def wrong(self, chunk, sampled, row):
        sampled.token_ids[row : row + chunk.num_drafts] = chunk.request.drafts
        return right(self, chunk, sampled, row)

    monkeypatch.setattr(Engine, "_take", wrong)
    assert faulty_run(0, solo, speculative_tokens=2)


def test_numbers_drawn_in_order_of_steps_are_noticed(solo, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter(range(10**9))
    monkeypatch.setattr(
        "megamoe.engine.sampler.uniforms", lambda seeds, _: np.array([next(drawn) % 97 / 97 for _ in seeds], np.float32)
    )
    assert faulty_run(0, solo)


# refusals


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt: got no token ids"),
        ([BOS] * 201, {}, "prompt: got 201 tokens; the context of model 'fake' is 200 tokens. Shorten"),
        ([64], {}, "prompt: token ids must be 0 to 63; got 64"),
        ([-1], {}, "prompt: token ids must be 0 to 63; got -1"),
        ([BOS], {"logit_bias": {64: 1.0}}, "logit_bias must name ids 0 to 63; got 64"),
        ([BOS], {"stop_token_ids": (99,)}, "stop_token_ids must name ids 0 to 63; got 99"),
        ([BOS] * 30, {"max_tokens": 12}, "request: 41 tokens need 6 pages of 8; the engine has 5. Lower max_tokens"),
    ],
    ids=str,
)
def test_bad_requests(prompt: list[int], params: dict[str, object], message: str) -> None:
    engine = make_engine(num_pages=5)
    with pytest.raises(ValueError, match=message):
        engine.add("a", prompt, SamplingParams(**params))  # type: ignore[arg-type]
    assert not engine.has_work()
    engine.add("a", [BOS] * 30, SamplingParams(max_tokens=11))
    with pytest.raises(ValueError, match="request: 'a' is not finished"):
        engine.add("a", [BOS], SamplingParams())


def test_a_full_queue() -> None:
    engine = make_engine(max_sequences=1, max_waiting=2)
    for name in "abc":
        engine.add(name, [BOS], SamplingParams(max_tokens=3, ignore_eos=True))
    with pytest.raises(QueueFull, match="3 requests wait, and with 1 more it would be more than may") as caught:
        engine.add("d", [BOS], SamplingParams())
    assert caught.value.retry_after_s >= 1
    engine.step()
    with pytest.raises(QueueFull, match="2 requests wait"):
        engine.add("d", [BOS], SamplingParams())
    assert engine.stats().waiting == 2 and engine.stats().running == 1
    engine.abort("b")
    engine.add("d", [BOS], SamplingParams(max_tokens=1))
    assert sorted(collect(engine)) == ["a", "c", "d"]


def test_requests_are_taken_together_or_not_at_all() -> None:
    engine = make_engine(max_sequences=2, max_waiting=3)

    def group(names: str, prompt: tuple[int, ...] = (BOS,)) -> list[NewRequest]:
        return [NewRequest(name, prompt, SamplingParams(max_tokens=2, ignore_eos=True)) for name in names]

    for requests, message in (
        ([*group("ab"), *group("c", (64,))], "token ids must be 0 to 63; got 64"),
        (group("aba"), "'a' is not finished"),
        (group("abcdef"), "6 sequences must be taken together; the engine has room for 5"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add_all(requests)
        assert not engine.has_work()
    engine.add_all(group("abc"))
    with pytest.raises(QueueFull, match="3 requests wait, and with 3 more") as caught:
        engine.add_all(group("def"))
    assert caught.value.retry_after_s == 3.0, "three have to end first"
    engine.add_all(group("de"))
    assert sorted(collect(engine)) == ["a", "b", "c", "d", "e"]
