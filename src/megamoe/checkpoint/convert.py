# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint that is made from another one, of any size, so that it can be stopped at any moment.

What is written is known before the first byte: a `Plan` lists the files, the tensors in each and the steps that make
them. Every tensor has its place in its file from the start, so steps run in any order on any number of threads and the
result is the same bytes.

    begin     the folder is made, or an unfinished conversion with the same manifest is taken up
    a shard   space for the whole file is reserved under a temporary name, steps write into it, it is flushed to the
              disk, renamed, and recorded in the manifest
    end       index, side files, reports; config.json is the last: a folder without it is no checkpoint yet

Memory     bytes go through small buffers (byte_range.py). Steps say what they need at most; together they stay below
           MEMORY_BYTES, unless one alone needs more.
Manifest   what is finished, and what it was made from, is in manifest.py.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from megamoe.checkpoint.byte_range import (
    CHUNK_BYTES,
    ByteRange,
    as_tensor,
    disk_errors,
    opened,
    read_into,
    read_range,
    write_from,
)
from megamoe.checkpoint.hashing import hash_file
from megamoe.checkpoint.headers import INDEX_NAME
from megamoe.checkpoint.manifest import Manifest, Record, fingerprint, refuse_changed
from megamoe.checkpoint.problem import CheckpointError
from megamoe.checkpoint.reader import DTYPES
from megamoe.checkpoint.stopped import MANIFEST_NAME
from megamoe.checkpoint.writer import encode_header, encode_json, flush_folder, write_bytes

MEMORY_BYTES = 2 << 30


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


_of_thread = threading.local()


def _buffers() -> tuple[bytearray, bytearray]:
    """Return two buffers that belong to this thread: fresh ones would be paged in again for every tensor."""
    if not hasattr(_of_thread, "buffers"):
        _of_thread.buffers = bytearray(CHUNK_BYTES), bytearray(CHUNK_BYTES)
    first, second = _of_thread.buffers
    return first, second


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
        write_from(self._descriptor, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, offset)

    def copy(self, name: str, source: ByteRange) -> None:
        """Write the bytes of a source file as a tensor."""
        self._copy(name, source, check=False)

    def copy_checked(self, name: str, source: ByteRange) -> bool:
        """Write the bytes of a source file as a tensor, read them back and say whether they are the same."""
        return self._copy(name, source, check=True)

    def _copy(self, name: str, source: ByteRange, *, check: bool) -> bool:
        offset, output = self._places[name]
        if source.num_bytes != output.num_bytes:
            raise ValueError(f"{name}: {source.num_bytes} source bytes, planned {output.num_bytes}. This is a bug.")
        theirs, ours = _buffers()
        same = True
        with opened(source.path) as descriptor:
            for start in range(0, source.num_bytes, CHUNK_BYTES):
                size = min(CHUNK_BYTES, source.num_bytes - start)
                part = memoryview(theirs)[:size]
                read_into(descriptor, source.path, part, source.offset + start)
                write_from(self._descriptor, part, offset + start)
                if check:
                    read_into(self._descriptor, self.path, memoryview(ours)[:size], offset + start)
                    # Comparing bytearrays is memcmp; memoryviews would be compared element by element.
                    equal = ours == theirs if size == CHUNK_BYTES else ours[:size] == theirs[:size]
                    same = same and equal
        return same

    def read(self, name: str) -> torch.Tensor:
        """Read back a tensor that has been written."""
        offset, output = self._places[name]
        buffer = bytearray(output.num_bytes)
        read_into(self._descriptor, self.path, memoryview(buffer), offset)
        dtype = DTYPES[output.dtype]
        return as_tensor(buffer, dtype, output.shape)


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

    @property
    def file_bytes(self) -> int:
        """Bytes of all other files."""
        contents = self.files.values()
        return sum(len(one) if isinstance(one, bytes) else one.stat().st_size for one in contents)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a conversion did.

    Attributes:
        records: what steps reported, in the order of the plan.
        source_bytes: tensor bytes read in this run.
        shards_kept: files that an earlier run had finished; they were not read.
        records_kept: records of weights in them.
        seconds: time of this run.
    """

    records: tuple[Record, ...]
    source_bytes: int
    shards_kept: int
    records_kept: int
    seconds: float


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
    with Manifest(destination, job) as manifest:
        writer = _ShardWriter(plan, destination, manifest, sources, progress)
        writer.run(jobs)
        records = tuple(record for shard in plan.shards for record in manifest.records[shard.name])
        refuse_changed(plan.source, sources)
        index = {
            "metadata": {"total_size": plan.num_bytes},
            "weight_map": {
                name: shard.name for shard in plan.shards for name in sorted(one.name for one in shard.outputs)
            },
        }
        with disk_errors(destination, 0):
            has_index = [shard.name for shard in plan.shards] != ["model.safetensors"]
            made: dict[str, bytes] = {INDEX_NAME: encode_json(index)} if has_index else {}
            for name, encoded in made.items():
                write_bytes(destination / name, [encoded])
            finished = finish(records)
            for name, content in {**plan.files, **finished}.items():
                if name != "config.json":
                    _write_file(destination / name, content)
            manifest.close_job({**plan.files, **made, **finished})
            _write_file(destination / "config.json", plan.files["config.json"])
    return Result(records, writer.source_bytes, writer.num_kept, writer.num_records_kept, time.monotonic() - started)


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
            write_from(self.descriptor, memoryview(self.header), 0)
        except OSError:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Close and remove the unfinished file."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        self.temporary.unlink(missing_ok=True)

    def publish(self) -> str:
        """Flush the file to the disk and give it its name; return the SHA-256 of its bytes."""
        with concurrent.futures.ThreadPoolExecutor(1, "flush") as pool:
            flushed = pool.submit(os.fsync, self.descriptor)  # the disk is busy meanwhile, the processor is not
            sha256 = hash_file(self.temporary)
            flushed.result()
        os.close(self.descriptor)
        self.descriptor = -1
        os.replace(self.temporary, self.path)
        flush_folder(self.path.parent)
        return sha256

    @property
    def header_sha256(self) -> str:
        """Hash of what stands before the data."""
        return hashlib.sha256(self.header).hexdigest()


class _Queue:
    """Steps to do. A thread stays with its file: file systems let only one thread at a time write to one."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._untouched = list(reversed(shards))
        self._begun: dict[str, tuple[Shard, Iterator[int]]] = {}

    def take(self, last: Shard | None) -> tuple[Shard, int] | None:
        """Return a step of the file a thread worked on, else of a new one, else of any; None when none is left."""
        own = [last.name] if last is not None else []
        if last is None or last.name not in self._begun:
            own = self._begin()
        for name in [*own, *self._begun]:
            if name in self._begun:
                shard, numbers = self._begun[name]
                number = next(numbers, None)
                if number is not None:
                    return shard, number
                del self._begun[name]
                return self.take(None)
        return None

    def _begin(self) -> list[str]:
        if not self._untouched:
            return []
        shard = self._untouched.pop()
        self._begun[shard.name] = shard, iter(range(len(shard.steps)))
        return [shard.name]


