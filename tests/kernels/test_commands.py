# SPDX-License-Identifier: Apache-2.0
"""megamoe compile, verify OP and bench OP as typed, on a machine without a GPU."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch

import megamoe
from megamoe.cli import main
from megamoe.kernels import pack as packing
from megamoe.kernels.compile import CompileError, Request
from megamoe.kernels.pack import open_pack
from megamoe.kernels.plan import requests_for
from megamoe.models.deepseek_v4.calls import checkpoint_calls, model_calls, pairs
from megamoe.models.deepseek_v4.config import load_config
from megamoe.models.deepseek_v4.shapes import op_calls
from megamoe.models.load import BUNDLED, load
from megamoe.models.recipe import get_recipe

from ..fake_files import fake
from ..models.deepseek_v4.checkpoints import PRO
from ..models.deepseek_v4.test_calls import INNER, INNER_PLACES, UNUSED
from .objects import FakeCompiler


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    fake = FakeCompiler()
    monkeypatch.setattr(packing, "compile_objects", fake)
    return fake


def test_compile_builds_what_the_models_need(
    tmp_path: pathlib.Path, compiler: FakeCompiler, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pack"
    assert main(["compile", "--model", "tiny", "--model", "flash", "--arch", "sm90a", "--out", str(out)]) == 0
    calls = [(call.op, call.dims) for model in ("tiny", "flash") for call in op_calls(model)]
    assert set(open_pack(out, version=megamoe.__version__).objects) == set(requests_for(calls, "sm90a"))
    assert capsys.readouterr().out.startswith(f"{len(compiler.compiled)} kernels for sm90a in {out}: ")


@pytest.mark.parametrize("arch", ["sm90a", "sm100a", "sm103a"])
def test_compile_says_what_takes_few_tokens_only(
    arch: str, tmp_path: pathlib.Path, compiler: FakeCompiler, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", "--model", "tiny", "--arch", arch, "--out", str(tmp_path / "pack")]) == 0
    printed = capsys.readouterr().out
    if arch == "sm90a":
        assert "few tokens" not in printed and "linear.weight_tiles_sm90" in {one.module for one in compiler.compiled}
    else:
        few = printed.partition(f"for few tokens only on {arch}: ")[2].splitlines()[0]
        assert few.startswith("fp8_grouped_linear (32), fp8_linear (64 (N ≤ 4,095), 32), nvfp4_experts (4 E / A, ")
        assert "route_experts" not in few and "linear" in printed.partition("without a kernel for")[2].splitlines()[0]
        assert {one.module for one in compiler.compiled} >= {"linear.linear_stream", "experts.expert_stream"}
        assert not any(one.module.endswith("_sm90") for one in compiler.compiled)


def packed(out: pathlib.Path, *arguments: str) -> set[Request]:
    assert main(["compile", "--arch", "sm90a", "--out", str(out), *arguments]) == 0
    return set(open_pack(out, version=megamoe.__version__).objects)


@pytest.mark.parametrize(
    ("layout", "op", "absent"),
    [
        ("nvfp4", "nvfp4_weight_only_linear", "quantize_fp8_rows"),  # every linear in NVFP4
        ("preview", "nvfp4_weight_only_experts", "nvfp4_weight_only_linear"),  # MXFP4 experts run as NVFP4, FP8 linears
        ("bf16", "rms_norm", "nvfp4_weight_only_experts"),
    ],
)
def test_compile_reads_config_and_headers_of_any_checkpoint(
    layout: str, op: str, absent: str, tmp_path: pathlib.Path, compiler: FakeCompiler
) -> None:
    """Sizes that no table has: those of the small fake model, in the formats its tensors have."""
    fake.write_fake(tmp_path / "checkpoint", "small", layout)
    found = packed(tmp_path / "pack", "--model", str(tmp_path / "checkpoint"), "--recipe", "w4a16")
    calls = checkpoint_calls(tmp_path / "checkpoint", [get_recipe("w4a16")])
    assert found == set(requests_for(pairs(calls), "sm90a")) and len(found) > 8
    ops = {call.op for call in calls}
    assert op in ops and absent not in ops
    hidden = load_config(tmp_path / "checkpoint").hidden_size
    assert all(call.dims["D"] == hidden for call in calls if call.op == "route_experts")
    every = model_calls(load_config(tmp_path / "checkpoint"), None, get_recipe("w4a16"), num_mtp=1)
    assert found < set(requests_for(pairs(every), "sm90a"))


def test_compile_of_a_checkpoint_is_what_its_model_will_ask_for(tmp_path: pathlib.Path, compiler: FakeCompiler) -> None:
    wanted = set()
    for recipe in ("w4a16", "w4a4"):
        model = load("tiny", recipe=recipe)
        wanted |= set(requests_for(model.op_calls(with_drafts=True), "sm90a"))
    assert packed(tmp_path / "pack", "--model", str(BUNDLED["tiny"])) == wanted


def test_compile_with_config_alone_builds_for_every_format(
    tmp_path: pathlib.Path, compiler: FakeCompiler, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRO))
    found = packed(tmp_path / "pack", "--model", str(tmp_path))
    named = packed(tmp_path / "named", "--model", "pro")
    # The table also has what a DSpark draft calls, and fused operations that the model does not call yet.
    inner = UNUSED | INNER | {"hyper_connection_head"}  # the model's own head has its norm with it
    more = [
        one
        for one in op_calls("pro")
        if one.where.startswith("mtp") or one.op in inner or (one.op, one.where) in INNER_PLACES
    ]
    assert found < named and named - found <= set(requests_for(pairs(more), "sm90a"))
    assert "without a kernel for sm90a: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "flash", "--arch", "sm80"], "--arch must be one of sm90a, sm100a, sm103a; got 'sm80'"),
        (["--model", "nowhere", "--arch", "sm90a"], "config: no file nowhere/config.json. Pass a checkpoint's folder."),
        (["--model", "flash", "--arch", "sm90a", "--recipe", "w4a4"], "goes with a checkpoint's directory; got 'w4a4'"),
        (["--arch", "sm90a"], "Missing option '--model'"),
    ],
)
def test_compile_refuses_bad_input(
    arguments: list[str],
    message: str,
    tmp_path: pathlib.Path,
    compiler: FakeCompiler,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["compile", *arguments, "--out", str(tmp_path / "pack")]) == 2
    assert message in capsys.readouterr().err and compiler.compiled == []


def test_compile_refuses_a_checkpoint_that_is_none(
    tmp_path: pathlib.Path, compiler: FakeCompiler, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 1000, "n_routed_experts": 3}))
    assert main(["compile", "--model", str(tmp_path), "--arch", "sm90a", "--out", str(tmp_path / "pack")]) == 2
    assert "is missing. Use the config.json that belongs to the weights." in capsys.readouterr().err
    assert main(["compile", "--model", str(tmp_path), "--recipe", "w1", "--arch", "sm90a", "--out", "x"]) == 2
    assert "unknown recipe 'w1'; allowed are exact, w4a16, w4a4" in capsys.readouterr().err


def test_compile_prints_the_compilers_words(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise CompileError("compile: a kernel for sm90a does not compile:\nline one\nline two")

    monkeypatch.setattr(packing, "compile_objects", fail)
    assert main(["compile", "--model", "tiny", "--arch", "sm90a", "--out", str(tmp_path / "pack")]) == 2
    assert "does not compile:\nline one\nline two" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "rms_norm"],
        ["verify", "--arch", "sm90a"],
        ["verify", "all", "--json"],
        ["bench"],
        ["bench", "rms_norm"],
    ],
)
def test_without_a_gpu_they_say_so_and_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "there is no CUDA device here" in printed.err


def test_kernels_and_components_are_not_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "rms_norm", "--model", "tiny"]) == 2
    assert "--model and --originals belong to the components" in capsys.readouterr().err
