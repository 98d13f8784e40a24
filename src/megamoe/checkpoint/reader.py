# SPDX-License-Identifier: Apache-2.0
"""Read the tensors of a directory of safetensors files.

Opening a checkpoint reads only the headers (see headers.py) and refuses it if anything they and the index say
disagrees, in one error that lists all of it. Tensor bytes are mapped, so they are read when they are used.
"""

from __future__ import annotations

import mmap
import os
import pathlib
from types import TracebackType

import torch

from megamoe.checkpoint.headers import INDEX_NAME, MAX_HEADER_BYTES, Headers, TensorInfo, read_headers
from megamoe.checkpoint.problem import CheckpointError

__all__ = ["DTYPES", "INDEX_NAME", "MAX_HEADER_BYTES", "CheckpointError", "CheckpointReader", "TensorInfo"]

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


class CheckpointReader:
    """A checkpoint directory: one safetensors file, numbered shards, or shards with an index.

    Use it as a context manager. Tensors it hands out stay valid after it is closed.

    Attributes:
        directory: the checkpoint's folder.
        headers: what its headers say.
    """

    def __init__(self, directory: str | os.PathLike[str], headers: Headers | None = None) -> None:
        """Open the checkpoint and check everything that headers and index can show.

        Args:
            directory: folder with *.safetensors.
            headers: what `read_headers` said of it, where that is known already.

        Raises:
            CheckpointError: a file is missing, truncated or malformed, byte ranges overlap or leave holes, a tensor
                is stored twice, or index and files disagree.
        """
        self.headers = read_headers(directory) if headers is None else headers
        self.directory: pathlib.Path = self.headers.directory
        self._maps: dict[str, mmap.mmap] = {}
        if self.headers.problems:
            raise CheckpointError.listing(f"checkpoint {self.directory}", self.headers.problems)

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
        return tuple(sorted(self.headers.infos))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return self.headers.num_bytes

    def __contains__(self, name: object) -> bool:
        """Say whether a tensor of this name is stored."""
        return name in self.headers.infos

    def info(self, name: str) -> TensorInfo:
        """Return what the header says about a tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self.headers.infos:
            raise CheckpointError(f"checkpoint {self.directory}: no tensor {name!r} among {len(self.headers.infos)}.")
        return self.headers.infos[name]

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
        offset = self.headers.data_starts[info.shard] + info.begin
        raw = torch.frombuffer(self._maps[info.shard], dtype=torch.uint8, count=info.num_bytes, offset=offset)
        if offset % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(info.shape)
