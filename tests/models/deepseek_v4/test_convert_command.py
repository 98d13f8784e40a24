# SPDX-License-Identifier: Apache-2.0
"""The command `megamoe convert`: what it prints, its exit codes, and a process that is killed from outside.

Rows C6, C8, C9 and C15 of docs/faults.md.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from types import ModuleType

import pytest
import torch

from megamoe.checkpoint import CheckpointReader, write_safetensors
from megamoe.checkpoint.overlay import write_overlay
from megamoe.checkpoint.steps import Mxfp4ToNvfp4
from megamoe.checkpoint.stopped import MANIFEST_NAME
from megamoe.cli import main
from megamoe.models.deepseek_v4.convert import SearchChoice
from megamoe.models.deepseek_v4.convert_command import read_calibration
from megamoe.models.load import BUNDLED

from .checkpoints import CONFIG, LAYOUTS, encode_all, make_master, save
from .test_convert import OFFICIAL_CONFIG


@pytest.fixture
def official(tmp_path: pathlib.Path, seed: int) -> pathlib.Path:
    return save(tmp_path / "official", encode_all(make_master(seed), LAYOUTS["official"])[0])


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_it_prints(official, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(official), str(out)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert re.fullmatch(
        rf"wrote {re.escape(str(out))}: 0\.002 GB -> 0\.002 GB in 1 file\(s\); weights: .*48 nvfp4.*", lines[0]
    )
    assert lines[1] == "and 2 other file(s) of 0.0 MB"  # config.json, hf_quant_config.json
    assert lines[2].startswith("48 of 48 converted weights proved equal to the source, block by block; report: ")
    assert re.fullmatch(r"\d+\.\d s, \d+\.\d\d GB/s of source read", lines[3]) and len(lines) == 4
    assert "no calibration: weights that become NVFP4 get input_scale 0.125" in printed.err
    assert main(["convert", str(official), str(out)]) == 0
    again = capsys.readouterr().out
    assert "0.00 GB/s of source read" in again and "48 of 48 converted weights proved" not in again
    assert (
        "0 of 48 converted weights were read and written in this run; 48 are in files that were kept and not" in again
    )
    assert "read: 1 file(s) were finished before, --verify reads them" in again


def flip(path: pathlib.Path, offset: int) -> None:
    """Change one byte of a file; its size, and its header, stay."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_verify_reads_what_was_written(official, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["convert", str(official), str(out)]
    assert main([*command, "--verify"]) == 2
    assert "is no conversion; there is nothing to compare with" in capsys.readouterr().err
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--verify"]) == 0
    files = len([path for path in out.rglob("*") if path.is_file()]) - 1  # all but the manifest
    assert f"{files} files, 0.002 GB: every byte is as it was written" in capsys.readouterr().out
    flip(out / "model.safetensors", -7)
    (out / "report.html").unlink()
    assert main([*command, "--verify"]) == 1
    told = capsys.readouterr().out
    assert "model.safetensors: its bytes are not those that were written (SHA-256 differs)." in told
    assert "report.html: missing." in told and f"2 of {files} files are not as they were written." in told
    assert main([*command, "--verify", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2


def test_the_manifest_has_the_sha256_of_every_file(official, tmp_path):
    out = tmp_path / "out"
    assert main(["convert", str(official), str(out)]) == 0
    lines = [json.loads(line) for line in (out / "convert-manifest.jsonl").read_text().splitlines()]
    for line in lines:
        if name := line.get("shard", line.get("file")):
            assert line["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest(), name
    named = {line.get("shard", line.get("file")) for line in lines} - {None}
    assert named == {path.name for path in out.iterdir()} - {"convert-manifest.jsonl"}


def test_weights_in_other_formats_stay_behind(official, tmp_path, capsys):
    (official / "model-Q4.gguf").write_bytes(b"GGUF" * 1000)
    (official / "LICENSE").write_text("free")
    out = tmp_path / "out"
    assert main(["convert", str(official), str(out)]) == 0
    printed = capsys.readouterr()
    assert "note: weights in other formats are not carried over: model-Q4.gguf" in printed.err
    assert "and 3 other file(s) of 0.0 MB" in printed.out
    assert not (out / "model-Q4.gguf").exists() and (out / "LICENSE").read_text() == "free"
    job = json.loads((out / "convert-manifest.jsonl").read_text().splitlines()[0])
    assert sorted(job["sources"]) == ["LICENSE", "config.json", "model.safetensors"]


def test_what_is_copied_must_fit_too(official, tmp_path, monkeypatch, capsys):
    with open(official / "notes.txt", "wb") as file:
        file.truncate(3_000_000)
    free = os.statvfs(tmp_path)
    small = os.statvfs_result([1, 1, 3_000_000, 3_000_000, 3_000_000, *list(free)[5:]])  # tensors alone fit
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    assert main(["convert", str(official), str(tmp_path / "out")]) == 2
    assert "its disk has 3,000,000 free" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: f"model.{name}",
        lambda name: f"{name}.weight",
        lambda name: f"model.{name.replace('.attn.wq_a', '.self_attn.q_a_proj').replace('.ffn.', '.mlp.')}.weight",
    ],
)
def test_a_calibration_is_read_in_every_spelling(official, tmp_path, spell):
    modules = [f"layers.{layer}.ffn.experts.0.{name}" for layer in range(4) for name in ("w1", "w2", "w3")]
    for name, words in (("plain", modules), ("spelled", [spell(module) for module in modules])):
        calibration = tmp_path / f"{name}.json"
        calibration.write_text(json.dumps(dict.fromkeys(words, 2.0)))
        assert main(["convert", str(official), str(tmp_path / name), "--calibration", str(calibration)]) == 0
    shards = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "spelled")]
    assert shards[0] == shards[1]


