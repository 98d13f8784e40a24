# SPDX-License-Identifier: Apache-2.0
"""Memory is counted before weights are read: refused under hard limits, else warned about; one line always.

Row C5 of docs/faults.md.
"""

from __future__ import annotations

import logging
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import megamoe
from megamoe.cli import main
from megamoe.engine.config import EngineConfig
from megamoe.engine.engine import Engine
from megamoe.models import BUNDLED, room
from megamoe.models.deepseek_v4.examine import examine
from megamoe.models.deepseek_v4.weights import WeightLoader, bytes_when_loaded
from megamoe.models.recipe import get_recipe
from megamoe.models.room import no_room_is_told, require_room, rooms

from ..fake_files import fake

CPU = torch.device("cpu")


def held_bytes(value: object, seen: set[int]) -> int:
    """Return the bytes of all tensors in a tree of dataclasses."""
    if isinstance(value, torch.Tensor):
        is_new = value.data_ptr() not in seen
        seen.add(value.data_ptr())
        return value.numel() * value.dtype.itemsize if is_new else 0
    if isinstance(value, tuple):
        return sum(held_bytes(one, seen) for one in value)
    return sum(held_bytes(one, seen) for one in vars(value).values()) if hasattr(value, "__dataclass_fields__") else 0


@pytest.mark.parametrize("recipe", ["exact", "w4a16"])
@pytest.mark.parametrize("layout", ["preview", "base", "nvidia", "nvfp4", "dspark", "resave-modules", "bf16"])
def test_the_bytes_counted_are_the_bytes_held(tmp_path, layout, recipe):
    directory = fake.write_fake(tmp_path, "small", layout)
    chosen, found = get_recipe(recipe), examine(directory)
    assert found.stored is not None and found.claims is not None
    dtype = chosen.activation_dtype if chosen.dequantize_weights else None
    counted = bytes_when_loaded(found.stored, found.claims, dtype)
    assert counted == pytest.approx(held_bytes(megamoe.load(directory, recipe=recipe).weights, set()), rel=0.01)


@pytest.mark.parametrize("option", ["d", "v"])
def test_a_model_beyond_a_limit_of_the_process_is_refused_before_it_is_read(tmp_path, option):
    fake.write_fake(tmp_path / "big", "flash", "preview")
    command = (
        f"ulimit -{option} 30000000; exec {sys.executable} -m megamoe.cli generate --prompt x --model {tmp_path}/big"
    )
    write_tokenizer_beside(tmp_path / "big")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=120)
    name = {"d": "RLIMIT_DATA", "v": "RLIMIT_AS"}[option]
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert re.search(rf"needs 3\d\d,[\d,]+ bytes, mapped files among them, and {name} leaves \d[\d,]+\.", done.stderr)


def write_tokenizer_beside(directory: pathlib.Path) -> None:
    """Give a checkpoint the bundled model's tokenizer."""
    source = BUNDLED["tiny"] / "tokenizer.json"
    (directory / "tokenizer.json").write_bytes(source.read_bytes())


def test_a_control_group_is_a_hard_limit(tmp_path, monkeypatch):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/pod/container\n")
    pod = tmp_path / "cgroup" / "pod"
    (pod / "container").mkdir(parents=True)
    (pod / "container" / "memory.max").write_text("max\n")
    (pod / "memory.max").write_text("3000000\n")
    (pod / "memory.current").write_text("2500000\n")
    (pod / "memory.stat").write_text("anon 100\ninactive_file 300000\nactive_file 200000\n")
    monkeypatch.setattr(room, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(room, "_CGROUP", tmp_path / "cgroup")
    assert [one.free_bytes for one in rooms(CPU) if one.name == "the control group /pod (memory.max)"] == [1_000_000]
    require_room("load: x", 1_000_000, 10**12, CPU)  # the page cache of mapped files is given back
    with pytest.raises(
        ValueError, match=r"needs 1,000,001 bytes and the control group /pod .* leaves 1,000,000\. Give"
    ):
        require_room("load: x", 1_000_001, 0, CPU)


def test_free_memory_alone_is_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:  7 kB\n")
    monkeypatch.setattr(room, "_PROC", tmp_path)
    with caplog.at_level(logging.WARNING, logger="megamoe"):
        megamoe.load(fake.write_fake(tmp_path / "small", "small", "preview"))
    assert re.search(r"needs [\d,]+ bytes and the machine \(MemAvailable\) leaves 7,168\. It goes on", caplog.text)


def test_a_gpu_is_a_hard_limit(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    gpu = torch.device("cuda:1")
    require_room("load: x", 1000, 0, gpu)
    with pytest.raises(ValueError, match=r"needs 1,001 bytes and cuda:1 leaves 1,000\."):
        require_room("load: x", 1001, 0, gpu)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_allocation_that_fails_later_is_one_line(error, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(WeightLoader, "load", fail)
    assert main(["generate", "--prompt", "x"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "memory ran out while its" in told


def test_other_errors_keep_their_name():
    with pytest.raises(RuntimeError, match="a bug"), no_room_is_told("x", 1):
        raise RuntimeError("a bug")
    with pytest.raises(FileNotFoundError), no_room_is_told("x", 1):
        open("/nowhere/at/all")


def test_c5_caches_that_do_not_fit_are_one_line() -> None:
    """After the weights: the engine's pools fail as the weights do, with the number and what helps."""
    model = megamoe.load("tiny")
    with pytest.raises(
        ValueError, match=r"^cache: model 'tiny': memory ran out while its [\d,]{15,} bytes of caches"
    ) as told:
        Engine(model, EngineConfig(num_pages=2**31, num_snapshots=0))
    assert "\n" not in str(told.value) and "fewer pages" in str(told.value)
