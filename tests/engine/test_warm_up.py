# SPDX-License-Identifier: Apache-2.0
"""Getting ready: what is run before "ready" covers what is run after it, and after it nothing is compiled.

There is no GPU here. The buckets are run on the CPU, where `pick` is asked for the same operations at the same sizes;
loading and sealing are run with a store whose compiler writes text files.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import pathlib
import re
import sys
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

import megamoe
import megamoe.ops
from megamoe.cli import main
from megamoe.engine import warm_up as warming
from megamoe.engine.config import EngineConfig
from megamoe.engine.engine import Engine
from megamoe.engine.sampling_params import SamplingParams
from megamoe.engine.warm_up import bucket_of, buckets, run_every_bucket
from megamoe.formats.fragment_layout import CodeLayout
from megamoe.kernels import KERNELS, store
from megamoe.kernels import pack as packing
from megamoe.kernels.compile import Request
from megamoe.kernels.plan import module_for, requests_for
from megamoe.kernels.rows import rms_norm
from megamoe.kernels.store import KernelStore, SealedError
from megamoe.models.deepseek_v4.shapes import op_calls
from megamoe.models.deepseek_v4.weights import WeightLoader
from megamoe.models.load import load
from megamoe.ops import dispatch
from megamoe.text.llm import LLM

from ..fakes import FakeModel
from ..kernels.objects import FakeCompiler
from ..lent import REFERENCES

CUDA = torch.device("cuda", 0)


# What was asked of pick.


class Picks:
    """Records every operation that is picked, its sizes and its number of rows; what references pick inside is not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, launch: Callable[..., None] = lambda op, dims: None) -> None:
        self.found: set[tuple[str, tuple[tuple[str, int], ...], int]] = set()
        self.depth = 0
        pick = dispatch.pick

        def recording(op: str, device: torch.device, reference: Callable[..., Any]) -> Callable[..., Any]:
            run = pick(op, device, reference)

            @functools.wraps(run)
            def wrapper(*arguments: Any, **named: Any) -> Any:
                if self.depth == 0:
                    dims, num_rows = sizes(op, arguments)
                    if num_rows:  # a kernel returns early for none
                        self.found.add((op, tuple(dims.items()), bucket_of(num_rows)))
                        launch(op, dims)
                self.depth += 1
                try:
                    return run(*arguments, **named)
                finally:
                    self.depth -= 1

            return wrapper

        for name, module in list(sys.modules.items()):
            if name.startswith("megamoe.ops.") and getattr(module, "pick", None) is pick:
                monkeypatch.setattr(module, "pick", recording)

    def take(self) -> set[tuple[str, tuple[tuple[str, int], ...], int]]:
        found, self.found = self.found, set()
        return found


