# SPDX-License-Identifier: Apache-2.0
"""Read a directory of safetensors files.

Opening a checkpoint reads only the headers and proves that files, headers and index agree: every byte of every data
section belongs to exactly one tensor, every tensor lies in exactly one file, and model.safetensors.index.json (when
there is one) says the same. Whatever disagrees is refused in one error that lists all of it. Tensor bytes are mapped,
so they are read when they are used.

A safetensors file is an 8-byte little-endian length, a JSON header of that length and the data section; the header
gives each tensor a dtype, a shape and a byte range of the data section.

The index's `metadata.total_size` is not checked: published checkpoints carry wrong values there.

Source     the safetensors format description (github.com/huggingface/safetensors)
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
MAX_LISTED = 20

# safetensors dtype -> dtype of the tensor handed out. F4 is two codes per byte and is handed out as bytes.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.uint8,
}

_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint or its config.json cannot be used; the message names every offender."""

    @classmethod
    def listing(cls, where: str, problems: Iterable[str]) -> CheckpointError:
        """Make one error of all problems.

        Args:
            where: what was being read.
            problems: one line each, at least one. The first 20 are printed, the others counted.
        """
        lines = list(problems)
        if len(lines) == 1:
            return cls(f"{where}: {lines[0]}")
        shown = [f"\n  {line}" for line in lines[:MAX_LISTED]]
        more = f"\n  and {len(lines) - MAX_LISTED} more." if len(lines) > MAX_LISTED else ""
        return cls(f"{where}: {len(lines)} problems:{''.join(shown)}{more}")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor.

    Attributes:
        name: name in the file.
        dtype: safetensors dtype, for example "BF16" or "F8_E4M3".
        shape: shape of the tensor that is handed out (for F4: bytes along the last dimension).
        shard: file name.
        begin: first byte in the shard's data section.
        end: one past the last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size of the stored bytes."""
        return self.end - self.begin

    def __str__(self) -> str:
        """Return dtype and shape, as used in messages."""
        return f"{self.dtype} {list(self.shape)}"


class CheckpointReader:
    """A checkpoint directory: one safetensors file, numbered shards, or shards with an index.

    Use it as a context manager. Tensors it hands out stay valid after it is closed.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Open the checkpoint and check everything that headers and index can show.

        Args:
            directory: folder with *.safetensors.

        Raises:
            CheckpointError: a file is missing, truncated or malformed, byte ranges overlap or leave holes, a tensor
                is stored twice, or index and files disagree.
        """
        self.directory = pathlib.Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"checkpoint: {self.directory} is not a directory. Pass a checkpoint's folder.")
        self._infos: dict[str, TensorInfo] = {}
        self._data_starts: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}
        problems: list[str] = []
        index = self._read_index(problems)
        if not problems:
            for shard in self._find_shards(index, problems):
                self._add_shard(shard, problems)
        if index is not None and not problems:
            problems += self._compare_index(index)
        if problems:
            raise CheckpointError.listing(f"checkpoint {self.directory}", problems)

    def __enter__(self) -> CheckpointReader:
        """Return the reader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the reader."""
        self.close()

    def close(self) -> None:
        """Let go of the mapped files; each is unmapped when the last tensor handed out from it is gone."""
        self._maps.clear()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._infos))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.num_bytes for info in self._infos.values())

    def __contains__(self, name: object) -> bool:
        """Say whether a tensor of this name is stored."""
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """Return what the header says about a tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._infos:
            raise CheckpointError(f"checkpoint {self.directory}: no tensor {name!r} among {len(self._infos)}.")
        return self._infos[name]

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor over the mapped file: bytes are read when used, and writing to it never reaches the file.

        Clone what is kept: a view lasts only as long as the file behind it is left alone.

        Raises:
            CheckpointError: there is no such tensor.
        """
        info = self.info(name)
        dtype = DTYPES[info.dtype]
        if info.num_bytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        if info.shard not in self._maps:
            with open(self.directory / info.shard, "rb") as file:
                self._maps[info.shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        offset = self._data_starts[info.shard] + info.begin
        raw = torch.frombuffer(self._maps[info.shard], dtype=torch.uint8, count=info.num_bytes, offset=offset)
        if offset % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(info.shape)

    def _read_index(self, problems: list[str]) -> dict[str, str] | None:
        """Return the index's tensor name -> file name, or None without an index."""
        path = self.directory / INDEX_NAME
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            problems.append(f"{INDEX_NAME} is not JSON ({error}). Download it again.")
            return None
        entries = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
            problems.append(f"{INDEX_NAME} has no weight_map of tensor names to file names. Download it again.")
            return None
        for shard in sorted(set(entries.values())):
            if pathlib.PurePath(shard).name != shard or not shard.endswith(".safetensors"):
                problems.append(
                    f"{INDEX_NAME} names {shard!r}; shards must be *.safetensors files in the checkpoint's own folder."
                )
        return dict(entries)

    def _find_shards(self, index: Mapping[str, str] | None, problems: list[str]) -> list[str]:
        """Return the files to read, having compared them with the index or with their own numbering."""
        present = sorted(path.name for path in self.directory.glob("*.safetensors") if path.is_file())
        if index is None:
            if not present:
                problems.append("no *.safetensors file. Convert the weights to safetensors or pass another folder.")
            problems += _check_numbering(present)
            return present
        wanted = sorted(set(index.values()))
        for shard in sorted(set(wanted) - set(present)):
            count = sum(1 for value in index.values() if value == shard)
            problems.append(f"missing shard {shard}: {INDEX_NAME} places {count} tensors in it. Download it.")
        for shard in sorted(set(present) - set(wanted)):
            problems.append(f"{shard} is not named by {INDEX_NAME}. Move it away or repair the index.")
        return [shard for shard in wanted if shard in present]

    def _add_shard(self, shard: str, problems: list[str]) -> None:
        """Read one file's header and take over its tensors."""
        start, infos, found = _read_header(self.directory / shard)
        problems += found
        self._data_starts[shard] = start
        for info in infos:
            other = self._infos.setdefault(info.name, info)
            if other is not info:
                problems.append(
                    f"{info.name}: stored twice, in {other.shard} and in {shard}. Remove one of the two files."
                )

    def _compare_index(self, index: Mapping[str, str]) -> list[str]:
        """Return every disagreement between the index and the headers."""
        problems = []
        for name in sorted(set(index) | set(self._infos)):
            stored = self._infos[name].shard if name in self._infos else None
            listed = index.get(name)
            if stored is None:
                problems.append(f"{name}: {INDEX_NAME} places it in {listed}, which does not hold it.")
            elif listed is None:
                problems.append(f"{name}: stored in {stored} but absent from {INDEX_NAME}.")
            elif stored != listed:
                problems.append(f"{name}: stored in {stored} but {INDEX_NAME} places it in {listed}.")
        return [f"{problem} Download or export the checkpoint again." for problem in problems]


