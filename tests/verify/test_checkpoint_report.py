# SPDX-License-Identifier: Apache-2.0
"""`megamoe inspect`: what it prints, exit codes, JSON, the memory plan; its time and memory on a complete V4-Pro.

Rows C1 and C15 of docs/faults.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from megamoe.cli import main
from megamoe.models.deepseek_v4.memory import CACHE_FORMATS, Split, cache_plan
from megamoe.verify.checkpoint import Inspection, inspect_checkpoint
from megamoe.verify.checkpoint_report import USABLE, PlanRequest, fits, report

from ..fake_files import Files, fake


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> pathlib.Path:
    """A clean small checkpoint."""
    return fake.write_fake(tmp_path_factory.mktemp("good"), "small", "nvidia")


@pytest.fixture(scope="module")
def flash(tmp_path_factory) -> Inspection:
    """The first Flash release, full size."""
    return inspect_checkpoint(fake.write_fake(tmp_path_factory.mktemp("flash"), "flash", "preview"))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run the command; return exit code and standard output."""
    status = main(["inspect", *arguments])
    captured = capsys.readouterr()
    assert captured.err == ""
    return status, captured.out


# The command.


def test_a_good_checkpoint(good, capsys):
    status, out = printed(capsys, str(good))
    assert status == 0
    assert "release       a DeepSeek-V4 of another size, NVFP4 experts in NVIDIA's layout" in out
    assert "tensors       480 as expected" in out and "classic MTP, 1 stage" in out
    assert "routed experts" in out and "nvfp4 (60)" in out and "mxfp4 (12)" in out
    assert "memory plan" in out and "notes (1)" in out and "good: nothing wrong was found" in out


def test_findings_are_grouped_and_named(good, tmp_path, capsys):
    files = Files.read(good)
    for expert in range(4):
        for layer in range(5):
            name = f"layers.{layer}.ffn.experts.{expert}.w2.weight_scale"
            files.put(name, "F8_E4M3", files.tensors[name].shape[::-1])
    files.put_float("layers.2.ffn.experts.1.w1.input_scale", 3.7e-16)
    status, out = printed(capsys, str(files.write(tmp_path)))
    assert status == 1 and "findings (2)" in out and "2 findings" in out
    assert "F4 scales-transposed  × 20" in out and "F15 input-scale-near-zero\n" in out
    assert "layers.0.ffn.experts.0.w2.weight_scale: F8_E4M3 [8, 256], expected F8_E4M3 [256, 8]." in out
    assert "and 15 more (all with --json)" in out and "→ It looks transposed." in out


def test_unreadable(tmp_path, good, capsys):
    files = Files.read(good)
    files.config["model_type"] = "deepseek_v41"
    status, out = printed(capsys, str(files.write(tmp_path)))
    assert status == 2 and "DeepSeek-V4.1" in out and "unreadable" in out and "memory plan" not in out


def test_no_directory(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a directory, and bundled are tiny. Pass a directory" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--gpus", "--gpu-memory", "--context", "--sequences"])
def test_options_must_be_positive(option, capsys):
    assert main(["inspect", "tiny", option, "0"]) == 2
    assert option in capsys.readouterr().err


def test_the_bundled_model(capsys):
    status, out = printed(capsys, "tiny")
    assert status == 0 and "every linear in NVFP4 (megamoe)" in out


def test_output_to_a_file_is_not_cut(good, capsys):
    _, out = printed(capsys, str(good))
    assert "…" not in out and max(len(line) for line in out.splitlines()) <= 120


# Hub caches.


def as_snapshot(good: pathlib.Path, root: pathlib.Path, commit: str = "abc123") -> pathlib.Path:
    """Lay a checkpoint out as a hub cache does: links to blobs that are named by their hashes."""
    snapshot, blobs = root / "snapshots" / commit, root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir(exist_ok=True)
    for path in good.iterdir():
        content = path.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        name = hashlib.sha256(content).hexdigest() if path.suffix == ".safetensors" else git
        (blobs / name).write_bytes(content)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    return snapshot