def sizes(op: str, arguments: tuple[Any, ...]) -> tuple[dict[str, int], int]:
    """Return an operation's dimensions, as models/deepseek_v4/shapes.py names them, and its number of rows."""
    first = arguments[0]
    shape = first.shape if hasattr(first, "shape") else ()
    match op:
        case "linear" | "fp8_linear" | "nvfp4_linear" | "nvfp4_weight_only_linear":
            num_rows, width = arguments[1].shape
            is_stack = getattr(arguments[1], "scale_per", "tensor") == "row"
            return {"N": num_rows, "K": width, **({"scales": num_rows} if is_stack else {})}, shape[0]
        case "grouped_linear" | "fp8_grouped_linear" | "nvfp4_grouped_linear" | "nvfp4_weight_only_grouped_linear":
            groups, num_rows, width = arguments[1].shape
            return {"G": groups, "N": num_rows, "K": width}, shape[0]
        case "experts" | "fp8_experts" | "nvfp4_experts" | "nvfp4_weight_only_experts":
            experts, inner, width = arguments[3].shape
            return {"E": experts, "A": arguments[2].shape[1], "D": width, "F": inner}, shape[0]
        case "route_experts":
            experts, width = arguments[1].shape
            table = arguments[5]
            found = {"E": experts, "D": width, "A": arguments[2]}
            return found if table is None else {"V": table.shape[0], **found}, shape[0]
        case "quantize_nvfp4" | "quantize_fp8_rows" | "quantize_mxfp4":
            middle = {"Hi": shape[1]} if op == "quantize_mxfp4" else {"G": shape[1]} if len(shape) == 3 else {}
            return {**middle, "K": shape[-1]}, shape[0]
        case "rms_norm":
            name = "H" if arguments[1] is None else "X"
            return {**({name: shape[1]} if len(shape) == 3 else {}), "K": shape[-1]}, shape[0]
        case "rope":
            middle = {"H": shape[1]} if len(shape) == 3 else {}
            return {**middle, "C": shape[-1], "R": arguments[2].rope_dim}, shape[0]
        case "hyper_connection_pre" | "hyper_connection_pre_norm" | "hyper_connection_head" | "add_to_streams":
            return {"X": shape[1], "D": shape[2]}, shape[0]
        case "hyper_connection_head_norm":
            return {"X": shape[1], "D": shape[2]}, shape[0] if arguments[5] is None else arguments[5].shape[0]
        case "embed_streams":
            return {"V": shape[0], "X": arguments[2], "D": shape[1]}, arguments[1].shape[0]
        case "write_latent":
            latent = {} if first is None else {"Q": shape[1]}
            width = arguments[1].shape[1]
            return {**latent, "C": width, "R": arguments[7].rope_dim}, arguments[1].shape[0]
        case "rotate_queries":
            return {"H": shape[1], "C": shape[2], "R": arguments[2].rope_dim}, shape[0]
        case "round_index_query":
            return {"Hi": shape[1], "K": shape[2], "R": arguments[3].rope_dim}, shape[0]
        case "hyper_connection_post" | "hyper_connection_post_pre_norm":
            return {"X": arguments[1].shape[1], "D": shape[-1]}, shape[0]
        case "clamped_swiglu":
            return {"F": shape[-1]}, shape[0]
        case "hadamard":
            return {**({"Hi": shape[1]} if len(shape) == 3 else {}), "n": shape[-1]}, shape[0]
        case "write_cache":
            return {"width": shape[-1]}, shape[0]
        case "copy_cache":
            return {"width": first.width}, arguments[1].shape[0]
        case "save_rows":
            return {"width": first.width}, arguments[3].shape[0]
        case "compress_kv":
            return {"ratio": arguments[13], "coff": 1 + arguments[14], "D": arguments[2].shape[0]}, shape[0]
        case "write_index_keys":
            return {"ratio": arguments[13], "D": arguments[2].shape[0]}, shape[0]
        case "index_topk":
            return {"Hi": shape[1], "K": shape[2], "top_k": arguments[6]}, shape[0]
        case "sparse_attention":  # J, how many entries there are to choose from, grows with the sequence: none or some
            return {"H": shape[1], "C": shape[2], "W": arguments[7], "J": int(arguments[2] is not None)}, shape[0]
        case "plan_slots":  # integers of a step, whatever the model
            return {}, shape[1]
        case "write_block_tables":
            return {}, arguments[1].shape[0]
        case "sample" | "token_logprobs" | "penalize":
            return {"V": shape[-1]}, shape[0]
    raise AssertionError(f"{op}: tell this test how its arguments name its dimensions: {arguments}")


CONFIG = EngineConfig(max_sequences=2, max_step_tokens=24, prefill_chunk=20, num_pages=8, max_sequence_tokens=600)
PARAMS = SamplingParams(
    max_tokens=6, temperature=0.9, top_p=0.8, seed=1, presence_penalty=0.5, logprobs=2, ignore_eos=True
)


def traffic(engine: Engine) -> None:
    """Prompts of all lengths, one of them twice, sampled and greedy, that decode together."""
    prompts = [[0, *range(5, 5 + size)] for size in (0, 2, 14, 257)]
    for index, ids in enumerate([*prompts, prompts[-1]]):
        engine.add(str(index), ids, PARAMS if index % 2 else SamplingParams(max_tokens=6, ignore_eos=True))
    while engine.has_work():
        engine.step()


