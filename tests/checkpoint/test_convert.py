# SPDX-License-Identifier: Apache-2.0
"""Writing a checkpoint: the same bytes however it is divided, stopped and taken up again; clear errors otherwise."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megamoe.checkpoint import CheckpointError, CheckpointReader, convert, write_safetensors
from megamoe.checkpoint.byte_range import ByteRange, read_range
from megamoe.checkpoint.convert import Output, Plan, Result, Shard, Target, run
from megamoe.checkpoint.manifest import MANIFEST_NAME
from megamoe.checkpoint.progress import ProgressLine
from megamoe.checkpoint.steps import Carry

NUM_SHARDS, NUM_TENSORS, NUM_VALUES = 3, 4, 3000


@dataclasses.dataclass(frozen=True)
class Negate:
    """A step with two outputs, whose source is read and proved."""

    name: str
    source: ByteRange
    memory_bytes: int = 1000
    hook: Callable[[], None] = lambda: None

    @property
    def outputs(self) -> tuple[Output, ...]:
        return Output(f"{self.name}.negated", "I32", (NUM_VALUES,)), Output(f"{self.name}.copy", "I32", (NUM_VALUES,))

    @property
    def source_bytes(self) -> int:
        return self.source.num_bytes

    def run(self, target: Target) -> list[dict[str, Any]]:
        self.hook()
        values = torch.frombuffer(read_range(self.source), dtype=torch.int32)
        target.write(f"{self.name}.negated", -values)
        assert target.copy_checked(f"{self.name}.copy", self.source)
        assert torch.equal(target.read(f"{self.name}.copy"), values)
        return [{"name": self.name, "sum": int(values.sum()), "third": int(values[2]) / 3}]


@pytest.fixture
def source(tmp_path: pathlib.Path, seed: int) -> pathlib.Path:
    """A source of three files."""
    folder = tmp_path / "source"
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for number in range(NUM_SHARDS):
        tensors = {
            f"t{number}.{index}": torch.randint(-(2**30), 2**30, (NUM_VALUES,), dtype=torch.int32, generator=generator)
            for index in range(NUM_TENSORS)
        }
        write_safetensors(folder / f"model-{number + 1:05d}-of-{NUM_SHARDS:05d}.safetensors", tensors)
    (folder / "config.json").write_text("{}")
    (folder / "nested").mkdir()
    (folder / "nested" / "tokenizer.json").write_text('{"a": 1}')
    return folder


def make_plan(source: pathlib.Path, *, options: dict[str, Any] | None = None, **step: Any) -> Plan:
    """Negate every tensor but the first of a file, which is carried over."""
    with CheckpointReader(source) as reader:
        shards: dict[str, list[Any]] = {}
        for name in reader.names:
            info = reader.info(name)
            where = ByteRange(source / info.shard, reader.headers.data_starts[info.shard] + info.begin, info.num_bytes)
            carried = Carry(Output(name, "I32", (NUM_VALUES,)), where)
            shards.setdefault(info.shard, []).append(carried if name.endswith(".0") else Negate(name, where, **step))
    return Plan(
        source=source,
        shards=tuple(Shard(name, tuple(steps)) for name, steps in shards.items()),
        metadata={"format": "pt"},
        files={"config.json": b'{"made": true}\n', "nested/tokenizer.json": source / "nested" / "tokenizer.json"},
        options=options or {"how": "negate"},
    )


def finish(records: tuple[dict[str, Any], ...]) -> dict[str, bytes]:
    return {"report.json": json.dumps(records).encode()}


def go(plan: Plan, destination: pathlib.Path, **arguments: Any) -> Result:
    return run(plan, destination, finish=finish, **arguments)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(plan: Plan, destination: pathlib.Path, **arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        go(plan, destination, **arguments)
    return str(caught.value)


def assert_nothing_half_written(destination: pathlib.Path) -> None:
    """Every file under a final name is whole; no temporary file is left."""
    for path in destination.rglob("*"):
        assert not path.name.startswith("."), path
        if path.suffix == ".safetensors":
            header = int.from_bytes(path.read_bytes()[:8], "little")
            entries = json.loads(path.read_bytes()[8 : 8 + header])
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            assert path.stat().st_size == 8 + header + max(ends)
            assert set(path.read_bytes()[8 + header :]) != {0}


# what is written


def test_values_files_index_and_records(source, tmp_path):
    out = tmp_path / "out"
    result = go(make_plan(source), out)
    with CheckpointReader(source) as before, CheckpointReader(out) as after:
        assert len(after.names) == NUM_SHARDS * (1 + 2 * (NUM_TENSORS - 1))
        for name in before.names:
            if name.endswith(".0"):
                assert torch.equal(after.tensor(name), before.tensor(name))
            else:
                assert torch.equal(after.tensor(f"{name}.negated"), -before.tensor(name))
                assert torch.equal(after.tensor(f"{name}.copy"), before.tensor(name))
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == after.num_bytes == make_plan(source).num_bytes
        assert result.source_bytes == before.num_bytes and result.shards_kept == 0
    assert json.loads((out / "config.json").read_text()) == {"made": True}
    assert (out / "nested" / "tokenizer.json").read_text() == '{"a": 1}'
    assert [record["name"] for record in result.records] == [
        f"t{number}.{index}" for number in range(NUM_SHARDS) for index in range(1, NUM_TENSORS)
    ]
    assert_nothing_half_written(out)


@pytest.mark.parametrize("jobs", [2, 5])
def test_jobs_change_no_byte(source, tmp_path, seed, jobs):
    go(make_plan(source), tmp_path / "one")
    order = random.Random(seed)
    plan = make_plan(source, hook=lambda: time.sleep(order.random() / 500))
    go(plan, tmp_path / "many", jobs=jobs)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_steps_together_stay_below_the_memory_bound(source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "MEMORY_BYTES", 2500)
    running, most = [0], [0]
    lock = threading.Lock()

    def hook() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.003)
        with lock:
            running[0] -= 1

    plan = make_plan(source, hook=hook, memory_bytes=1000)
    carried = [dataclasses.replace(s.steps[0], memory_bytes=0) for s in plan.shards]
    shards = tuple(Shard(s.name, (c, *s.steps[1:])) for s, c in zip(plan.shards, carried, strict=True))
    go(dataclasses.replace(plan, shards=shards), tmp_path / "out", jobs=6)
    assert most[0] == 2
    most[0] = 0
    go(
        make_plan(source, hook=hook, memory_bytes=10**12), tmp_path / "alone", jobs=6
    )  # more than the bound: one at a time
    assert most[0] == 1


def test_a_source_in_one_file_has_no_index(tmp_path):
    folder = tmp_path / "single"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", {"a": torch.arange(NUM_VALUES, dtype=torch.int32)})
    where = ByteRange(
        folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 4 * NUM_VALUES, 4 * NUM_VALUES
    )
    plan = Plan(folder, (Shard("model.safetensors", (Negate("a", where),)),), {}, {"config.json": b"{}"}, {})
    go(plan, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    with CheckpointReader(tmp_path / "out") as reader:
        assert reader.names == ("a.copy", "a.negated")


def test_progress_ends_at_everything(source, tmp_path):
    seen: list[tuple[int, int]] = []
    go(make_plan(source), tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    total = NUM_SHARDS * NUM_TENSORS * NUM_VALUES * 4
    assert seen[-1] == (total, total) and sorted(seen) == seen and len(seen) == NUM_SHARDS * NUM_TENSORS


def test_progress_line(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    line = ProgressLine("convert")
    for clock[0], done in ((0.0, 0), (5.0, 10**9), (10.0, 2 * 10**9), (20.0, 4 * 10**9)):
        line(done, 400 * 10**9)
    line.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "convert: 2.00 of 400.00 GB (0 %), 0.20 GB/s, 0:33:10 left",
        "convert: 4.00 of 400.00 GB (1 %), 0.20 GB/s, 0:33:00 left",
    ]


# stopped and taken up again

_OPERATIONS = ("pwrite", "fsync", "replace", "posix_fallocate", "ftruncate", "unlink")


def killed_at(point: int, action: Callable[[], object]) -> int:
    """Run an action in a forked process that kills itself with SIGKILL before its `point`-th write to the disk.

    Returns:
        How many writes it counted if it lived to its end, else -1.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        count = [0]
        lock = threading.Lock()

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                with lock:
                    count[0] += 1
                    if count[0] == point:
                        os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **named)

            return call

        for name in _OPERATIONS:
            setattr(os, name, counted(getattr(os, name)))
        status = 1
        try:
            action()
            os.write(write_end, str(count[0]).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return -1
    assert os.WEXITSTATUS(status) == 0
    return int(said)


@pytest.mark.parametrize("jobs", [1, 3])
def test_killed_at_any_moment_it_is_finished_by_the_same_command(source, tmp_path, seed, jobs):
    go(make_plan(source), tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    total = killed_at(0, lambda: go(make_plan(source), tmp_path / "counted", jobs=jobs))
    assert contents(tmp_path / "counted") == expected and total > 60
    every = list(range(1, total + 1))
    points = every[seed % 3 :: 3] if jobs == 1 else sorted(random.Random(seed).sample(every, 12))
    kept = set()
    for point in points:
        out = tmp_path / f"killed-{point}"
        assert killed_at(point, lambda out=out: go(make_plan(source), out, jobs=jobs)) == -1
        if (out / "config.json").exists():  # the last file: everything else is there
            assert contents(out) == expected and point > total - 2
        kept.add(go(make_plan(source), out, jobs=jobs).shards_kept)
        assert contents(out) == expected, point
    assert kept >= {0, 1, 3} or jobs > 1


def test_killed_again_and_again(source, tmp_path, seed):
    go(make_plan(source), tmp_path / "whole")
    out, order = tmp_path / "out", random.Random(seed)
    for _ in range(12):
        killed_at(order.randrange(2, 30), lambda: go(make_plan(source), out))
    go(make_plan(source), out)
    assert contents(out) == contents(tmp_path / "whole")
    assert go(make_plan(source), out).shards_kept == NUM_SHARDS  # finished: nothing is done again
    assert contents(out) == contents(tmp_path / "whole")


def test_a_torn_manifest_line_is_dropped(source, tmp_path):
    go(make_plan(source), tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    lines = expected[MANIFEST_NAME].splitlines(keepends=True)
    for torn in (b'{"shard": "model-0', b'\x00\x00\x00\n{"shard"', b"[]\n"):
        out = tmp_path / "out"
        out.mkdir()
        (out / MANIFEST_NAME).write_bytes(b"".join(lines[:2]) + torn)
        first = json.loads(lines[1])["shard"]
        (out / first).write_bytes(expected[first])
        assert go(make_plan(source), out).shards_kept == 1
        assert contents(out) == expected
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        out.rmdir()


def test_what_is_recorded_after_a_torn_line_counts(source, tmp_path):
    go(make_plan(source), tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    lines = expected[MANIFEST_NAME].splitlines(keepends=True)
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST_NAME).write_bytes(lines[0] + b'{"shard": "model-0')
    total = killed_at(0, lambda: go(make_plan(source), tmp_path / "counted"))
    assert killed_at(total - 15, lambda: go(make_plan(source), out)) == -1  # all files written, nothing finished
    assert go(make_plan(source), out).shards_kept == NUM_SHARDS
    assert contents(out) == expected


@pytest.mark.parametrize("damage", ["gone", "cut", "other header"])
def test_a_finished_file_that_was_damaged_is_made_again(source, tmp_path, damage):
    out = tmp_path / "out"
    go(make_plan(source), out)
    expected = contents(out)
    shard = sorted(out.glob("*.safetensors"))[1]
    if damage == "gone":
        shard.unlink()
    else:
        data = bytearray(shard.read_bytes())
        data[20] ^= 1
        shard.write_bytes(data[:-5] if damage == "cut" else data)
    assert go(make_plan(source), out).shards_kept == NUM_SHARDS - 1
    assert contents(out) == expected


def test_interrupted_by_the_user(source, tmp_path):
    calls = [0]

    def hook() -> None:
        calls[0] += 1
        if calls[0] == 5:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            go(make_plan(source, hook=hook), tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls[0] < 9
    assert_nothing_half_written(tmp_path / "out")
    go(make_plan(source), tmp_path / "out")
    go(make_plan(source), tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# refusals


def test_other_options_and_another_plan_are_refused(source, tmp_path):
    out = tmp_path / "out"
    killed_at(25, lambda: go(make_plan(source), out))
    assert "how was 'negate' and is 'other'" in refusal(make_plan(source, options={"how": "other"}), out)
    other = dataclasses.replace(make_plan(source), files={"config.json": b"{}"})
    assert "another version of megamoe" in refusal(other, out)
    go(make_plan(source), out)


def test_a_source_that_changed_between_runs_is_refused(source, tmp_path):
    out = tmp_path / "out"
    killed_at(25, lambda: go(make_plan(source), out))
    shard = sorted(source.glob("*.safetensors"))[2]
    state = shard.stat()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert f"{shard.name} differs in mtime_ns" in refusal(make_plan(source), out)
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns))
    (source / "extra.json").write_text("{}")
    assert "extra.json has appeared" in refusal(make_plan(source), out)
    (source / "extra.json").unlink()
    (source / "config.json").write_text("{ }")
    assert "config.json differs in size, mtime_ns, sha256" in refusal(make_plan(source), out)


def test_a_source_that_changes_during_the_run_is_refused(source, tmp_path):
    shard = sorted(source.glob("*.safetensors"))[0]
    plan = make_plan(source, hook=lambda: os.utime(shard, (1, 1)))
    assert f"{shard.name} was written to" in refusal(plan, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_taken_destination_is_refused(source, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious.txt").write_text("mine")
    assert "exists, is not empty" in refusal(make_plan(source), taken)
    assert contents(taken) == {"precious.txt": b"mine"}
    assert "is not a folder" in refusal(make_plan(source), taken / "precious.txt")
    for inside in (source, source / "out", source / "nested" / ".." / "out"):
        assert "lies in the source" in refusal(make_plan(source), inside)
    (tmp_path / "empty").mkdir()
    go(make_plan(source), tmp_path / "empty")


def test_two_processes_cannot_write_one_destination(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with open(out / MANIFEST_NAME, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is writing" in refusal(make_plan(source), out)
    go(make_plan(source), out)


def test_an_unreadable_or_shortened_source_is_named(source, tmp_path, monkeypatch):
    plan = make_plan(source)
    shard = sorted(source.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    real = os.preadv

    def broken(descriptor: int, buffers: Any, offset: int, *more: Any) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(shard) and offset > len(whole) // 2:
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers, offset, *more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        text = refusal(plan, tmp_path / "out")
    assert f"{shard} cannot be read at byte" in text and "Input/output error. Check the disk" in text
    assert_nothing_half_written(tmp_path / "out")
    go(plan, tmp_path / "out")

    shard.write_bytes(whole[: len(whole) // 2])
    text = refusal(plan, tmp_path / "second")
    assert f"{shard} ends at byte {len(whole) // 2}" in text
    shard.unlink()
    assert f"{shard} cannot be read: No such file" in refusal(plan, tmp_path / "third")


def test_a_file_size_limit_is_a_full_disk(source, tmp_path):
    """RLIMIT_FSIZE stands for a disk that fills up in the middle of a file."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        text = refusal(make_plan(source), tmp_path / "out")
        assert "cannot write" in text and "finished files are kept" in text, text

    killed_at(0, limited)
    assert_nothing_half_written(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    go(make_plan(source), tmp_path / "out")


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, kilobytes: int) -> Iterator[None]:
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a tmpfs takes root; a full disk is also tested by a limit on file size")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(source, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    size = make_plan(source).num_bytes // 1024
    with small_disk(disk, size // 2):
        text = refusal(make_plan(source), disk / "out")
        wanted = make_plan(source).num_bytes + make_plan(source).file_bytes
        assert f"needs {wanted:,} more bytes" in text and "free" in text
        # Another program takes the space after that check: two files fit, the third does not.
        monkeypatch.setattr(convert._ShardWriter, "_refuse_full_disk", lambda *_: None)
        text = refusal(make_plan(source), disk / "out")
        assert "No space left on device" in text and "source bytes to go" in text
        assert_nothing_half_written(disk / "out")
        assert 0 < len(list((disk / "out").glob("*.safetensors"))) < NUM_SHARDS
        subprocess.run(["mount", "-o", f"remount,size={2 * size}k", str(disk)], check=True)
        assert go(make_plan(source), disk / "out").shards_kept > 0
        go(make_plan(source), tmp_path / "whole")
        assert contents(disk / "out") == contents(tmp_path / "whole")


def test_a_step_that_breaks_its_word_is_an_error(source, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Liar(Negate):
        def run(self, target: Target) -> list[dict[str, Any]]:
            target.write(f"{self.name}.negated", torch.zeros(3, dtype=torch.int32))
            return []

    plan = make_plan(source)
    first = plan.shards[0]
    liar = Liar(first.steps[1].name, first.steps[1].source)
    shards = (Shard(first.name, (first.steps[0], liar, *first.steps[2:])), *plan.shards[1:])
    with pytest.raises(ValueError, match=r"made torch.int32 \[3\], planned"):
        go(dataclasses.replace(plan, shards=shards), tmp_path / "out")
    assert_nothing_half_written(tmp_path / "out")