def test_blobs_are_proved_by_their_names(good, tmp_path, capsys):
    snapshot = as_snapshot(good, tmp_path / "models--someone--v4")
    (snapshot / "notes.txt").write_text("mine")
    status, out = printed(capsys, str(snapshot), "--hash")
    assert status == 0
    assert f"hashes: {len(list(good.iterdir()))} files proved by the hash that names the blob; 1 file no link" in out
    blob = (snapshot / "model-00002-of-00003.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    assert printed(capsys, str(snapshot))[0] == 0  # no sample shows one bit
    status, out = printed(capsys, str(snapshot), "--hash", "--json")
    (found,) = json.loads(out)["findings"]
    assert status == 1 and found["rule"] == "file-hash" and found["tensors"] == ["model-00002-of-00003.safetensors"]
    assert found["allowed"] == blob.name and "notes.txt" in json.loads(out)["hashes"]["not_compared"]


def test_files_that_are_no_links_prove_nothing(good, capsys):
    _, out = printed(capsys, str(good), "--hash")
    assert "hashes: 0 files proved" in out


def test_a_hub_cache_is_told_where_its_checkpoints_are(good, tmp_path, capsys):
    repository = tmp_path / "hub" / "models--someone--v4"
    old = as_snapshot(good, repository, "0000")
    new = as_snapshot(good, repository, "abc123")
    for directory in (repository, tmp_path / "hub"):
        assert main(["inspect", str(directory)]) == 2
        assert f"{directory} is a hub cache; the checkpoints lie in it. Pass {new}, {old}." in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["inspect", ""], ["generate", "--prompt", "x", "--model", ""], ["serve", "--model="]]
)
def test_no_name_is_refused(command, capsys):
    assert main(command) == 2
    assert "no model named (got '')" in capsys.readouterr().err


def test_a_home_directory_is_expanded(good, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(good.parent))
    assert printed(capsys, f"~/{good.name}")[0] == 0


# JSON.


def test_json_names_every_tensor(good, tmp_path, capsys):
    files = Files.read(good)
    names = [name for name in files.tensors if name.endswith(".input_scale")]
    for name in names:
        files.put_float(name, 268.8)
    status, out = printed(capsys, str(files.write(tmp_path)), "--json")
    content = json.loads(out)
    assert status == 1 and out.count("\n") == 1 and content["verdict"] == "findings"
    found = {one["rule"]: one for one in content["findings"]}
    assert set(found) == {"input-scale-reciprocal"}
    one = found["input-scale-reciprocal"]
    assert sorted(one["tensors"]) == sorted(names) and one["count"] == 60 and one["fault"] == "F3"
    assert one["got"] == "268.8" and one["allowed"] == "below 1" and one["remedy"]


def test_json_of_a_good_checkpoint(good, capsys):
    status, out = printed(capsys, str(good), "--json")
    content = json.loads(out)
    assert status == 0 and content["findings"] == [] and content["verdict"] == "good"
    assert content["tensors"] == {"found": 480, "expected": 480, "published": None}
    assert content["groups"]["routed experts"]["formats"] == {"nvfp4": 60}
    assert [note["rule"] for note in content["notes"]] == ["index-total-size"]
    assert content["sampled"]["scalars"] == 120


def test_json_without_a_config(good, tmp_path, capsys):
    directory = Files.read(good).write(tmp_path)
    (directory / "config.json").unlink()
    status, out = printed(capsys, str(directory), "--json")
    content = json.loads(out)
    assert status == 2 and content["memory"] is None and content["tensors"]["expected"] is None


# The memory plan.


def test_the_plan_of_flash(flash):
    content = report(flash, PlanRequest())
    memory = content["memory"]
    assert content["release"] == "DeepSeek-V4-Flash (preview)"
    assert content["bytes"] == dict.fromkeys(("found", "expected", "published"), 159_609_485_896)
    assert memory["weights"]["total"] == 159_609_485_896
    per_token = [int(one["bytes_per_token"]) for one in memory["cache"]]
    assert per_token == [3850, 3514, 6880]
    assert memory["cache"][0]["fixed_bytes"] == {"window": 3_214_336, "draft_window": 74_752, "compressor": 12_206_080}
    assert {(fit["gpus"], fit["gpu_memory_gb"]) for fit in memory["fits"]} == {
        (gpus, memory) for gpus in (1, 2, 4, 8) for memory in (80, 141, 192)
    }


