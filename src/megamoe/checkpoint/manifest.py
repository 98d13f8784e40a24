# SPDX-License-Identifier: Apache-2.0
"""The journal of a conversion: what it is made from, with which options, and which files are finished.

`convert-manifest.jsonl` begins with a line for the job (options, and size, time of change and header hash of every
source file) and gets a line for every file that has its final name, with the SHA-256 of its bytes. A line that a crash
cut off is dropped. When all is done it is written anew: sorted, so that it does not depend on the order of events.
While it is open it is locked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

from megamoe.checkpoint.byte_range import CHUNK_BYTES, ByteRange, disk_errors, read_range, write_from
from megamoe.checkpoint.hashing import hash_file
from megamoe.checkpoint.problem import CheckpointError
from megamoe.checkpoint.stopped import MANIFEST_NAME, stopped_conversion
from megamoe.checkpoint.writer import flush_folder, write_bytes

Record = dict[str, Any]
"""What a report says about one weight; plain JSON."""


def source_files(directory: pathlib.Path) -> list[str]:
    """Return the names of all files of a checkpoint, also in its folders, without hidden ones and `other_weights`."""
    return [name for name in _visible_files(directory) if not _is_other_weights(name)]


def other_weights(directory: pathlib.Path) -> list[str]:
    """Return the files that hold weights in another format: they are no part of what is converted."""
    return [name for name in _visible_files(directory) if _is_other_weights(name)]


_OTHER_WEIGHTS = frozenset(
    ".bin .ckpt .ggml .gguf .h5 .llamafile .mlmodel .msgpack .npy .npz .onnx .onnx_data .ot .pt .pth .tflite".split()
)


def _is_other_weights(name: str) -> bool:
    return pathlib.PurePath(name).suffix.lower() in _OTHER_WEIGHTS


def _visible_files(directory: pathlib.Path) -> list[str]:
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


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two fingerprints."""
    lines = []
    for name in sorted(set(before) | set(now)):
        if name not in now or name not in before:
            lines.append(f"{name} has {'gone' if name not in now else 'appeared'}")
        elif before[name] != now[name]:
            what = [key for key in ("size", "mtime_ns", "sha256") if before[name].get(key) != now[name].get(key)]
            lines.append(f"{name} differs in {', '.join(what)}")
    return lines


def refuse_changed(source: pathlib.Path, before: Mapping[str, Any]) -> None:
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


def _size_and_hash(content: bytes | pathlib.Path) -> Record:
    if isinstance(content, bytes):
        return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {"size": content.stat().st_size, "sha256": hash_file(content)}


@dataclasses.dataclass(frozen=True)
class Verified:
    """What was found when a finished conversion was read again.

    Attributes:
        num_files: files read.
        num_bytes: their bytes.
        problems: files that are not as they were written, one line each.
    """

    num_files: int
    num_bytes: int
    problems: tuple[str, ...]


def verify_written(destination: pathlib.Path, progress: Callable[[int, int], None] | None = None) -> Verified:
    """Read every file of a finished conversion and compare it with the manifest.

    Args:
        destination: what `convert` wrote.
        progress: called with (bytes read, bytes in all).

    Raises:
        CheckpointError: the folder is no finished conversion of this version, or a file cannot be read.
    """
    path = destination / MANIFEST_NAME
    if not path.is_file() or stopped_conversion(destination) is not None:
        what = "no conversion" if not path.is_file() else "a conversion that was stopped"
        raise CheckpointError(
            f"convert --verify: {destination} is {what}; there is nothing to compare with. Convert first."
        )
    known = {}
    for raw in path.read_bytes().splitlines():
        line = json.loads(raw)
        if name := line.get("shard", line.get("file")):
            known[name] = line
    if without := [name for name, line in known.items() if "sha256" not in line]:
        raise CheckpointError(f"convert --verify: {MANIFEST_NAME} has no SHA-256 of {without[0]}. Convert again.")
    total, done = sum(line["size"] for line in known.values()), 0
    problems = []

    def show(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for name, line in sorted(known.items()):
        file = destination / name
        if not file.is_file():
            problems.append(f"{name}: missing.")
        elif file.stat().st_size != line["size"]:
            problems.append(f"{name}: {file.stat().st_size:,} bytes, {line['size']:,} were written.")
        elif hash_file(file, show) != line["sha256"]:
            problems.append(f"{name}: its bytes are not those that were written (SHA-256 differs).")
    return Verified(len(known), total, tuple(problems))


class Manifest:
    """The journal of a conversion; also keeps a second process out."""

    def __init__(self, destination: pathlib.Path, job: Record) -> None:
        self.destination = destination
        self.path = destination / MANIFEST_NAME
        self.job = job
        self.shards: dict[str, Record] = {}
        self.records: dict[str, list[Record]] = {}
        self._lock = threading.Lock()
        self._descriptor = -1

    def __enter__(self) -> Manifest:
        with disk_errors(self.destination, 0):
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
        if changed := changes(before.get("sources", {}), self.job["sources"]):
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
        with disk_errors(self.destination, 0):
            write_from(self._descriptor, memoryview(data), os.fstat(self._descriptor).st_size)
            os.fsync(self._descriptor)

    def add(self, shard: str, size: int, header_sha256: str, sha256: str, records: list[Record]) -> None:
        """Record a finished shard."""
        with self._lock:
            hashes = {"header_sha256": header_sha256, "sha256": sha256}
            line = {"shard": shard, "size": size, **hashes, "records": records}
            self._append(line)
            self.shards[shard] = line
            self.records[shard] = records  # plain JSON, so that a later run reads the same back

    def close_job(self, files: Mapping[str, bytes | pathlib.Path]) -> None:
        """Write the manifest's last form: sorted, with the records of the steps, which a repeated run reports again.

        Args:
            files: all other files, as their content or as a file that has it.
        """
        others = [{"file": name, **_size_and_hash(files[name])} for name in sorted(files)]
        lines = [self.job, *(self.shards[name] for name in sorted(self.shards)), *others, {"complete": True}]
        data = b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)
        write_bytes(self.path, [data])
