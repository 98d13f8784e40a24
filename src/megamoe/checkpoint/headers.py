# SPDX-License-Identifier: Apache-2.0
"""Read what the headers of a directory of safetensors files say, without reading tensors and without torch.

A safetensors file is an 8-byte little-endian length, a JSON header of that length and the data section; the header
gives each tensor a dtype, a shape and a byte range of the data section. `read_headers` proves that files, headers and
index agree: every byte of every data section belongs to exactly one tensor, every tensor lies in exactly one file, and
model.safetensors.index.json (when there is one) says the same. Whatever disagrees becomes a `Problem`; nothing is
raised for it, so that everything wrong can be listed at once.

A header is not trusted: what it claims is compared with the size of the file before anything is allocated, numbers are
bounded before they are multiplied, and what it says is cut short where a message repeats it.

The index's `metadata.total_size` is kept and not checked: published checkpoints carry wrong values there.

Source     the safetensors format description (github.com/huggingface/safetensors)
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import pathlib
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from megamoe.checkpoint.problem import CheckpointError, Problem

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 16
MAX_COUNT = 2**63  # no dimension, offset or number of elements reaches it

# safetensors dtype -> bytes of an element. F4 is two codes per byte and is handed out as bytes.
ITEM_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "I16": 2,
    "U16": 2,
    "I32": 4,
    "U32": 4,
    "I64": 8,
    "U64": 8,
    "F16": 2,
    "BF16": 2,
    "F32": 4,
    "F64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F4": 1,
}

_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_AGAIN = "Download it again."


@dataclasses.dataclass(frozen=True, slots=True)
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


@dataclasses.dataclass(frozen=True)
class Headers:
    """Everything headers and index say.

    Attributes:
        directory: the checkpoint's folder.
        shards: names of the files that were read, sorted.
        infos: name -> tensor, in the order of files and headers. Of a tensor stored twice the first.
        data_starts: file name -> offset of its data section.
        metadata: file name -> its `__metadata__`, where there is one.
        total_size: what the index claims all tensors take, or None.
        unavailable: tensors that the index places in a file that is missing or whose header cannot be read.
        problems: everything that is wrong, in the order found.
    """

    directory: pathlib.Path
    shards: tuple[str, ...]
    infos: Mapping[str, TensorInfo]
    data_starts: Mapping[str, int]
    metadata: Mapping[str, Mapping[str, Any]]
    total_size: int | None
    unavailable: frozenset[str]
    problems: tuple[Problem, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.num_bytes for info in self.infos.values())


def read_headers(directory: str | os.PathLike[str]) -> Headers:
    """Read the headers of all *.safetensors files of a folder and compare them with its index.

    Args:
        directory: folder with *.safetensors and perhaps model.safetensors.index.json.

    Returns:
        What they say and every disagreement.

    Raises:
        CheckpointError: `directory` is not a directory.
        OSError: a file cannot be read.
    """
    folder = pathlib.Path(directory)
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint: {folder} is not a directory. Pass a checkpoint's folder.")
    return _HeaderReader(folder).read()


class _HeaderReader:
    """Collects tensors and problems of one folder."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.infos: dict[str, TensorInfo] = {}
        self.data_starts: dict[str, int] = {}
        self.metadata: dict[str, Mapping[str, Any]] = {}
        self.total_size: int | None = None
        self.problems: list[Problem] = []

    def read(self) -> Headers:
        index = self.read_index()
        index_is_usable = not self.problems
        shards = self.find_shards(index if index_is_usable else None)
        readable = {shard for shard in shards if self.add_shard(shard)}
        unavailable: set[str] = set()
        if index is not None and index_is_usable:
            unavailable = {name for name, shard in index.items() if shard not in readable and name not in self.infos}
            self.compare_index(index, unavailable)
        return Headers(
            directory=self.directory,
            shards=tuple(shards),
            infos=self.infos,
            data_starts=self.data_starts,
            metadata=self.metadata,
            total_size=self.total_size,
            unavailable=frozenset(unavailable),
            problems=tuple(self.problems),
        )

    def problem(self, rule: str, subject: str, text: str, remedy: str = "") -> None:
        self.problems.append(Problem(rule, subject, text, remedy))

    def read_index(self) -> dict[str, str] | None:
        """Return the index's tensor name -> file name, or None without a usable index."""
        path = self.directory / INDEX_NAME
        if not path.is_file():
            return None
        repeated: set[str] = set()
        try:
            content = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_object_noting(repeated))
        except (ValueError, RecursionError) as error:
            self.problem("index-unreadable", INDEX_NAME, f"{INDEX_NAME} is not JSON ({_brief(error)}).", _AGAIN)
            return None
        entries = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
            text = f"{INDEX_NAME} has no weight_map of tensor names to file names."
            self.problem("index-unreadable", INDEX_NAME, text, _AGAIN)
            return None
        for name in sorted(repeated & set(entries)):
            self.problem("index-disagrees", name, f"{name}: listed twice in {INDEX_NAME}.", _AGAIN)
        for shard in sorted(set(entries.values())):
            if pathlib.PurePath(shard).name != shard or not shard.endswith(".safetensors"):
                text = (
                    f"{INDEX_NAME} names {shard!r}; shards must be *.safetensors files in the checkpoint's own folder."
                )
                self.problem("index-unreadable", INDEX_NAME, text)
        metadata = content.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        self.total_size = total if type(total) is int else None
        return dict(entries)

    def find_shards(self, index: Mapping[str, str] | None) -> list[str]:
        """Return the files to read, having compared them with the index or with their own numbering."""
        present = sorted(path.name for path in self.directory.glob("*.safetensors") if path.is_file())
        if index is None:
            if not present:
                remedy = "Convert the weights to safetensors or pass another folder."
                self.problem("shard-missing", "*.safetensors", "no *.safetensors file.", remedy)
            self.check_numbering(present)
            return present
        counts = collections.Counter(index.values())
        for shard in sorted(set(counts) - set(present)):
            text = f"missing shard {shard}: {INDEX_NAME} places {counts[shard]} tensors in it."
            self.problem("shard-missing", shard, text, "Download it.")
        for shard in sorted(set(present) - set(counts)):
            text = f"{shard} is not named by {INDEX_NAME}."
            self.problem("index-disagrees", shard, text, "Move it away or repair the index.")
        return [shard for shard in sorted(counts) if shard in set(present)]

    def check_numbering(self, files: list[str]) -> None:
        """Take down a problem for every gap in names like model-00002-of-00003.safetensors."""
        present: dict[tuple[str, int], set[int]] = {}
        for file in files:
            match = _SHARD_NAME.fullmatch(file)
            if match:
                present.setdefault((match["stem"], int(match["count"])), set()).add(int(match["number"]))
        for (stem, count), numbers in sorted(present.items()):
            for number in range(1, count + 1):
                if number not in numbers:
                    shard = f"{stem}-{number:05d}-of-{count:05d}.safetensors"
                    self.problem("shard-missing", shard, f"missing shard {shard}.", "Download it.")

    def add_shard(self, shard: str) -> bool:
        """Read one file's header and take over its tensors; say whether the header could be read."""
        header = _ShardHeader(self.directory / shard)
        self.problems += header.problems
        self.data_starts[shard] = header.data_start
        if header.metadata:
            self.metadata[shard] = header.metadata
        for info in header.infos:
            other = self.infos.setdefault(info.name, info)
            if other is not info:
                text = f"{info.name}: stored twice, in {other.shard} and in {shard}."
                self.problem("tensor-twice", info.name, text, "Remove one of the two files.")
        return header.is_readable

    def compare_index(self, index: Mapping[str, str], unavailable: set[str]) -> None:
        """Take down every disagreement between the index and the headers that could be read."""
        for name in sorted(set(index) | set(self.infos)):
            stored = self.infos[name].shard if name in self.infos else None
            listed = index.get(name)
            if name in unavailable:
                continue  # its whole file has been reported
            if stored is None:
                text = f"{name}: {INDEX_NAME} places it in {listed}, which does not hold it."
            elif listed is None:
                text = f"{name}: stored in {stored} but absent from {INDEX_NAME}."
            elif stored != listed:
                text = f"{name}: stored in {stored} but {INDEX_NAME} places it in {listed}."
            else:
                continue
            self.problem("index-disagrees", name, text, "Download or export the checkpoint again.")