@pytest.mark.parametrize(("recipe", "num_drafts"), [("w4a16", 0), ("w4a16", 1), ("w4a4", 1), ("exact", 0)])
def test_what_a_generation_asks_for_has_been_run_before(
    recipe: str, num_drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operation, sizes and bucket of rows, of a real run; and operations and sizes were planned from the headers."""
    model = load("tiny", recipe=recipe)
    engine = Engine(model, dataclasses.replace(CONFIG, speculative_tokens=num_drafts))
    picks = Picks(monkeypatch)
    run_every_bucket(engine)
    warmed = picks.take()
    traffic(engine)
    asked = picks.take()
    assert len(asked) > 40
    assert asked - warmed == set()
    found = {_without_entries(op, dict(dims)) for op, dims, _ in asked | warmed}
    planned = {_without_entries(op, dims) for op, dims in model.op_calls(with_drafts=num_drafts > 0)}
    assert found - planned == set()
    # Experts that take the shared expert's weights, too, leave its own operations out.
    shared = {call.op for call in op_calls("tiny") if call.where in ("ffn.shared_experts", "ffn.shared_experts.w1")}
    assert {op for op, _ in planned - found} <= shared | {"quantize_nvfp4"}


def _without_entries(op: str, dims: Mapping[str, int]) -> tuple[str, tuple[tuple[str, int], ...]]:
    return op, tuple((name, size) for name, size in dims.items() if (op, name) != ("sparse_attention", "J"))


def test_a_bucket_that_is_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above fails where it should."""
    engine = Engine(load("tiny"), CONFIG)
    picks = Picks(monkeypatch)
    monkeypatch.setattr(warming, "buckets", lambda most: [1])
    monkeypatch.setattr(warming, "buckets_up_to", lambda most: [1])
    run_every_bucket(engine)
    warmed = picks.take()
    for index in range(2):
        engine.add(str(index), [0, 5, 6], SamplingParams(max_tokens=2))
    engine.step()
    assert ("linear", (("N", 4096), ("K", 256)), 2) in picks.take() - warmed


@pytest.mark.parametrize(
    ("most", "wanted"), [(1, [1]), (2, [2, 1]), (3, [3, 2, 1]), (8, [8, 4, 2, 1]), (40, [40, 32, 16, 8, 4, 2, 1])]
)
def test_buckets_are_powers_of_two_and_the_most(most: int, wanted: list[int]) -> None:
    assert buckets(most) == wanted
    assert {bucket_of(count) for count in range(1, most + 1)} <= {bucket_of(count) for count in wanted}


def test_an_engine_that_got_ready_has_forgotten_it(tokenizer_directory: pathlib.Path) -> None:
    engine = Engine(FakeModel(tokenizer_directory), EngineConfig(max_sequences=4, prefill_chunk=16))
    before = engine.stats()
    run_every_bucket(engine)
    assert engine.stats() == before and not engine.has_work()
    steps = engine.model.steps  # type: ignore[attr-defined]
    assert max(steps) == 4 * 16 and {64, 32, 16, 8, 4, 2, 1} <= set(steps)


# A machine that seems to have a GPU: references compute, but every operation asks the store for its kernels first.


class PretendGpu:
    """What a GPU would have been asked for."""

    def __init__(self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, *, complete: bool) -> None:
        self.compiler = FakeCompiler()
        self.store = KernelStore("sm90a", tmp_path / "cache", loader=lambda path, symbol: lambda: None)
        monkeypatch.setattr(store, "compile_objects", self.compiler)
        monkeypatch.setattr(packing, "compile_objects", self.compiler)
        monkeypatch.setattr(store, "store_of", lambda device: self.store)
        monkeypatch.setattr(dispatch, "_arch", lambda device: "sm90")
        monkeypatch.setattr(dispatch, "uses_kernels", lambda device: True)
        monkeypatch.setattr(warming, "buckets", lambda most: [min(most, 4), 1])  # the steps are slow here
        monkeypatch.setattr(warming, "buckets_up_to", lambda most: [1, min(most, 4)])
        if complete:
            module = types.ModuleType("megamoe_test_kernel")
            module.configs = lambda dims: ()  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, module.__name__, module)
            for call in op_calls("tiny"):
                if "sm90" not in KERNELS.get(call.op, {}):
                    monkeypatch.setitem(KERNELS, call.op, {"sm90": module.__name__})
        self.picks = Picks(monkeypatch, self.launch)

    def launch(self, op: str, dims: dict[str, int]) -> None:
        for request in requests_for([(op, dims)], "sm90a"):
            self.store.get(request)