def test_a_calibration_that_does_not_fit_is_refused_in_a_few_lines(official, tmp_path, capsys):
    calibration = tmp_path / "calibration.json"
    for content, words in (
        ({}, "it names no weight at all"),
        ({f"blk.{layer}.{expert}.up": 1.0 for layer in range(40) for expert in range(99)}, "and 3,955 more"),
        ({"layers.0.attn.wq_a": 1.0, "model.layers.0.attn.wq_a": 2.0}, "is named twice, with 1.0 and 2.0"),
    ):
        calibration.write_text(json.dumps(content))
        assert main(["convert", str(official), str(tmp_path / "out"), "--calibration", str(calibration)]) == 2
        told = capsys.readouterr().err
        assert words in told and len(told) < 3000


def test_names_that_stand_for_nothing_or_for_a_place(official, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(official.parent))
    out = tmp_path / "out"
    assert main(["convert", "", str(out)]) == 2
    assert "no model named (got '')" in capsys.readouterr().err
    assert main(["convert", str(official), ""]) == 2
    assert "no destination named (got '')" in capsys.readouterr().err
    assert main(["convert", "~/official", "~/out"]) == 0 and (out / "config.json").is_file()
    capsys.readouterr()
    assert main(["convert", "tiny", str(tmp_path / "tiny")]) == 2
    assert re.search(r"nothing to convert: all \d+ are NVFP4 already", capsys.readouterr().err)
    assert main(["convert", "tiny", str(tmp_path / "tiny"), "--dry-run"]) == 2


def test_an_interrupt_says_how_to_go_on(official, tmp_path, monkeypatch, capsys):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Mxfp4ToNvfp4, "run", interrupt)
    assert main(["convert", str(official), str(tmp_path / "out")]) == 130
    assert "megamoe: stopped; give the same command again, and it goes on" in capsys.readouterr().err


def test_json(official, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(official), str(out), "--json", "--jobs", "1"]) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert printed.err.count("\n") == 1 and "note: config-format: config.json: no quantization_config" in printed.err
    assert [warning["rule"] for warning in summary["warnings"]] == ["config-format"]
    assert summary["proved_exact"] == summary["weights"] == 48
    assert summary["formats"] == {"fp8": 44, "mxfp4": 12, "nvfp4": 48} and summary["inexact"] == {}
    with CheckpointReader(out) as reader:
        assert summary["made_bytes"] == reader.num_bytes


