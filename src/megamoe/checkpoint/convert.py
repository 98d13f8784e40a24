# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint that is made from another one, of any size, so that it can be stopped at any moment.

What is written is known before the first byte: a `Plan` lists the files, the tensors in each and the steps that make
them. Every tensor has its place in its file from the start, so steps run in any order on any number of threads and the
result is the same bytes.

    begin     the folder is made, or an unfinished conversion with the same manifest is taken up
    a shard   space for the whole file is reserved under a temporary name, steps write into it, it is flushed to the disk,
              renamed, and recorded in the manifest
    end       index, side files, reports; config.json is the last: a folder without it is no checkpoint yet

Memory     bytes are read and written through small buffers, never through maps of whole files: a map counts as memory
           of the process, and an unreadable or shrinking file behind it kills the process instead of raising an error.
           Steps say what they need at most; together they stay below MEMORY_BYTES.
Manifest   `convert-manifest.jsonl`: a line for the job (options, and size, time and header hash of every source file),
           a line for every finished shard, written when the shard has its final name. A line cut off by a crash is
           dropped. When all is done it is written anew: sorted, without what depends on the order of events.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import mmap
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from megamoe.checkpoint.reader import DTYPES, INDEX_NAME, CheckpointError, CheckpointReader
from megamoe.checkpoint.writer import encode_header, encode_json, flush_folder, write_bytes

MANIFEST_NAME = "convert-manifest.jsonl"
MEMORY_BYTES = 2 << 30
CHUNK_BYTES = 1 << 20  # read, written and read back while it is in the processor's cache
MAPPED_BYTES = 1 << 30  # larger tensors are mapped; only tensors that hold all experts of a layer are

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ByteRange:
    """Bytes of a file.

    Attributes:
        path: file.
        offset: first byte.
        num_bytes: how many.
    """

    path: pathlib.Path
    offset: int
    num_bytes: int


