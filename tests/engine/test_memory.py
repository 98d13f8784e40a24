# SPDX-License-Identifier: Apache-2.0
"""The plan of a GPU's memory: what is fixed is measured, the caches get the rest, and what cannot fit is refused."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re

import pytest
import torch

import megamoe
import megamoe.cli
from megamoe.engine import memory
from megamoe.engine.config import EngineConfig, resolve, smallest_capacity
from megamoe.engine.engine import Engine
from megamoe.engine.memory import MemoryPlan, budget_of, keep, plan_memory
from megamoe.engine.model import load_model
from megamoe.engine.runner import Graphs
from megamoe.engine.sampling_params import SamplingParams
from megamoe.engine.warm_up import run_every_bucket
from megamoe.models.deepseek_v4.model import Model
from megamoe.models.deepseek_v4.weights import WeightLoader

MIB = 2**20
CONFIG = EngineConfig(max_sequences=4, max_step_tokens=200, prefill_chunk=128)


@pytest.fixture(scope="module")
def model() -> Model:
    return megamoe.load("tiny")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which weights take 30 MiB, workspace 20 and graphs 10."""
    monkeypatch.setattr(
        memory, "measure", lambda model, config, budget: MemoryPlan(budget, 30 * MIB, 20 * MIB, 10 * MIB)
    )


@pytest.mark.parametrize("options", [{}, {"prefix_cache": False}, {"speculative_tokens": 1}, {"num_snapshots": 0}])
def test_caches_get_what_is_left_and_nothing_is_beyond_the_budget(
    options: dict[str, int], model: Model, measured: None
) -> None:
    budget = 400 * MIB
    config, fixed = plan_memory(model, dataclasses.replace(CONFIG, **options), budget)
    plan = fixed.with_caches(resolve(config, model).capacity)
    assert plan.fixed == 60 * MIB and plan.rings > 0 and plan.step_area > 0 and plan.pages > 0 and plan.rounding > 0
    assert 0 <= plan.spare and sum(num_bytes for _, num_bytes in plan.parts()) + plan.spare == budget
    assert (plan.snapshots == 0) == (options.get("prefix_cache") is False or options.get("num_snapshots") == 0)
    per_page = resolve(config, model).capacity.bytes_per_page
    enough = CONFIG.max_sequences * -(-model.config.max_position_embeddings // model.tokens_per_page)
    assert plan.spare < per_page + MIB or plan.pages >= enough * per_page, "pages could have had more"
    lines = str(plan).splitlines()
    assert len(lines) == 9 and lines[0].endswith("31,457,280 B weights") and "of a budget of 419,430,400 B" in lines[-1]


def test_too_small_a_budget_names_every_part(model: Model, measured: None) -> None:
    least = MemoryPlan(0, 30 * MIB, 20 * MIB, 10 * MIB).with_caches(smallest_capacity(CONFIG, model))
    enough = -least.spare
    plan_memory(model, CONFIG, enough)
    with pytest.raises(
        ValueError, match=r"memory: [\d,]+ bytes are 1 too few for model 'tiny' with one page: weights"
    ) as error:
        plan_memory(model, CONFIG, enough - 1)
    for name in ("workspace 20,971,520", "graphs 10,485,760", "step area", "rings", "snapshots", "pages", "rounding"):
        assert name in str(error.value)


def test_what_cannot_fit_is_refused_before_a_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WeightLoader, "load", None)  # would raise
    with pytest.raises(
        ValueError, match=r"load: model 'tiny' with recipe w4a16 needs at least [\d,]+ bytes \("
    ) as error:
        load_model("tiny", recipe="w4a16", device="cpu", dtype=None, memory=(5 * MIB, CONFIG))
    said = str(error.value)
    assert re.search(r"weights [\d,]+, rings of 4 sequences [\d,]+, step area [\d,]+, one page [\d,]+\)", said)
    assert "a budget of 5,242,880 is given. Raise --memory" in said


def test_the_refusal_counts_what_the_engine_would(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, speculative_tokens=2, prefix_cache=False)
    with pytest.raises(ValueError, match="step area") as error:
        load_model("tiny", recipe="w4a16", device="cpu", dtype=None, memory=(1, config))
    counts = [
        int(one.replace(",", "")) for one in re.findall(r"(?:sequences|area|page) ([\d,]+)[,)]", str(error.value))
    ]
    capacity = model.capacity(smallest_capacity(config, model).size, 0, with_drafts=False)
    assert counts == [4 * capacity.bytes_per_sequence, capacity.step_area_bytes, capacity.bytes_per_page]


def test_there_is_no_budget_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert budget_of("cpu", None) is None and budget_of("cuda:7", 5) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    assert budget_of("cuda", None) == 900 and budget_of("cuda:0", 5) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("num_drafts", [0, 1])
def test_a_gpus_plan_is_kept(num_drafts: int, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    device = torch.device("cuda")
    model = megamoe.load("tiny", device=device)
    budget = torch.cuda.memory_reserved(device) + 1536 * MIB
    config, fixed = plan_memory(model, dataclasses.replace(CONFIG, speculative_tokens=num_drafts), budget)
    keep(fixed, device)
    try:
        engine = Engine(model, config)
        run_every_bucket(engine)
        engine.runner.seal()
        plan = fixed.with_caches(engine.plan.capacity)
        for name in "abcdef":
            engine.add(name, list(range(5, 300)), SamplingParams(max_tokens=20, ignore_eos=True, logprobs=1))
        while engine.has_work():
            assert all(output.error is None for output in engine.step())
        used = torch.cuda.memory_reserved(device)
        print(f"{plan}\n{used:,} B reserved after traffic")
        assert isinstance(engine.runner, Graphs) and engine.runner.num_bytes <= plan.graphs
        assert used <= budget and plan.spare >= 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_serve_plans_before_it_loads_and_explains_the_plan(
    measured: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU is pretended where the command asks for its memory; the model runs on the CPU."""
    kept: list[MemoryPlan] = []
    monkeypatch.setattr(memory, "budget_of", lambda device, given: given)
    monkeypatch.setattr(memory, "keep", lambda plan, device: kept.append(plan))
    assert megamoe.cli.main(["serve", "--explain", "--memory", "400MiB", "--max-sequences", "4"]) == 0
    explained = json.loads(capsys.readouterr().out)
    plan = explained["memory"]
    assert len(kept) == 1 and plan["budget"] == 400 * MIB and plan["weights"] == 30 * MIB and plan["spare"] >= 0
    assert plan["pages"] == explained["plan"]["num_pages"] * explained["plan"]["bytes_per_page"] > 0
    assert explained["engine"]["memory_bytes"] < 340 * MIB
    assert megamoe.cli.main(["serve", "--explain", "--memory", "5MiB"]) == 2  # before a weight is read
    assert "a budget of 5,242,880 is given" in capsys.readouterr().err


def test_serve_explains_no_memory_of_a_device_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert megamoe.cli.main(["serve", "--explain", "--memory", "64MiB"]) == 0
    explained = json.loads(capsys.readouterr().out)
    assert explained["memory"] is None and explained["engine"]["memory_bytes"] == 64 * MIB