def _check_numbering(files: list[str]) -> list[str]:
    """Return a problem for every gap in names like model-00002-of-00003.safetensors."""
    present: dict[tuple[str, int], set[int]] = {}
    for file in files:
        match = _SHARD_NAME.fullmatch(file)
        if match:
            present.setdefault((match["stem"], int(match["count"])), set()).add(int(match["number"]))
    return [
        f"missing shard {stem}-{number:05d}-of-{count:05d}.safetensors. Download it."
        for (stem, count), numbers in sorted(present.items())
        for number in range(1, count + 1)
        if number not in numbers
    ]


def _header_bytes(path: pathlib.Path) -> bytes | str:
    """Return the raw header of a safetensors file, or what is wrong with the file."""
    file_bytes = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if prefix == b"version ":
            return f"{path.name}: a Git LFS pointer instead of data. Run git lfs pull."
        if len(prefix) < 8:
            return f"{path.name}: truncated, {file_bytes} bytes are too few for a header. Download it again."
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > MAX_HEADER_BYTES or 8 + header_bytes > file_bytes:
            return (
                f"{path.name}: header of {header_bytes} bytes in a file of {file_bytes}, at most {MAX_HEADER_BYTES} "
                "allowed: truncated or not a safetensors file. Download it again."
            )
        return file.read(header_bytes)


def _read_header(path: pathlib.Path) -> tuple[int, list[TensorInfo], list[str]]:
    """Return (offset of the data section, tensors, problems) of one safetensors file."""
    shard = path.name
    raw = _header_bytes(path)
    if isinstance(raw, str):
        return 0, [], [raw]
    repeated: list[str] = []

    def keep_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        repeated.extend(sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else [])
        return dict(pairs)

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=keep_repeats)
    except (ValueError, RecursionError) as error:
        return 0, [], [f"{shard}: the header is not JSON ({error}). Download it again."]
    if not isinstance(header, dict):
        return 0, [], [f"{shard}: the header is not a JSON object. Download it again."]
    problems = [f"{name}: stored twice in {shard}. Export the checkpoint again." for name in repeated]
    header.pop("__metadata__", None)
    infos = []
    for name, entry in header.items():
        info = _parse_entry(name, entry, shard)
        if isinstance(info, TensorInfo):
            infos.append(info)
        else:
            problems.append(info)
    start = 8 + len(raw)
    if not problems:
        problems = _check_ranges(infos, shard, path.stat().st_size - start)
    return start, infos, problems


def _parse_entry(name: str, entry: Any, shard: str) -> TensorInfo | str:
    """Return one header entry, or what is wrong with it."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in DTYPES:
        return f"{name}: dtype {dtype!r} in {shard}; allowed are {', '.join(DTYPES)}. Export it in one of these."
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        return f"{name}: malformed entry in the header of {shard} (shape {shape!r}, data_offsets {offsets!r})."
    if dtype == "F4":
        if not shape or shape[-1] % 2:
            return f"{name}: F4 with shape {shape} in {shard}; the last dimension must be even."
        shape = [*shape[:-1], shape[-1] // 2]
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    begin, end = offsets
    if end - begin != num_bytes:
        return f"{name}: {end - begin} bytes in {shard}, but {dtype} {shape} takes {num_bytes}. Export it again."
    return TensorInfo(name, dtype, tuple(shape), shard, begin, end)


def _are_counts(values: Any) -> bool:
    """Say whether this is a list of integers that are not negative."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_ranges(infos: list[TensorInfo], shard: str, data_bytes: int) -> list[str]:
    """Return every overlap and hole of one data section, and one line for all tensors beyond its end."""
    problems = []
    if cut_off := [info for info in infos if info.end > data_bytes]:
        first = min(cut_off, key=lambda info: info.begin)
        problems.append(
            f"{shard}: truncated: {len(cut_off)} of {len(infos)} tensors end beyond its {data_bytes} bytes of data, "
            f"{first.name} (bytes {first.begin} to {first.end}) is the first. Download it again."
        )
    used, last = 0, "the header"
    for info in sorted(infos, key=lambda info: (info.begin, info.end)):
        if info.begin < used:
            problems.append(f"{info.name}: overlaps {last} in {shard} (bytes {info.begin} to {info.end}).")
        elif info.begin > used:
            problems.append(f"{info.name}: {info.begin - used} bytes between it and {last} in {shard} belong to none.")
        if info.end >= used:
            used, last = info.end, info.name
    if not problems and used < data_bytes:
        problems.append(f"{shard}: {data_bytes - used} bytes after the last tensor belong to none. Export it again.")
    return problems