class SourceReader(CheckpointReader):
    """A checkpoint whose tensors are read into memory, or mapped on their own when they are larger than 1 GiB."""

    def byte_range(self, name: str) -> ByteRange:
        """Return where a tensor's bytes are.

        Raises:
            CheckpointError: there is no such tensor.
        """
        info = self.info(name)
        return ByteRange(self.directory / info.shard, self._data_starts[info.shard] + info.begin, info.num_bytes)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor that holds its bytes itself, or maps them alone.

        Raises:
            CheckpointError: there is no such tensor, or its bytes cannot be read.
        """
        where, info = self.byte_range(name), self.info(name)
        dtype = DTYPES[info.dtype]
        if where.num_bytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        if where.num_bytes <= MAPPED_BYTES:
            raw = torch.frombuffer(read_range(where), dtype=torch.uint8)
        else:
            start = where.offset % mmap.ALLOCATIONGRANULARITY
            with open(where.path, "rb") as file:
                mapped = mmap.mmap(
                    file.fileno(), start + where.num_bytes, access=mmap.ACCESS_COPY, offset=where.offset - start
                )
            raw = torch.frombuffer(mapped, dtype=torch.uint8, count=where.num_bytes, offset=start)
            if raw.data_ptr() % dtype.itemsize:
                raw = raw.clone()
        return raw.view(dtype).view(info.shape)


def read_range(where: ByteRange) -> bytearray:
    """Return bytes of a file.

    Raises:
        CheckpointError: they cannot be read.
    """
    buffer = bytearray(where.num_bytes)
    with _opened(where.path) as descriptor:
        _read_into(descriptor, where.path, memoryview(buffer), where.offset)
    return buffer


@dataclasses.dataclass(frozen=True)
class Output:
    """A tensor to write.

    Attributes:
        name: name in the file.
        dtype: safetensors dtype.
        shape: shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size."""
        count = DTYPES[self.dtype].itemsize
        for size in self.shape:
            count *= size
        return count


class Target:
    """Where a step writes: its own tensors in a file that is being made."""

    def __init__(self, path: pathlib.Path, descriptor: int, places: Mapping[str, tuple[int, Output]]) -> None:
        """Take an open file and the place of each tensor in it.

        Args:
            path: shown in messages.
            descriptor: open for reading and writing.
            places: tensor name -> offset in the file and what it is.
        """
        self.path = path
        self._descriptor = descriptor
        self._places = places

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor.

        Raises:
            ValueError: its dtype or shape is not what was planned.
        """
        offset, output = self._places[name]
        if tensor.dtype != DTYPES[output.dtype] or tuple(tensor.shape) != output.shape:
            raise ValueError(f"{name}: made {tensor.dtype} {list(tensor.shape)}, planned {output}. This is a bug.")
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        _write_from(self._descriptor, memoryview(data), offset)

    def copy(self, name: str, source: ByteRange) -> None:
        """Write the bytes of a source file as a tensor."""
        offset, output = self._places[name]
        if source.num_bytes != output.num_bytes:
            raise ValueError(f"{name}: {source.num_bytes} source bytes, planned {output.num_bytes}. This is a bug.")
        buffer = memoryview(bytearray(min(CHUNK_BYTES, source.num_bytes)))
        with _opened(source.path) as descriptor:
            for start in range(0, source.num_bytes, CHUNK_BYTES):
                part = buffer[: min(CHUNK_BYTES, source.num_bytes - start)]
                _read_into(descriptor, source.path, part, source.offset + start)
                _write_from(self._descriptor, part, offset + start)

    def copy_checked(self, name: str, source: ByteRange) -> bool:
        """Write the bytes of a source file as a tensor, read them back and say whether they are the same."""
        offset, _ = self._places[name]
        self.copy(name, source)
        ours, theirs = bytearray(min(CHUNK_BYTES, source.num_bytes)), bytearray(min(CHUNK_BYTES, source.num_bytes))
        with _opened(source.path) as descriptor:
            for start in range(0, source.num_bytes, CHUNK_BYTES):
                size = min(CHUNK_BYTES, source.num_bytes - start)
                if size < len(ours):
                    del ours[size:], theirs[size:]
                _read_into(descriptor, source.path, memoryview(theirs), source.offset + start)
                _read_into(self._descriptor, self.path, memoryview(ours), offset + start)
                if ours != theirs:  # bytearrays, because comparing them is memcmp
                    return False
        return True

    def read(self, name: str) -> torch.Tensor:
        """Read back a tensor that has been written."""
        offset, output = self._places[name]
        buffer = bytearray(output.num_bytes)
        _read_into(self._descriptor, self.path, memoryview(buffer), offset)
        dtype = DTYPES[output.dtype]
        raw = torch.frombuffer(buffer, dtype=torch.uint8) if buffer else torch.empty(0, dtype=torch.uint8)
        return raw.view(dtype).view(output.shape)


class Step(Protocol):
    """One piece of work: makes some tensors of one file."""

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Tensors it makes."""

    @property
    def source_bytes(self) -> int:
        """Bytes it reads."""

    @property
    def memory_bytes(self) -> int:
        """Most memory it needs."""

    def run(self, target: Target) -> list[Record]:
        """Make the tensors; return what the report says about them. Must depend on the source alone."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file to write.

    Attributes:
        name: file name.
        steps: what makes its tensors.
    """

    name: str
    steps: tuple[Step, ...]

    @property
    def outputs(self) -> tuple[Output, ...]:
        """All tensors."""
        return tuple(output for step in self.steps for output in step.outputs)

    @property
    def source_bytes(self) -> int:
        """Bytes its steps read."""
        return sum(step.source_bytes for step in self.steps)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checkpoint to write.

    Attributes:
        source: folder the checkpoint is made from.
        shards: tensor files.
        metadata: strings of every shard's header.
        files: other files, as their content or as the file to copy; config.json among them.
        options: what the user chose, for the manifest.
    """

    source: pathlib.Path
    shards: tuple[Shard, ...]
    metadata: Mapping[str, str]
    files: Mapping[str, bytes | pathlib.Path]
    options: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors to write."""
        return sum(output.num_bytes for shard in self.shards for output in shard.outputs)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a conversion did.

    Attributes:
        records: what steps reported, in the order of the plan.
        source_bytes: tensor bytes read in this run.
        shards_kept: files that an earlier run had finished.
        seconds: time of this run.
    """

    records: tuple[Record, ...]
    source_bytes: int
    shards_kept: int
    seconds: float


# The sources


