# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints as plain bytes, to be changed and written again; and tools/fake_checkpoint.py as a module."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import pathlib
import struct
import sys
from types import ModuleType
from typing import Any

from megamoe.checkpoint.headers import INDEX_NAME, ITEM_BYTES, read_headers

REPOSITORY = pathlib.Path(__file__).parent.parent


def load_fake_checkpoint() -> ModuleType:
    """Return tools/fake_checkpoint.py as a module."""
    name = "fake_checkpoint"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / "fake_checkpoint.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[name]


fake = load_fake_checkpoint()


@dataclasses.dataclass
class Raw:
    """One tensor as bytes."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes


@dataclasses.dataclass
class Files:
    """A checkpoint in memory.

    Attributes:
        tensors: name -> tensor.
        config: content of config.json.
        quant: content of hf_quant_config.json, or None.
    """

    tensors: dict[str, Raw]
    config: dict[str, Any]
    quant: dict[str, Any] | None

    @classmethod
    def read(cls, directory: pathlib.Path) -> Files:
        """Read a checkpoint directory."""
        headers = read_headers(directory)
        assert not headers.problems
        tensors = {}
        for name, info in headers.infos.items():
            start = headers.data_starts[info.shard] + info.begin
            with open(directory / info.shard, "rb") as file:
                file.seek(start)
                tensors[name] = Raw(info.dtype, info.shape, file.read(info.num_bytes))
        quant = directory / "hf_quant_config.json"
        return cls(
            tensors,
            json.loads((directory / "config.json").read_text()),
            json.loads(quant.read_text()) if quant.exists() else None,
        )

    def put(self, name: str, dtype: str, shape: tuple[int, ...], content: bytes | None = None) -> None:
        """Set a tensor; without content, zeros."""
        size = math.prod(shape) * ITEM_BYTES[dtype]
        self.tensors[name] = Raw(dtype, shape, bytes(size) if content is None else content)
        assert len(self.tensors[name].content) == size

    def put_float(self, name: str, value: float) -> None:
        """Set a scalar, keeping its shape."""
        self.put(name, "F32", self.tensors[name].shape, struct.pack("<f", value))

    def poke(self, name: str, offset: int, content: bytes) -> None:
        """Overwrite bytes of a tensor."""
        raw = self.tensors[name]
        raw.content = raw.content[:offset] + content + raw.content[offset + len(content) :]
        assert len(raw.content) == math.prod(raw.shape) * ITEM_BYTES[raw.dtype]

    def write(self, directory: pathlib.Path, *, num_shards: int = 2) -> pathlib.Path:
        """Write it: shards, index, config.json."""
        directory.mkdir(parents=True, exist_ok=True)
        names = sorted(self.tensors)
        weight_map = {}
        for number in range(num_shards):
            file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
            members = names[number * len(names) // num_shards : (number + 1) * len(names) // num_shards]
            weight_map.update(dict.fromkeys(members, file))
            write_shard(directory / file, {name: self.tensors[name] for name in members})
        (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (directory / "config.json").write_text(json.dumps(self.config))
        if self.quant is not None:
            (directory / "hf_quant_config.json").write_text(json.dumps(self.quant))
        return directory


def write_shard(path: pathlib.Path, tensors: dict[str, Raw]) -> None:
    """Write one safetensors file."""
    header, offset = {}, 0
    for name, raw in tensors.items():
        end = offset + len(raw.content)
        header[name] = {"dtype": raw.dtype, "shape": list(raw.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"".join(raw.content for raw in tensors.values()))
