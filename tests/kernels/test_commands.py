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
from megamoe.kernels.compile import CompileError
from megamoe.kernels.pack import open_pack
from megamoe.kernels.plan import requests_for
from megamoe.models.deepseek_v4.shapes import op_calls

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


def test_compile_knows_a_checkpoint_by_its_config(tmp_path: pathlib.Path, compiler: FakeCompiler) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4096, "n_routed_experts": 256}))
    assert main(["compile", "--model", str(tmp_path), "--arch", "sm100a", "--out", str(tmp_path / "pack")]) == 0
    assert open_pack(tmp_path / "pack", version=megamoe.__version__).target == "sm100a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "flash", "--arch", "sm80"], "--arch must be one of sm90a, sm100a, sm103a; got 'sm80'"),
        (["--model", "nowhere", "--arch", "sm90a"], "No such file or directory: nowhere/config.json"),
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


def test_compile_refuses_models_it_has_no_sizes_of(
    tmp_path: pathlib.Path, compiler: FakeCompiler, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 1000, "n_routed_experts": 3}))
    assert main(["compile", "--model", str(tmp_path), "--arch", "sm90a", "--out", str(tmp_path / "pack")]) == 2
    assert (
        "must be those of tiny (256, 8), flash (4096, 256), pro (7168, 384); got (1000, 3)" in capsys.readouterr().err
    )


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