def test_sequences_that_fit_worked_by_hand(flash):
    assert flash.weights is not None and flash.config is not None
    plan = cache_plan(flash.config, CACHE_FORMATS[0], num_draft_layers=1)
    request = PlanRequest(gpus=4, gpu_memory_gb=80, context=131_072, sequences=100)
    data, tensor = fits(flash, plan, request)
    assert (data.split, tensor.split) == (Split.DATA, Split.TENSOR)
    usable = int(80e9 * USABLE)
    held = -(-flash.weights.experts // 4) + flash.weights.divided + flash.weights.replicated
    one = 3_214_336 + 74_752 + 12_206_080 + 32_768 * 21 * 716 + 1024 * 20 * 584
    assert data.weight_bytes == held and data.free_bytes == usable - held
    assert data.sequences == {131_072: (usable - held) // one * 4}  # each GPU serves its own
    held = -(-flash.weights.experts // 4) + -(-flash.weights.divided // 4) + flash.weights.replicated
    assert tensor.weight_bytes == held and tensor.sequences == {131_072: (usable - held) // one}


def test_weights_that_do_not_fit(flash):
    plan = cache_plan(flash.config, CACHE_FORMATS[0])
    fit = fits(flash, plan, PlanRequest(gpus=1, gpu_memory_gb=80, context=1024))[0]
    assert fit.free_bytes < 0 and fit.sequences == {1024: 0}


def test_gpus_that_cannot_divide_the_experts(flash, capsys):
    plan = cache_plan(flash.config, CACHE_FORMATS[0])
    fit = fits(flash, plan, PlanRequest(gpus=3, gpu_memory_gb=192, context=1024))[0]
    assert fit.weight_bytes is None and fit.sequences == {1024: 0}


@pytest.mark.parametrize(("sequences", "word"), [("1", "yes"), ("100000000", "no")])
def test_asking_for_sequences(good, capsys, sequences, word):
    arguments = [str(good), "--gpus", "2", "--gpu-memory", "80", "--context", "1000", "--sequences", sequences]
    status, out = printed(capsys, *arguments)
    assert status == 0
    rows = [line.split() for line in out.splitlines() if "2 × 80 GB" in line]
    assert len(rows) == 2 and all(row[-1] == word for row in rows)
    _, out = printed(capsys, *arguments, "--json")
    assert {fit["enough"] for fit in json.loads(out)["memory"]["fits"]} == {word == "yes"}


# The complete V4-Pro.


# Peak memory is VmHWM, which starts anew with the program: ru_maxrss of a child begins at what its parent held.
MEASURED = """
import json, re, resource, sys
from megamoe.cli import main
status = main(["inspect", sys.argv[1], "--json"])
used = resource.getrusage(resource.RUSAGE_SELF)
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"status": status, "peak_bytes": peak, "cpu_s": used.ru_utime + used.ru_stime}))
"""


@pytest.mark.parametrize(
    ("layout", "num_tensors", "num_bytes", "release", "cpu_s"),
    [
        ("dspark", 149_782, 892_727_580_904, "DeepSeek-V4-Pro-0813 (DSpark)", 15.0),
        ("nvidia", 285_660, 913_061_485_688, "NVIDIA DeepSeek-V4-Pro-NVFP4", 30.0),
    ],
)
def test_pro_takes_seconds_and_little_memory(tmp_path, layout, num_tensors, num_bytes, release, cpu_s):
    """At most 15 s and 500 MB. CPU seconds, because the clock also counts what else the machine is doing."""
    directory = fake.write_fake(tmp_path / "pro", "pro", layout)
    content, measured = measure(MEASURED, str(directory))
    assert measured["status"] == 0 and content["findings"] == []
    assert content["tensors"] == dict.fromkeys(("found", "expected", "published"), num_tensors)
    assert content["bytes"] == dict.fromkeys(("found", "expected", "published"), num_bytes)
    assert content["release"] == release
    assert [int(one["bytes_per_token"]) for one in content["memory"]["cache"]] == [5511, 5031, 9848]
    assert measured["peak_bytes"] <= 500_000_000, measured
    assert measured["cpu_s"] <= cpu_s, measured


def test_the_measure_of_memory_measures():
    hungry = "print({})\nheld = bytearray(b'x' * 600_000_000)\n" + MEASURED.replace('"--json"', '"--help"')
    hungry = hungry.replace("status = main(", "status = 0 and main(")
    _, measured = measure(hungry, "tiny")
    assert measured["peak_bytes"] > 500_000_000


def measure(code: str, argument: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run code in a process of its own; return the JSON of its two lines."""
    done = subprocess.run(
        [sys.executable, "-c", code, argument],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    return json.loads(first), json.loads(second)