class _ShardHeader:
    """The header of one file: its tensors, and what is wrong with it."""

    def __init__(self, path: pathlib.Path) -> None:
        self.shard = path.name
        self.infos: list[TensorInfo] = []
        self.metadata: Mapping[str, Any] = {}
        self.data_start = 0
        self.is_readable = False
        self.problems: list[Problem] = []
        file_bytes = path.stat().st_size
        raw = self.read_bytes(path, file_bytes)
        if raw is None:
            return
        self.data_start = 8 + len(raw)
        self.parse(raw)
        if not self.problems:
            self.check_ranges(file_bytes - self.data_start)

    def problem(self, rule: str, subject: str, text: str, remedy: str = "") -> None:
        self.problems.append(Problem(rule, subject, text, remedy))

    def read_bytes(self, path: pathlib.Path, file_bytes: int) -> bytes | None:
        """Return the raw header, or None when a problem has been taken down."""
        shard = self.shard
        with open(path, "rb") as file:
            prefix = file.read(8)
            if prefix == b"version ":
                text = f"{shard}: a Git LFS pointer instead of data."
                self.problem("shard-header", shard, text, "Run git lfs pull.")
                return None
            if len(prefix) < 8:
                text = f"{shard}: truncated, {file_bytes} bytes are too few for a header."
                self.problem("shard-truncated", shard, text, _AGAIN)
                return None
            header_bytes = int.from_bytes(prefix, "little")
            if header_bytes > MAX_HEADER_BYTES or 8 + header_bytes > file_bytes:
                text = (
                    f"{shard}: header of {header_bytes} bytes in a file of {file_bytes}, at most {MAX_HEADER_BYTES} "
                    "allowed: truncated or not a safetensors file."
                )
                self.problem("shard-truncated", shard, text, _AGAIN)
                return None
            return file.read(header_bytes)

    def parse(self, raw: bytes) -> None:
        shard = self.shard
        repeated: set[str] = set()
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=_object_noting(repeated))
        except (ValueError, RecursionError) as error:
            self.problem("shard-header", shard, f"{shard}: the header is not JSON ({_brief(error)}).", _AGAIN)
            return
        if not isinstance(header, dict):
            self.problem("shard-header", shard, f"{shard}: the header is not a JSON object.", _AGAIN)
            return
        self.is_readable = True
        for name in sorted(repeated):
            remedy = "Export the checkpoint again."
            self.problem("tensor-twice", name, f"{name}: stored twice in {shard}.", remedy)
        metadata = header.pop("__metadata__", None)
        self.metadata = metadata if isinstance(metadata, dict) else {}
        for name, entry in header.items():
            info = _parse_entry(name, entry, shard)
            if isinstance(info, TensorInfo):
                self.infos.append(info)
            else:
                self.problems.append(info)

    def check_ranges(self, data_bytes: int) -> None:
        """Take down every overlap and hole of the data section, and one problem for all tensors beyond its end."""
        shard = self.shard
        if cut_off := [info for info in self.infos if info.end > data_bytes]:
            first = min(cut_off, key=lambda info: info.begin)
            text = (
                f"{shard}: truncated: {len(cut_off)} of {len(self.infos)} tensors end beyond its {data_bytes} bytes of "
                f"data, {first.name} (bytes {first.begin} to {first.end}) is the first."
            )
            self.problem("shard-truncated", shard, text, _AGAIN)
        used, last = 0, "the header"
        for info in sorted(self.infos, key=lambda info: (info.begin, info.end)):
            if info.begin < used:
                text = f"{info.name}: overlaps {last} in {shard} (bytes {info.begin} to {info.end})."
                self.problem("shard-overlap", info.name, text)
            elif info.begin > used:
                text = f"{info.name}: {info.begin - used} bytes between it and {last} in {shard} belong to none."
                self.problem("shard-gap", info.name, text)
            if info.end >= used:
                used, last = info.end, info.name
        if not self.problems and used < data_bytes:
            text = f"{shard}: {data_bytes - used} bytes after the last tensor belong to none."
            self.problem("shard-gap", shard, text, "Export it again.")


