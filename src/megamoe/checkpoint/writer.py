# SPDX-License-Identifier: Apache-2.0
"""Write checkpoint files so that a reader sees either the old file or the whole new one.

Bytes go to a temporary file in the same folder, are flushed to the disk, and the file is renamed over the target.
Tensors are laid out by falling element size, then name, so that every tensor is aligned to its elements.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from megamoe.checkpoint.reader import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "F4"}
_ALIGNMENT = 8


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> int:
    """Write one safetensors file.

    Args:
        path: target; its folder must exist.
        tensors: name -> tensor, any device, any strides.
        metadata: strings for the header's `__metadata__`.

    Returns:
        Size of the file in bytes.

    Raises:
        ValueError: a tensor is called "__metadata__".
        TypeError: safetensors has no name for a tensor's dtype.
    """
    if "__metadata__" in tensors:
        raise ValueError('write_safetensors: no tensor may be called "__metadata__". Rename it.')
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _NAMES)
            raise TypeError(f"write_safetensors: {name} is {tensor.dtype}; allowed are {allowed}. Cast or view it.")
    entries = {name: (_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    encoded, offsets = encode_header(entries, metadata)

    def chunks() -> Iterable[bytes]:
        yield encoded
        for name in offsets:
            yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    write_bytes(path, chunks())
    return len(encoded) + sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())


def encode_header(
    entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Lay out a safetensors file.

    Args:
        entries: name -> safetensors dtype and shape.
        metadata: strings for the header's `__metadata__`.

    Returns:
        Everything before the data section, and the offset of each tensor in the data section, in the order of the file.
    """
    sizes = {name: DTYPES[dtype].itemsize for name, (dtype, _) in entries.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    offset = 0
    for name in sorted(entries, key=lambda name: (-sizes[name], name)):
        dtype, shape = entries[name]
        offsets[name] = offset
        end = offset + math.prod(shape) * sizes[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    return len(encoded).to_bytes(8, "little") + encoded, offsets


def encode_json(content: Any) -> bytes:
    """Return indented JSON with a final newline."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write indented JSON with a final newline."""
    write_bytes(path, [encode_json(content)])


def write_bytes(path: str | os.PathLike[str], chunks: Iterable[bytes | bytearray]) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, and rename it over `path`."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


def flush_folder(folder: pathlib.Path) -> None:
    """Flush a folder's entries to the disk, so that a finished rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