def source_files(directory: pathlib.Path) -> list[str]:
    """Return the names of all files of a checkpoint, also in its folders, without hidden ones."""
    names = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
    return sorted(str(name) for name in names if not any(part.startswith(".") for part in name.parts))


def fingerprint(directory: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Return size, time of change and header hash of every file of a checkpoint (other files: hash of the content).

    Raises:
        CheckpointError: a file cannot be read.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in source_files(directory):
        path = directory / name
        state = path.stat()
        end = state.st_size
        if path.suffix == ".safetensors":
            end = min(end, 8 + int.from_bytes(read_range(ByteRange(path, 0, min(8, end))), "little"))
        digest = hashlib.sha256()
        for start in range(0, end, CHUNK_BYTES):
            digest.update(read_range(ByteRange(path, start, min(CHUNK_BYTES, end - start))))
        found[name] = {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": digest.hexdigest()}
    return found


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two fingerprints."""
    lines = []
    for name in sorted(set(before) | set(now)):
        if name not in now or name not in before:
            lines.append(f"{name} has {'gone' if name not in now else 'appeared'}")
        elif before[name] != now[name]:
            what = [key for key in ("size", "mtime_ns", "sha256") if before[name].get(key) != now[name].get(key)]
            lines.append(f"{name} differs in {', '.join(what)}")
    return lines


# The run


def run(
    plan: Plan,
    destination: pathlib.Path,
    *,
    finish: Callable[[tuple[Record, ...]], Mapping[str, bytes]],
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Write a checkpoint, or finish one that an earlier run began.

    Args:
        plan: what to write.
        destination: folder; new, empty, or one where the same conversion was stopped.
        finish: makes the reports (file name -> content) from all records.
        jobs: threads; changes no byte of the result.
        progress: called with (source bytes done, source bytes in all) now and then, from any thread.

    Raises:
        CheckpointError: the folder is taken, was begun with other options or from other sources, is in use, the disk
            is full, or a source cannot be read or has changed.
    """
    started = time.monotonic()
    _check_place(plan.source, destination)
    sources = fingerprint(plan.source)
    job = {
        "tool": "megamoe convert",
        "options": dict(plan.options),
        "plan": _plan_hash(plan),
        "sources": sources,
    }
    with _Manifest(destination, job) as manifest:
        writer = _ShardWriter(plan, destination, manifest, sources, progress)
        writer.run(jobs)
        records = tuple(record for shard in plan.shards for record in manifest.records[shard.name])
        _refuse_changed(plan.source, sources)
        index = {
            "metadata": {"total_size": plan.num_bytes},
            "weight_map": {
                name: shard.name for shard in plan.shards for name in sorted(one.name for one in shard.outputs)
            },
        }
        with _disk_errors(destination, 0):
            if [shard.name for shard in plan.shards] != ["model.safetensors"]:
                write_bytes(destination / INDEX_NAME, [encode_json(index)])
            for name, content in {**plan.files, **finish(records)}.items():
                if name != "config.json":
                    _write_file(destination / name, content)
            manifest.close_job()
            _write_file(destination / "config.json", plan.files["config.json"])
    return Result(records, writer.source_bytes, writer.num_kept, time.monotonic() - started)


def _write_file(path: pathlib.Path, content: bytes | pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        write_bytes(path, [content])
        return
    size = content.stat().st_size
    parts = range(0, size, CHUNK_BYTES)
    write_bytes(path, (read_range(ByteRange(content, start, min(CHUNK_BYTES, size - start))) for start in parts))


def _check_place(source: pathlib.Path, destination: pathlib.Path) -> None:
    """Refuse a destination that would be lost or read from."""
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"convert: {destination} exists and is not a folder. Choose another destination.")
    inside = destination.resolve()
    if inside == source.resolve() or source.resolve() in inside.parents:
        raise CheckpointError(f"convert: {destination} lies in the source {source}. Choose a folder outside it.")
    if destination.is_dir() and any(destination.iterdir()) and not (destination / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"convert: {destination} exists, is not empty, and is not a conversion that was stopped (it has no "
            f"{MANIFEST_NAME}). Choose another destination, or remove it."
        )


def _plan_hash(plan: Plan) -> str:
    """Return a hash of every file name, tensor name, dtype and shape, and of the files that are made."""
    digest = hashlib.sha256()
    for shard in plan.shards:
        outputs = [[output.name, output.dtype, list(output.shape)] for output in shard.outputs]
        digest.update(json.dumps([shard.name, outputs]).encode())
    for name, content in sorted(plan.files.items()):
        digest.update(name.encode() + (content if isinstance(content, bytes) else b""))
    return digest.hexdigest()


def _refuse_changed(source: pathlib.Path, before: Mapping[str, Any]) -> None:
    """Refuse sources whose size or time of change is no longer what it was when the run began."""
    problems = []
    for name, known in before.items():
        path = source / name
        state = path.stat() if path.is_file() else None
        if state is None or (state.st_size, state.st_mtime_ns) != (known["size"], known["mtime_ns"]):
            problems.append(f"{name} {'has gone' if state is None else 'was written to'}")
    if problems:
        raise CheckpointError.listing(
            f"convert: the source {source} changed during the conversion; remove the destination and begin again",
            problems,
        )


class _Manifest:
    """The journal of a conversion; also keeps a second process out."""

    def __init__(self, destination: pathlib.Path, job: Record) -> None:
        self.destination = destination
        self.path = destination / MANIFEST_NAME
        self.job = job
        self.shards: dict[str, Record] = {}
        self.records: dict[str, list[Record]] = {}
        self._lock = threading.Lock()
        self._descriptor = -1

    def __enter__(self) -> _Manifest:
        with _disk_errors(self.destination, 0):
            self.destination.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with contextlib.ExitStack() as on_error:
            on_error.callback(os.close, self._descriptor)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(
                    f"convert: another process is writing {self.destination}. Wait for it, or stop it."
                ) from error
            self._take_up()
            on_error.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def _take_up(self) -> None:
        """Read what an earlier run wrote, or begin."""
        lines = self._whole_lines()
        if not lines:
            os.ftruncate(self._descriptor, 0)
            self._append(self.job)
            flush_folder(self.destination)
            return
        before = lines[0]
        if changed := _changes(before.get("sources", {}), self.job["sources"]):
            raise CheckpointError.listing(
                f"convert: the source changed since {self.destination} was begun; remove the destination and begin "
                "again",
                changed,
            )
        options = {**before.get("options", {})}
        others = [
            f"{key} was {options.get(key)!r} and is {self.job['options'].get(key)!r}"
            for key in sorted({*options, *self.job["options"]})
            if options.get(key) != self.job["options"].get(key)
        ]
        if others or before != self.job:
            raise CheckpointError(
                f"convert: {self.destination} was begun with other options "
                f"({'; '.join(others) or 'another version of megamoe'}). Use those again, or another destination."
            )
        for line in lines[1:]:
            if "shard" in line:
                self.shards[line["shard"]] = line
                self.records[line["shard"]] = line.get("records", [])

    def _whole_lines(self) -> list[Record]:
        """Return the manifest's lines; the last one is dropped, also from the file, if it was cut off."""
        size = os.fstat(self._descriptor).st_size
        content = os.pread(self._descriptor, size, 0) if size else b""
        while len(content) < size:
            content += os.pread(self._descriptor, size - len(content), len(content))
        lines: list[Record] = []
        used = 0
        for raw in content.splitlines(keepends=True):
            if not raw.endswith(b"\n"):
                break
            try:
                line = json.loads(raw)
            except ValueError:
                break
            if not isinstance(line, dict):
                break
            lines.append(line)
            used += len(raw)
        if used < size:
            os.ftruncate(self._descriptor, used)
        return lines

    def _append(self, line: Record) -> None:
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        with _disk_errors(self.destination, 0):
            _write_from(self._descriptor, memoryview(data), os.fstat(self._descriptor).st_size)
            os.fsync(self._descriptor)

    def add(self, shard: str, size: int, header_sha256: str, records: list[Record]) -> None:
        """Record a finished shard."""
        with self._lock:
            line = {"shard": shard, "size": size, "header_sha256": header_sha256, "records": records}
            self._append(line)
            self.shards[shard] = line
            self.records[shard] = records  # plain JSON, so that a later run reads the same back

    def close_job(self) -> None:
        """Write the manifest's last form: sorted, with the records of the steps, which a repeated run reports again."""
        lines = [self.job, *(self.shards[name] for name in sorted(self.shards)), {"complete": True}]
        data = b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)
        write_bytes(self.path, [data])


class _OpenShard:
    """A file that is being written."""

    def __init__(self, shard: Shard, path: pathlib.Path, metadata: Mapping[str, str]) -> None:
        self.shard = shard
        self.path = path
        self.temporary = path.with_name(f".{path.name}.partial")
        entries = {output.name: output for output in shard.outputs}
        self.header, offsets = encode_header({n: (o.dtype, o.shape) for n, o in entries.items()}, metadata)
        self.size = len(self.header) + sum(output.num_bytes for output in entries.values())
        self.places = {name: (len(self.header) + offset, entries[name]) for name, offset in offsets.items()}
        self.records: list[list[Record] | None] = [None] * len(shard.steps)
        self.left = len(shard.steps)
        self.descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(self.descriptor, 0, self.size)  # a full disk shows here, not after an hour
            _write_from(self.descriptor, memoryview(self.header), 0)
        except OSError:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Close and remove the unfinished file."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        self.temporary.unlink(missing_ok=True)

    def publish(self) -> None:
        """Flush the file to the disk and give it its name."""
        os.fsync(self.descriptor)
        os.close(self.descriptor)
        self.descriptor = -1
        os.replace(self.temporary, self.path)
        flush_folder(self.path.parent)

    @property
    def header_sha256(self) -> str:
        """Hash of what stands before the data."""
        return hashlib.sha256(self.header).hexdigest()


class _ShardWriter:
    """Runs the steps of all shards on some threads."""

    def __init__(
        self,
        plan: Plan,
        destination: pathlib.Path,
        manifest: _Manifest,
        sources: Mapping[str, Any],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.plan = plan
        self.destination = destination
        self.manifest = manifest
        self.sources = sources
        self.progress = progress
        self.source_bytes = 0
        self.num_kept = 0
        self._ready = threading.Condition()
        self._memory = 0
        self._open: dict[str, _OpenShard] = {}
        self._stopped = False
        self._total = sum(shard.source_bytes for shard in plan.shards)
        self._kept_bytes = 0

    def run(self, jobs: int) -> None:
        """Write every shard that no earlier run has finished."""
        todo = []
        for shard in self.plan.shards:
            if self._is_finished(shard):
                self.num_kept += 1
                self._kept_bytes += shard.source_bytes
            else:
                todo.append(shard)
        for leftover in self.destination.glob(".*.partial"):
            leftover.unlink()
        self._refuse_full_disk(todo)
        queue = iter([(shard, number) for shard in todo for number in range(len(shard.steps))])
        try:
            with concurrent.futures.ThreadPoolExecutor(jobs, "convert") as pool:
                try:
                    threads = [pool.submit(self._work, queue) for _ in range(jobs)]
                    for thread in concurrent.futures.as_completed(threads):
                        thread.result()
                finally:  # after an error or an interrupt the other threads stop at their next step
                    self._stop()
        finally:
            for file in self._open.values():
                file.abandon()

    def _is_finished(self, shard: Shard) -> bool:
        """Say whether the manifest's entry of a shard and the file under its name agree."""
        known = self.manifest.shards.get(shard.name)
        path = self.destination / shard.name
        if known is None or not path.is_file() or path.stat().st_size != known["size"]:
            return False
        with open(path, "rb") as file:
            start = file.read(8)
            header = start + file.read(min(int.from_bytes(start, "little"), known["size"]))
        return hashlib.sha256(header).hexdigest() == known["header_sha256"]

    def _refuse_full_disk(self, todo: Sequence[Shard]) -> None:
        """Refuse before the first byte when the files will not fit."""
        wanted = sum(output.num_bytes for shard in todo for output in shard.outputs)
        state = os.statvfs(self.destination)
        free = state.f_bavail * state.f_frsize
        replaced = sum(path.stat().st_size for s in todo if (path := self.destination / s.name).is_file())
        if wanted > free + replaced:
            raise CheckpointError(
                f"convert: {self.destination} needs {wanted:,} more bytes and its disk has {free:,} free. Free some "
                "space, or choose another disk; finished files are kept."
            )

    def _work(self, queue: Iterator[tuple[Shard, int]]) -> None:
        """Take steps until none is left, or another thread has failed."""
        while True:
            with self._ready:
                taken = None if self._stopped else next(queue, None)
                if taken is None:
                    return
                shard, number = taken
                step = shard.steps[number]
                while self._memory and self._memory + step.memory_bytes > MEMORY_BYTES and not self._stopped:
                    self._ready.wait()
                if self._stopped:
                    return
                self._memory += step.memory_bytes
            done = False
            try:
                with _disk_errors(self.destination, self._total - self._kept_bytes - self.source_bytes):
                    self._run_step(shard, number, step)
                done = True
            finally:
                with self._ready:
                    self._memory -= step.memory_bytes
                    self._stopped = self._stopped or not done
                    self._ready.notify_all()

    def _stop(self) -> None:
        with self._ready:
            self._stopped = True
            self._ready.notify_all()

    def _run_step(self, shard: Shard, number: int, step: Step) -> None:
        with self._ready:
            if shard.name not in self._open:
                self._open[shard.name] = _OpenShard(shard, self.destination / shard.name, self.plan.metadata)
            file = self._open[shard.name]
        records = step.run(Target(self.destination / shard.name, file.descriptor, file.places))
        with self._ready:
            file.records[number] = records
            file.left -= 1
            is_last = file.left == 0
            self.source_bytes += step.source_bytes
            done = self._kept_bytes + self.source_bytes
        if self.progress is not None:
            self.progress(done, self._total)
        if is_last:
            _refuse_changed(self.plan.source, self.sources)
            file.publish()
            self.manifest.add(
                shard.name, file.size, file.header_sha256, [one for part in file.records for one in part or []]
            )
            with self._ready:
                del self._open[shard.name]


# Files


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(
            f"convert: {path} cannot be read: {error.strerror}. Check the file and its disk."
        ) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_into(descriptor: int, path: pathlib.Path, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(
                f"convert: {path} cannot be read at byte {offset + done}: {error.strerror}. Check the disk, or download "
                "the file again."
            ) from error
        if count == 0:
            raise CheckpointError(f"convert: {path} ends at byte {offset + done}; it was cut off while it was read.")
        done += count


def _write_from(descriptor: int, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):
        done += os.pwrite(descriptor, buffer[done:], offset + done)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def _disk_errors(destination: pathlib.Path, bytes_left: int) -> Iterator[None]:
    """Say what a failed write means and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        more = f" with about {bytes_left:,} source bytes to go" if bytes_left else ""
        raise CheckpointError(
            f"convert: cannot write to {destination}: {error.strerror}{more}. Make room and give the same command again: "
            "finished files are kept, and no file is half-written."
        ) from error


class ProgressLine:
    """Bytes, rate and time left on standard error: in place on a terminal, else a line every ten seconds."""

    def __init__(self, label: str) -> None:
        """Start the clock."""
        self.label = label
        self.is_terminal = sys.stderr.isatty()
        self.started = time.monotonic()
        self._first: int | None = None
        self._next = self.started + (0.0 if self.is_terminal else 10.0)
        self._lock = threading.Lock()
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """Show how far it is."""
        with self._lock:
            now = time.monotonic()
            self._first = done if self._first is None else self._first
            if now < self._next and done < total:
                return
            if done >= total and not (self.is_terminal or self._shown):
                return
            self._next = now + (0.2 if self.is_terminal else 10.0)
            rate = (done - self._first) / max(now - self.started, 1e-9)
            left = f"{_duration((total - done) / rate)} left" if rate > 0 else "time left unknown"
            text = (
                f"{self.label}: {done / 1e9:.2f} of {total / 1e9:.2f} GB ({100 * done / max(total, 1):.0f} %), "
                f"{rate / 1e9:.2f} GB/s, {left}"
            )
            self._shown = True
            print(
                f"\r\x1b[K{text}" if self.is_terminal else text, end="" if self.is_terminal else "\n", file=sys.stderr
            )
            sys.stderr.flush()

    def close(self) -> None:
        """End the line on a terminal."""
        if self.is_terminal and self._shown:
            print(file=sys.stderr)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