def test_dry_run_writes_nothing_and_lists_inexact_blocks(official, tmp_path, capsys):
    with CheckpointReader(official) as reader:
        tensors = {name: reader.tensor(name).clone() for name in reader.names}
    tensors["layers.2.ffn.experts.1.w2.scale"].view(torch.uint8)[4, 0] = 60
    source = save(tmp_path / "wide", tensors)
    arguments = ["convert", str(source), str(tmp_path / "out"), "--dry-run"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "layers.2.ffn.experts.1.w2: 1 of 160 blocks have no equal" in error
    assert main([*arguments, "--experts", "requantize"]) == 0
    assert "  layers.2.ffn.experts.1.w2: 1 blocks, first [row, block] [4, 0]" in capsys.readouterr().out
    assert main([*arguments, "--experts", "requantize", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["inexact"] == {
        "layers.2.ffn.experts.1.w2": {"blocks": 1, "listed": [[4, 0]]}
    }
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--to", "int4"], "is not one of 'nvfp4', 'mxfp4', 'fp8'"),
        (["--to", "mxfp4", "--experts", "requantize"], "rounds to NVFP4 only"),
        (["--jobs", "0"], "--jobs"),
        (["--scale-search", "best"], "--scale-search must be one of max, mse, four-over-six"),
        (["--scale-search", "max,head=mse"], "got 'max,head=mse'"),
        (["--calibration", "nowhere.json"], "No such file or directory: nowhere.json"),
    ],
)
def test_refusals(official, tmp_path, capsys, arguments, reason):
    assert main(["convert", str(official), str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megamoe: error: ") and error.count("\n") == 1 and reason in error
    assert not (tmp_path / "out").exists()


def test_taken_and_missing_folders(official, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    assert main(["convert", str(official), str(tmp_path / "taken")]) == 2
    assert "exists, is not empty" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert str(tmp_path / "nowhere") in capsys.readouterr().err


def test_calibration_files(tmp_path):
    path = tmp_path / "amax.json"
    for content, reason in (("[1]", "must be an object"), ('{"a": "b"}', "must be an object"), ("{", "not JSON")):
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"calibration .*amax.json: {reason}"):
            read_calibration(path)
    path.write_text('{"layers.0.attn.wq_a": 2}')
    assert read_calibration(path) == {"layers.0.attn.wq_a": 2.0}


def test_a_process_killed_from_outside(seed, tmp_path, repository):
    """SIGKILL at random moments of a real process, then the same command to its end."""
    tensors, _ = encode_all(make_master(seed), LAYOUTS["official"])
    source = tmp_path / "source"
    source.mkdir()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 4
        shards.setdefault(f"model-{layer + 1:05d}-of-00005.safetensors", {})[name] = tensor
    for shard, part in shards.items():
        write_safetensors(source / shard, part)
    (source / "config.json").write_text(json.dumps(CONFIG))
    options = ["--attention", "nvfp4", "--draft", "convert", "--scale-search", "mse", "--jobs", "2"]
    assert main(["convert", str(source), str(tmp_path / "whole"), *options]) == 0
    out, order = tmp_path / "out", random.Random(seed)
    command = [sys.executable, "-m", "megamoe.cli", "convert", str(source), str(out), *options]
    killed = 0
    for _ in range(3):
        process = subprocess.Popen(command, cwd=repository, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begun = (out / MANIFEST_NAME).stat().st_mtime_ns if (out / MANIFEST_NAME).exists() else None
        while process.poll() is None and not list(out.glob(".*.partial")):
            time.sleep(0.005)
        time.sleep(order.random() * 0.5)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        assert begun is None or (out / MANIFEST_NAME).stat().st_mtime_ns >= begun
    assert killed
    assert subprocess.run(command, cwd=repository, capture_output=True, check=False).returncode == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_memory_does_not_grow_with_the_checkpoint(repository, tmp_path):
    """Recoding 0.35 GB takes little more than importing torch; a map or a list of its bytes would show."""
    source, out = tmp_path / "source", tmp_path / "out"
    make = ["tools/convert_rate.py", "--make", str(source), "--gigabytes", "0.3", "--shard-gigabytes", "0.2"]
    peak = "import re; print(re.search('VmHWM:.*?([0-9]+) kB', open('/proc/self/status').read())[1])"
    first = "import megamoe.models.deepseek_v4.convert_command"
    run = f"from megamoe.cli import main; assert main(['convert', {str(source)!r}, {str(out)!r}, '--jobs', '2']) == 0"
    peaks = []
    for code in (first, run):
        if not source.exists():
            subprocess.run([sys.executable, *make], cwd=repository, check=True, stdout=subprocess.DEVNULL)
        command = [sys.executable, "-c", f"{code}; {peak}"]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 100, peaks


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--attention", "nvfp4"],
        ["--attention", "nvfp4", "--draft", "convert"],
        ["--to", "fp8"],
    ],
    ids=" ".join,
)
def test_inspect_finds_nothing_wrong_with_what_was_written(official, tmp_path, capsys, options):
    (official / "config.json").write_text(json.dumps(OFFICIAL_CONFIG))
    assert main(["convert", str(official), str(tmp_path / "out"), "--scale-search", "max", *options]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0
    if not options:
        assert main(["convert", str(tmp_path / "out"), str(tmp_path / "back"), "--to", "mxfp4"]) == 0
        assert main(["inspect", str(tmp_path / "back")]) == 0
    assert "nothing wrong was found" in capsys.readouterr().out


# the tool that makes the bundled model


@pytest.fixture(scope="module")
def package(repository) -> ModuleType:
    """tools/tiny_model/package.py as a module."""
    folder = repository / "tools" / "tiny_model"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("package_tiny_model", folder / "package.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def test_the_bundled_model_is_what_convert_writes(package, repository, tmp_path):
    """The same tensors, dtypes, shapes and metadata; the weights themselves depend on the search."""
    tools = repository / "tools" / "tiny_model"
    write_overlay(BUNDLED["tiny"], tools / "master", tmp_path / "master")
    amax = json.loads((tools / "calibration.json").read_text())
    made = tmp_path / "made"
    made.mkdir()
    error = package.write_quantized(tmp_path / "master", amax, SearchChoice.parse("max"), made)
    assert 0.08 < error < 0.12
    assert {path.name for path in made.iterdir()} == set(package.SHIPPED)
    with CheckpointReader(made) as ours, CheckpointReader(BUNDLED["tiny"]) as shipped:
        assert ours.names == shipped.names
        for name in ours.names:
            assert str(ours.info(name)) == str(shipped.info(name))
            is_rounded = f"{name.removesuffix('.weight')}.weight_scale" in ours
            if not is_rounded and not name.endswith(("weight_scale", "weight_scale_2")):
                assert torch.equal(ours.tensor(name), shipped.tensor(name)), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (made, BUNDLED["tiny"])]
    for config in configs:
        config["quantization_config"].pop("producer")
    assert configs[0] == configs[1]