def _object_noting(repeated: set[str]) -> Any:
    """Return a hook for json.loads that notes keys an object holds twice."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            repeated.update(key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1)
        return content

    return build


def _brief(content: object) -> str:
    """Return how messages repeat what a file says: never longer than a line."""
    short = reprlib.Repr()
    short.maxother = short.maxstring = short.maxlong = 60
    return str(content)[:200] if isinstance(content, Exception) else short.repr(content)


def _parse_entry(name: str, entry: Any, shard: str) -> TensorInfo | Problem:
    """Return one header entry, or what is wrong with it."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        text = f"{name}: dtype {_brief(dtype)} in {shard}; allowed are {', '.join(ITEM_BYTES)}."
        return Problem("shard-header", name, text, "Export it in one of these.")
    is_sound = _are_counts(shape) and _are_counts(offsets) and len(offsets) == 2 and len(shape) <= MAX_DIMS
    if not is_sound or math.prod(size for size in shape if size) >= MAX_COUNT:
        text = (
            f"{name}: malformed entry in the header of {shard} (shape {_brief(shape)}, data_offsets {_brief(offsets)})."
        )
        return Problem("shard-header", name, text)
    if dtype == "F4":
        if not shape or shape[-1] % 2:
            text = f"{name}: F4 with shape {shape} in {shard}; the last dimension must be even."
            return Problem("shard-header", name, text)
        shape = [*shape[:-1], shape[-1] // 2]
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    begin, end = offsets
    if end - begin != num_bytes:
        text = f"{name}: {end - begin} bytes in {shard}, but {dtype} {shape} takes {num_bytes}."
        return Problem("shard-header", name, text, "Export it again.")
    return TensorInfo(name, dtype, tuple(shape), shard, begin, end)


def _are_counts(values: Any) -> bool:
    """Say whether this is a list of integers that are not negative and fit 63 bits."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < MAX_COUNT for value in values)