PROMPTS, GREEDY = ["def add(", "class Point:\n"], SamplingParams(max_tokens=8)


@pytest.mark.parametrize("recipe", ["w4a16"])
def test_llm_is_ready_when_it_is_there_and_compiles_nothing_after(
    recipe: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = LLM("tiny", recipe=recipe).generate(PROMPTS, GREEDY)
    gpu = PretendGpu(tmp_path, monkeypatch, complete=True)
    llm = LLM("tiny", recipe=recipe)
    assert gpu.store.sealed and len(gpu.store.ledger) == len(gpu.compiler.compiled) > 8
    assert llm.generate(PROMPTS, GREEDY) == wanted  # on weights in fragment order, by the references
    assert len(gpu.compiler.compiled) == len(gpu.store.ledger)
    explained = llm.explain()
    assert "| compiled |" in explained and f"{len(gpu.store.ledger)} kernels for sm90a, sealed" in explained
    assert explained.endswith("NVFP4 matrices brought into the order that the kernels of cpu take, once")
    with pytest.raises(SealedError, match=r"rms_norm\[width=4096.*was not loaded before the store was sealed"):
        gpu.store.get(Request.of(rms_norm.Config(4096, "bf16", "bf16", "bf16")))


def test_another_model_opens_the_seal_and_sets_it_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = PretendGpu(tmp_path, monkeypatch, complete=True)
    LLM("tiny", recipe="w4a16")
    before = len(gpu.store.ledger)
    LLM("tiny", recipe="w4a4")
    assert gpu.store.sealed and len(gpu.store.ledger) > before
    assert len(set(gpu.compiler.compiled)) == len(gpu.compiler.compiled)


def test_a_pack_is_used_and_a_foreign_one_refused_before_anything_is_loaded(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = PretendGpu(tmp_path, monkeypatch, complete=True)
    calls = load("tiny").op_calls(with_drafts=False)
    pack = packing.build_pack(
        requests_for(calls, "sm90a"), "sm90a", tmp_path / "pack", version=megamoe.__version__, model="tiny"
    )
    gpu.store._loaded.clear()
    gpu.store.ledger.clear()
    gpu.compiler.compiled.clear()
    llm = LLM("tiny", pack=pack.path)
    assert gpu.compiler.compiled == [] and {one.origin for one in gpu.store.ledger} == {"pack"}
    assert llm.explain().count("| pack |") == len(gpu.store.ledger)
    other = packing.build_pack([], "sm100a", tmp_path / "other", version=megamoe.__version__, model="tiny")
    monkeypatch.setattr(WeightLoader, "load", None)  # would raise
    with pytest.raises(packing.PackError, match="other: is for sm100a, this GPU is sm90a. Build one with megamoe"):
        LLM("tiny", pack=other.path)


@pytest.mark.parametrize("arguments", [[], ["--speculative-tokens", "1"]])
def test_serve_explains_the_ledger_of_a_sealed_store(
    arguments: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = PretendGpu(tmp_path, monkeypatch, complete=True)
    assert main(["serve", "--explain", "--max-sequences", "2", "--max-step-tokens", "16", *arguments]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert gpu.store.sealed and kernels["summary"] == f"{len(gpu.store.ledger)} kernels for sm90a, sealed"
    assert len(kernels["ledger"]) == len(gpu.store.ledger) > 8
    assert set(kernels["ledger"][0]) == {"kernel", "key", "seconds", "origin"}
    selections = [one["key"] for one in kernels["ledger"] if one["kernel"] == "router.route_select"]
    assert {"experts": 8, "top_k": 2, "mode": "biased"} in selections
    assert "brought into the order that the kernels" in kernels["conversions"][0]


def test_generate_explains_the_ledger_first(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = PretendGpu(tmp_path, monkeypatch, complete=True)
    assert main(["generate", "--prompt", "x", "--max-tokens", "2", "--explain"]) == 0
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "| kernel | seconds | origin |" and len(printed) == len(gpu.store.ledger) + 4


def test_a_kernel_nobody_warmed_up_raises_in_the_middle_of_a_generation(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = PretendGpu(tmp_path, monkeypatch, complete=True)
    llm = LLM("tiny")
    forgotten = gpu.store.ledger[0].request
    del gpu.store._loaded[forgotten]
    with pytest.raises(SealedError, match=re.escape(str(forgotten))):
        llm.generate(PROMPTS, GREEDY)


# Refusals.


@pytest.fixture
def hopper(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> PretendGpu:
    """A machine with an H100, as far as anyone asks before weights are loaded, and two operations without a kernel."""
    gpu = PretendGpu(tmp_path, monkeypatch, complete=False)
    for op in ("sparse_attention", "sample"):
        monkeypatch.setitem(KERNELS, op, {arch: name for arch, name in KERNELS[op].items() if arch != "sm90"})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**37, 2**37))
    monkeypatch.setattr(dispatch, "uses_kernels", lambda device: device.type == "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(WeightLoader, "load", None)  # would raise
    return gpu


MISSING = r"load: model 'tiny' with recipe w4a16 on cuda \(sm90a\): \d+ of the 2\d operations it calls have no kernel: "


def test_a_model_without_kernels_is_refused_by_name_before_its_weights_are_read(hopper: PretendGpu) -> None:
    start = time.perf_counter()
    with pytest.raises(NotImplementedError, match=MISSING) as error:
        LLM("tiny", device="cuda")
    assert time.perf_counter() - start < 5
    missing = str(error.value).partition("have no kernel: ")[2].partition(". There are")[0].split(", ")
    assert missing == sorted(missing) and "sparse_attention" in missing and "route_experts" not in missing
    assert all("sm90" not in KERNELS.get(op, {}) for op in missing)
    assert "There are kernels for " in str(error.value) and "route_experts" in str(error.value)
    assert str(error.value).endswith("Run it by its references on the CPU: --device cpu, or device='cpu'.")
    assert hopper.compiler.compiled == [] and hopper.store.ledger == []


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["serve", "--port", "0"], ["serve", "--explain"]])
def test_the_commands_refuse_it_in_one_line(
    command: list[str], hopper: PretendGpu, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--device", "cuda"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert re.search(MISSING, printed.err) and "sparse_attention" in printed.err


def test_under_the_reference_nothing_is_required(hopper: PretendGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with megamoe.ops.use("reference"):
        assert not dispatch.uses_kernels(CUDA)
        dispatch.require([("sparse_attention", {})], CUDA, what="model")
        assert dispatch.explain(CUDA) == "cuda:0: references, no kernels"
        assert dispatch.weight_layout("nvfp4_linear", CUDA) is CodeLayout.ROW_MAJOR


def test_weights_that_do_not_fit_the_kernels_layout_are_refused(hopper: PretendGpu) -> None:
    calls = [("nvfp4_linear", {"N": 100, "K": 256}), ("nvfp4_weight_only_experts", {"E": 8, "A": 2, "D": 96, "F": 128})]
    with pytest.raises(
        NotImplementedError, match=r"nvfp4_linear of 100 x 256 \(N must be a multiple of 16, K of 64\), nvfp4_we"
    ):
        dispatch.require(calls, CUDA, what="model")
    dispatch.require([("nvfp4_linear", {"N": 96, "K": 256})], CUDA, what="model")


def test_a_pack_on_the_cpu_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="a kernel pack is for a CUDA device; got cpu. Leave --pack out."):
        LLM("tiny", pack=tmp_path)


def test_the_cpu_says_that_there_are_no_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM("tiny")
    assert llm.explain() == "cpu: references, no kernels" and llm.model.weights.num_relaid == 0  # type: ignore[attr-defined]
    assert main(["generate", "--prompt", "x", "--max-tokens", "1", "--explain"]) == 0
    assert capsys.readouterr().err == "cpu: references, no kernels\n"
    assert main(["serve", "--explain"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["kernels"] == {"summary": "cpu: references, no kernels", "ledger": [], "conversions": []}


def test_every_operation_has_a_kernel_or_can_be_lent_its_reference() -> None:
    """What the GPU tests of readiness lend: an operation that is new and forgotten there fails here, without a GPU."""
    calls = megamoe.load("tiny").op_calls(with_drafts=True)
    missing = {op for op, _ in calls if module_for(op, "sm90a") is None}
    assert missing <= set(REFERENCES)
    for name in REFERENCES.values():
        file, _, function = name.partition(".")
        assert callable(getattr(importlib.import_module(f"megamoe.ops.{file}"), function))
