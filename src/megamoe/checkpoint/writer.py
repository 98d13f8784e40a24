# SPDX-License-Identifier: Apache-2.0
"""Write checkpoint files so that a reader sees either the old file or the whole new one.

Bytes go to a temporary file in the same folder, are flushed to the disk, and the file is renamed over the target.
Tensors are laid out by falling element size, then name, so that every tensor is aligned to its elements.
"""

from __future__ import annotations

import json
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
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)

    def chunks() -> Iterable[bytes]:
        yield len(encoded).to_bytes(8, "little")
        yield encoded
        for name in order:
            yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    _replace(pathlib.Path(path), chunks())
    return 8 + len(encoded) + offset


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write indented JSON with a final newline."""
    _replace(pathlib.Path(path), [(json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()])


def _replace(path: pathlib.Path, chunks: Iterable[bytes]) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, and rename it over `path`."""
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
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
