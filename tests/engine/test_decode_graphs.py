# SPDX-License-Identifier: Apache-2.0
"""A decode step is nothing but its operations: replayed from a recording, every step has the bits of its calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import megamoe
from megamoe.cache.buckets import bucket_of
from megamoe.engine.config import EngineConfig
from megamoe.engine.engine import Engine
from megamoe.engine.runner import Calls, Graphs, runner_for
from megamoe.engine.sampling_params import SamplingParams
from megamoe.engine.warm_up import run_every_bucket
from megamoe.models.deepseek_v4.attention import Attention
from megamoe.models.deepseek_v4.moe import Moe
from megamoe.ops import dispatch

from ..fakes import FakeModel
from ..host_reads import count_host_reads
from ..replayed_calls import ReplayedCalls

CONFIG = EngineConfig(max_sequences=5, max_step_tokens=200, prefill_chunk=120, num_pages=12, tokens_per_page=128)


def traffic(engine: Engine, max_tokens: int = 12) -> dict[str, list[int]]:
    """Run requests that come and go, over the end of a page, one of them from a prefix; return their tokens."""
    tokens: dict[str, list[int]] = {}
    prompts = [[0, *range(5, 5 + size)] for size in (0, 3, 120, 250, 250)]
    for index, ids in enumerate(prompts):
        name = str(index)
        tokens[name] = []
        options: dict[str, Any] = {"temperature": 0.8, "seed": index, "logprobs": 1} if index % 2 else {}
        engine.add(name, ids, SamplingParams(max_tokens=max_tokens + index, ignore_eos=True, **options))
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    while engine.has_work():
        for output in engine.step():
            assert output.error is None
            tokens[output.request_id] += output.token_ids
    return tokens


@pytest.mark.parametrize(("recipe", "num_drafts"), [("w4a16", 0), ("w4a4", 0), ("w4a16", 1)])
def test_replays_have_the_bits_of_calls(recipe: str, num_drafts: int) -> None:
    model = megamoe.load("tiny", recipe=recipe)
    config = EngineConfig(**{**CONFIG.__dict__, "speculative_tokens": num_drafts})
    called = traffic(Engine(model, config), max_tokens=12 + 12 * num_drafts)
    replays = ReplayedCalls()
    replayed = traffic(Engine(model, config, runner=replays), max_tokens=12 + 12 * num_drafts)
    assert replays.wrong == [] and replayed == called
    assert replays.num_replays > 10 and len(replays.recordings) >= 4
    assert {call.op for call in replays.recordings[1].calls} >= {"write_block_tables", "plan_slots", "sparse_attention"}


def _host_scale(right: Any) -> Any:
    def call(self: Moe, x: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        return right(self, x, token_ids) * float(x[0, 0] > 0)  # type: ignore[no-any-return]

    return call


def _torch_between(right: Any) -> Any:
    def call(self: Moe, x: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        return right(self, x + 0, token_ids)  # type: ignore[no-any-return]

    return call


@pytest.mark.parametrize("fault", [_host_scale, _torch_between])
def test_work_outside_of_operations_is_noticed(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that the host read, and an operator of torch that stands between ours."""
    monkeypatch.setattr(Moe, "__call__", fault(Moe.__call__))
    replays = ReplayedCalls()
    engine = Engine(megamoe.load("tiny"), CONFIG, runner=replays)
    traffic(engine, max_tokens=4)
    assert any("other bits" in line for line in replays.wrong)


def test_a_step_that_takes_another_way_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """F12: entries are left out until there are some, which the host decides."""
    right = Attention.attend

    def attend(self: Attention, q: torch.Tensor, plan: Any, pools: Any, entry_idx: Any) -> torch.Tensor:
        if self.kind in plan.tables and int(plan.entry_slots(self.kind).num_visible.max()) == 0:
            monkeypatch.setattr(self, "scale", self.scale * 1.0000001)
        return right(self, q, plan, pools, entry_idx)

    monkeypatch.setattr(Attention, "attend", attend)
    replays = ReplayedCalls()
    traffic(Engine(megamoe.load("tiny"), CONFIG, runner=replays), max_tokens=4)
    assert any("other ones" in line and "sparse_attention" in line for line in replays.wrong)


def test_a_greedy_step_reads_its_tokens_and_nothing_else() -> None:
    engine = Engine(megamoe.load("tiny"), CONFIG)
    for index in range(3):
        engine.add(str(index), [0, *range(5, 9 + index)], SamplingParams(max_tokens=6, ignore_eos=True))
    for _ in range(3):
        engine.step()
    with count_host_reads() as reads:
        outputs = engine.step()
    assert [len(output.token_ids) for output in outputs] == [1, 1, 1]
    assert len(reads.places) == 1 and "engine/sampler.py" in reads.places[0], reads.places


class Counts(Calls):
    """Which buckets were run."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, bucket: int, work: Any) -> Any:
        self.seen.append(bucket)
        return work()


@pytest.mark.parametrize(("num_sequences", "num_drafts", "num_pages"), [(1, 0, 9), (9, 0, 40), (5, 2, 40), (9, 1, 4)])
def test_getting_ready_runs_every_bucket_that_traffic_can_bring(
    num_sequences: int, num_drafts: int, num_pages: int, tmp_path: Any
) -> None:
    """Twice each: once called and captured, once replayed. Few pages let few sequences run."""
    runner = Counts()
    config = EngineConfig(max_sequences=num_sequences, speculative_tokens=num_drafts, num_pages=num_pages)
    engine = Engine(FakeModel(tmp_path), config, runner=runner)
    run_every_bucket(engine)
    most = min(num_sequences, num_pages) * (1 + num_drafts)
    assert {bucket_of(count) for count in range(1, most + 1)} <= {
        one for one in runner.seen if runner.seen.count(one) > 1
    }
    assert max(runner.seen) == bucket_of(most) == runner.seen[0]


def test_the_cpu_calls() -> None:
    assert isinstance(runner_for(torch.device("cpu")), Calls)


def test_a_gpu_replays_unless_it_is_told_not_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(Graphs, "__init__", lambda self, device: None)
    assert isinstance(runner_for(device), Graphs)
    with megamoe.ops.use("reference"):
        assert not dispatch.uses_kernels(device) and isinstance(runner_for(device), Calls)
    model = FakeModel(tmp_path)
    model.device = device
    assert isinstance(Engine(model, EngineConfig()).runner, Graphs)
    assert isinstance(Engine(model, EngineConfig(decode_graphs=False)).runner, Calls)
