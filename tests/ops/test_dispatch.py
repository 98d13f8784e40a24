# SPDX-License-Identifier: Apache-2.0
"""pick: cpu runs the reference, cuda runs what the table names, anything else is an error with a remedy."""

from __future__ import annotations

import concurrent.futures
import pathlib
import sys
import types

import pytest
import torch

from megamoe import ops
from megamoe.kernels import KERNELS, store
from megamoe.kernels.compile import Built, Request
from megamoe.models.deepseek_v4.shapes import op_calls
from megamoe.ops import dispatch
from megamoe.ops.dispatch import Run, pick
from megamoe.ops.hadamard import hadamard
from megamoe.ops.rms_norm import rms_norm

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def _reference() -> str:
    return "reference"


@pytest.fixture
def kernel_module(monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with a `run`, on a machine that claims to have a Hopper GPU."""
    name = "megamoe_test_kernel"
    module = types.ModuleType(name)
    module.run = lambda: "kernel"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(dispatch, "_arch", lambda device: "sm90")
    return name


def test_cpu_runs_the_reference_even_where_a_kernel_exists(monkeypatch: pytest.MonkeyPatch, kernel_module: str) -> None:
    monkeypatch.setitem(KERNELS, "op", {"sm90": kernel_module})
    assert pick("op", CPU, _reference) is _reference


def test_cuda_runs_the_kernel_of_its_architecture(monkeypatch: pytest.MonkeyPatch, kernel_module: str) -> None:
    monkeypatch.setitem(KERNELS, "op", {"sm90": kernel_module, "sm100": "never imported"})
    assert pick("op", CUDA, _reference)() == "kernel"


def test_a_missing_kernel_is_an_error_and_never_the_reference(
    monkeypatch: pytest.MonkeyPatch, kernel_module: str
) -> None:
    monkeypatch.setitem(KERNELS, "op", {"sm100": kernel_module})
    with pytest.raises(
        NotImplementedError, match=r"^op: there is no kernel for sm90; kernels exist for sm100\. .*use\("
    ):
        pick("op", CUDA, _reference)
    with pytest.raises(NotImplementedError, match="kernels exist for no architecture"):
        pick("other", CUDA, _reference)


def test_other_devices_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="op: runs on cpu and cuda devices; got meta"):
        pick("op", torch.device("meta"), _reference)


def test_use_reference_holds_inside_the_block_only(monkeypatch: pytest.MonkeyPatch, kernel_module: str) -> None:
    monkeypatch.setitem(KERNELS, "op", {"sm90": kernel_module})
    with ops.use("reference"):
        assert pick("op", CUDA, _reference) is _reference
        with ops.use("device"):
            assert pick("op", CUDA, _reference)() == "kernel"
        assert pick("op", CUDA, _reference) is _reference
    assert pick("op", CUDA, _reference)() == "kernel"
    with pytest.raises(RuntimeError), ops.use("reference"):
        raise RuntimeError
    assert pick("op", CUDA, _reference)() == "kernel"


def test_use_refuses_other_names() -> None:
    with pytest.raises(ValueError, match="implementation must be 'reference' or 'device'; got 'fast'"), ops.use("fast"):
        pass


# --- watch ---


def test_an_observer_gets_every_call_with_what_would_run(monkeypatch: pytest.MonkeyPatch, kernel_module: str) -> None:
    monkeypatch.setitem(KERNELS, "op", {"sm90": kernel_module})
    asked: list[tuple[str, object, object]] = []

    def replace(op: str, run: Run, reference: Run) -> Run:
        asked.append((op, run(), reference))
        return lambda: f"watched {run()}"

    with ops.watch(replace):
        assert pick("op", CUDA, _reference)() == "watched kernel"
        assert pick("op", CPU, _reference)() == "watched reference"
        with ops.use("reference"):
            assert pick("op", CUDA, _reference)() == "watched reference"
    assert asked == [("op", "kernel", _reference), ("op", "reference", _reference), ("op", "reference", _reference)]
    assert pick("op", CPU, _reference) is _reference


def test_a_door_passes_its_arguments_and_returns_the_observers_result() -> None:
    calls: list[tuple[str, tuple[object, ...]]] = []

    def record(op: str, run: Run, reference: Run) -> Run:
        def recorded(*args: object) -> object:
            calls.append((op, args))
            return run(*args)

        return recorded

    x = torch.eye(2)
    with ops.watch(record):
        y = hadamard(x)
    assert torch.equal(y, hadamard(x)) and calls == [("hadamard", (x, torch.float32))]
    with ops.watch(lambda op, run, reference: lambda *args: x):
        assert hadamard(x) is x


def test_the_inner_observer_stands_nearer_to_the_operation() -> None:
    def named(name: str) -> dispatch.Observer:
        return lambda op, run, reference: lambda: f"{name}({run()})"

    with ops.watch(named("outer")), ops.watch(named("inner")):
        assert pick("op", CPU, _reference)() == "outer(inner(reference))"


def test_watching_ends_with_the_block_and_with_its_thread() -> None:
    def refuse(op: str, run: Run, reference: Run) -> Run:
        raise RuntimeError(op)

    with pytest.raises(RuntimeError, match="^op$"), ops.watch(refuse):
        pick("op", CPU, _reference)
    assert pick("op", CPU, _reference) is _reference
    with ops.watch(refuse), concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(pick, "op", CPU, _reference).result() is _reference


def test_a_traced_graph_is_watched_when_it_runs() -> None:
    seen: list[str] = []

    def count(op: str, run: Run, reference: Run) -> Run:
        seen.append(op)
        return run

    torch.compiler.reset()
    compiled = torch.compile(lambda x: rms_norm(x, None, eps=1e-6), backend="aot_eager", fullgraph=True)
    x = torch.ones(2, 4)
    with ops.watch(count):
        want = rms_norm(x, None, eps=1e-6)
        assert seen == ["rms_norm"]
        assert torch.equal(compiled(x), want)
    assert seen == ["rms_norm"] * 2


def test_the_package_offers_both_switches_and_nothing_else() -> None:
    assert ops.use is dispatch.use and ops.watch is dispatch.watch
    with pytest.raises(AttributeError, match=r"has no attribute 'pick'; it offers use, watch\."):
        ops.pick  # noqa: B018


# --- before serving ---


def test_warm_up_loads_a_models_kernels_and_seal_ends_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[pathlib.Path] = []

    def compile_nothing(requests: list[Request], target: str, directory: pathlib.Path) -> list[Built]:
        built = [Built(one, directory / f"{one.symbol}.so", 0.0) for one in requests]
        for one in built:
            one.path.write_bytes(b"object")
        return built

    kernels = store.KernelStore("sm90a", tmp_path, loader=lambda path, symbol: loaded.append(path))
    monkeypatch.setattr(store, "compile_objects", compile_nothing)
    monkeypatch.setattr(store, "store_of", lambda device: kernels)
    calls = [(call.op, call.dims) for call in op_calls("tiny")]
    dispatch.warm_up(calls, CUDA)
    assert len(loaded) == len(kernels.ledger) > 10
    dispatch.seal(CUDA)
    dispatch.warm_up(calls, CUDA)  # nothing new
    with pytest.raises(store.SealedError, match="was not loaded before the store was sealed"):
        dispatch.warm_up([("rms_norm", {"K": 1024})], CUDA)
    assert "sealed" in dispatch.explain(CUDA) and "rows.rms_norm[width=256" in dispatch.explain(CUDA)


def test_the_cpu_has_nothing_to_warm_up() -> None:
    dispatch.warm_up([("rms_norm", {"K": 1024})], CPU)
    dispatch.seal(CPU)
    assert dispatch.explain(CPU) == "cpu: references, no kernels"
    with pytest.raises(ValueError, match="a kernel pack is for a CUDA device; got cpu"):
        dispatch.open_pack(pathlib.Path("pack"), CPU, version="1")
