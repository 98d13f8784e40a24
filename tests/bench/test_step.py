# SPDX-License-Identifier: Apache-2.0
"""bench step and bench engine, on the CPU with few layers: what is counted, printed, written and refused."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import pathlib

import pytest
import torch

from megamoe.bench import step as bench_step
from megamoe.bench.engine import engine_config, measure
from megamoe.bench.step import Call, DecodeStep, Kernel, StepTime, explain
from megamoe.bench.timing import Timing
from megamoe.cli import main
from megamoe.engine.engine import Engine
from megamoe.models.deepseek_v4.calls import model_calls
from megamoe.models.deepseek_v4.model import Model
from megamoe.models.load import load

ARGUMENTS = ["--device", "cpu", "--load-format", "dummy", "--num-layers", "3"]


@pytest.fixture(scope="module")
def model() -> Model:
    """Three layers, one of each kind."""
    return load("tiny", load_format="dummy", num_layers=3)


@pytest.mark.parametrize(("batch", "context"), [(1, 1), (3, 300)])
def test_a_step_is_taken_apart(model: Model, batch: int, context: int) -> None:
    with torch.inference_mode():
        step = DecodeStep(model, batch, context)
        assert step.time(rounds=1).median_us > 0
        calls = explain(step, 0.0)
    wanted = {call.op for call in model_calls(model.config, model.weights.formats, model.recipe)}
    without = {"copy_cache", "save_rows", "sample", "penalize", "token_logprobs", "clamped_swiglu"}
    assert {call.op for call in calls} <= wanted and wanted - {call.op for call in calls} <= without
    assert [kind for kind in dict.fromkeys(call.kind for call in calls) if kind != "model"] == ["SWA", "CSA", "HCA"]
    assert calls[-1].op == "linear" and calls[-1].layer == -1, "the head"
    assert calls[-1].num_bytes == model.weights.head.nbytes + batch * (2 * 256 + 4 * 4096)
    starts = [call.kernels[0].start_us for call in calls]
    assert starts == sorted(starts) and all(len(call.kernels) == 1 for call in calls)


def test_experts_count_what_was_chosen(model: Model) -> None:
    w1, w3, w2 = (getattr(model.weights.blocks[0].moe, name) for name in ("w1", "w3", "w2"))
    whole = sum(bench_step.tensor_bytes(weight) for weight in (w1, w3, w2))
    arguments = {"x": torch.zeros(2, 4), "expert_ids": torch.tensor([[0, 3], [3, -1]]), "w1": w1, "w3": w3, "w2": w2}
    others = 2 * 4 * 4 + 4 * 8
    assert bench_step.call_bytes("nvfp4_experts", arguments, torch.zeros(2, 4)) == whole // 4 + others + 32


def test_caches_hold_the_rows_of_a_prompt_everywhere(model: Model) -> None:
    with torch.inference_mode():
        step = DecodeStep(model, 2, 600)
        entries = step._cache.layers[1].entries
    assert entries is not None and entries.storage.shape[0] > 2
    assert bool(entries.storage[0].any()) and torch.equal(entries.storage[0], entries.storage[-1])


def test_overlapping_kernels_are_not_counted_twice() -> None:
    events = [
        {"cat": "kernel", "name": "a", "ts": 100.0, "dur": 10.0},
        {"cat": "kernel", "name": "b", "ts": 104.0, "dur": 8.0},  # begins inside a, waits, ends 2 after it
        {"cat": "kernel", "name": "c", "ts": 115.0, "dur": 5.0},
    ]
    kernels = bench_step.ordered(events)
    assert [(one.name, one.start_us, one.time_us, one.gap_us) for one in kernels] == [
        ("a", 0.0, 10.0, 0.0),
        ("b", 4.0, 2.0, 0.0),
        ("c", 15.0, 5.0, 3.0),
    ]


def test_launches_find_their_calls() -> None:
    events = [
        {"cat": "user_annotation", "name": "megamoe call 0", "ts": 0.0, "dur": 5.0},
        {"cat": "user_annotation", "name": "megamoe call 1", "ts": 6.0, "dur": 5.0},
        {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": 7.0, "dur": 1.0, "args": {"correlation": 2}},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 1.0, "dur": 1.0, "args": {"correlation": 1}},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 5.5, "dur": 0.2, "args": {"correlation": 3}},
        {"cat": "kernel", "name": "y", "ts": 20.0, "dur": 1.0, "args": {"correlation": 2}},
        {"cat": "kernel", "name": "x", "ts": 10.0, "dur": 1.0, "args": {"correlation": 1}},
        {"cat": "kernel", "name": "z", "ts": 15.0, "dur": 1.0, "args": {"correlation": 3}},
    ]
    assert bench_step.owners(events) == [("x", 0), ("z", -1), ("y", 1)]


@pytest.mark.gpu
def test_every_kernel_of_a_replay_has_its_call() -> None:
    """The launches of a called step, operation by operation, are the nodes of the graph that is replayed."""
    model = load("tiny", device="cuda", load_format="dummy", pack=os.environ.get("MEGAMOE_TEST_PACK"))
    with torch.inference_mode():
        step = DecodeStep(model, 3, 300)
        time_us = step.time(rounds=5).median_us
        calls = explain(step, 3000.0)
    assert all(call.kernels and call.floor_us > 0 for call in calls if call.op)
    kernels = [kernel for call in calls for kernel in call.kernels]
    assert 0 < sum(kernel.time_us + kernel.gap_us for kernel in kernels) < 3 * time_us
    assert not any(call.op == "" for call in calls), "a launch that belongs to no operation"


def test_table_and_picture(tmp_path: pathlib.Path) -> None:
    def call(op: str, layer: int, kind: str) -> Call:
        return Call(op, layer, kind, 2_000_000, 1.0, (Kernel(f"{op} kernel", 3.0 + layer, 2.0, 0.5),))

    calls = (
        call("linear", 0, "CSA"),
        call("linear", 1, "CSA"),
        call("rms_norm", 1, "CSA"),
        call("linear", -1, "model"),
    )
    seen = StepTime(2, 4096, Timing(10.0, 9.0, 11.0, False), 4096, calls)
    text = bench_step.table(seen)
    assert "| CSA, 2 of them | all | 1.50 | 1.50 | 3.00 | 0.75 | 1.50 | 50 % | 3.00 |" in text
    assert "200,000.0 tokens/s, caches 4,096 B, 4 kernels, gaps 2.0 us, floor 4.0 us" in bench_step.summary_line(seen)
    if importlib.util.find_spec("matplotlib") is not None:
        bench_step.draw(tmp_path / "step.png", seen)
        assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_command_step(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.csv"
    command = ["bench", "step", *ARGUMENTS, "--batch", "2", "--context", "20", "--explain", "--csv", str(path)]
    assert main(command) == 0
    out = capsys.readouterr()
    assert "batch 2, context 20:" in out.out and "| CSA, 1 of them | all |" in out.out
    assert "megamoe: ready in" in out.err and "layers: 3 to 3 are left out (1 CSA)" in out.err
    document = json.loads(out.out.splitlines()[-1])
    assert document["layers"] == 3 and document["steps"][0]["batch"] == 2
    found = list(csv.DictReader(path.open()))
    assert found[0]["kind"] == "step" and {row["layer"] for row in found[1:]} == {"", "0", "1", "2"}


def test_command_engine(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "engine.csv"
    sizes = ["--batch", "1", "--batch", "3", "--prompt-tokens", "5", "--new-tokens", "2"]
    assert main(["bench", "engine", *ARGUMENTS, *sizes, "--csv", str(path)]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["engine"]
    assert [row["batch"] for row in rows] == [1, 3] and all(row["tokens_per_second"] > 0 for row in rows)
    assert [row["batch"] for row in csv.DictReader(path.open())] == ["1", "3"]


def test_tokens_are_counted_once(model: Model) -> None:
    engine = Engine(model, engine_config(model, 2, 12))
    row = measure(engine, 2, 8, 4)
    assert row.last_first_ms >= row.first_ms > 0 and row.worst_token_ms >= row.token_ms > 0
    assert row.decode_tokens_per_second > 0 and not engine.has_work()


def test_refusals(model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="bench step: context must be 1 to 8192, the model's; got 8193"):
        DecodeStep(model, 1, 8193)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "step", *ARGUMENTS, "--explain", "--png", "x.png"]) == 2
    assert "matplotlib, which is not installed" in capsys.readouterr().err
    assert main(["bench", "step", *ARGUMENTS, "--png", "x.png"]) == 2
    assert main(["bench", "engine", *ARGUMENTS, "--tokens", "4"]) == 2
    assert "leave --tokens, --arch and --seconds out" in capsys.readouterr().err