class _ShardWriter:
    """Runs the steps of all shards on some threads."""

    def __init__(
        self,
        plan: Plan,
        destination: pathlib.Path,
        manifest: Manifest,
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
        self.num_records_kept = 0
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
                self.num_records_kept += len(self.manifest.records[shard.name])
                self._kept_bytes += shard.source_bytes
            else:
                todo.append(shard)
        for ending in ("partial", "tmp"):  # what a killed run left; everything with a name of its own is not hidden
            for leftover in self.destination.rglob(f".*.{ending}"):
                leftover.unlink()
        self._refuse_full_disk(todo)
        queue = _Queue(todo)
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
        if known is None or "sha256" not in known or not path.is_file() or path.stat().st_size != known["size"]:
            return False
        with open(path, "rb") as file:
            start = file.read(8)
            header = start + file.read(min(int.from_bytes(start, "little"), known["size"]))
        return hashlib.sha256(header).hexdigest() == str(known["header_sha256"])

    def _refuse_full_disk(self, todo: Sequence[Shard]) -> None:
        """Refuse before the first byte when the files will not fit."""
        wanted = sum(output.num_bytes for shard in todo for output in shard.outputs) + self.plan.file_bytes
        state = os.statvfs(self.destination)
        free = state.f_bavail * state.f_frsize
        names = [*(shard.name for shard in todo), *self.plan.files]
        replaced = sum(path.stat().st_size for name in names if (path := self.destination / name).is_file())
        if wanted > free + replaced:
            raise CheckpointError(
                f"convert: {self.destination} needs {wanted:,} more bytes and its disk has {free:,} free. Free some "
                "space, or choose another disk; finished files are kept."
            )

    def _work(self, queue: _Queue) -> None:
        """Take steps until none is left, or another thread has failed."""
        shard: Shard | None = None
        while True:
            with self._ready:
                taken = None if self._stopped else queue.take(shard)
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
                with disk_errors(self.destination, self._total - self._kept_bytes - self.source_bytes):
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
            refuse_changed(self.plan.source, self.sources)
            sha256 = file.publish()
            records = [one for part in file.records for one in part or []]
            self.manifest.add(shard.name, file.size, file.header_sha256, sha256, records)
            with self._ready:
                del self._open[shard.name]
