# SPDX-License-Identifier: Apache-2.0
"""A bounded cache of weights in fp32, so that references decode a quantized weight once and not once a token.

Entries belong to the weight object they were made from: they disappear with it, and are made anew when one of its
tensors was changed in place. The least recently used go first when the bound is reached. Only weights on the CPU are
kept. The cache never changes a result, only how long it takes.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict

import torch

from megamoe.formats import fp8, nvfp4
from megamoe.formats.fp8 import Fp8BlockTensor
from megamoe.formats.nvfp4 import NvFp4Tensor

Weight = torch.Tensor | NvFp4Tensor | Fp8BlockTensor

DEFAULT_LIMIT_BYTES = 2 * 1024**3


def _dequantize(weight: Weight) -> torch.Tensor:
    if isinstance(weight, NvFp4Tensor):
        return nvfp4.dequantize(weight, torch.float32)
    if isinstance(weight, Fp8BlockTensor):
        return fp8.dequantize(weight, torch.float32)
    return weight.float()


def _tensors(weight: Weight) -> tuple[torch.Tensor, ...]:
    if isinstance(weight, torch.Tensor):
        return (weight,)
    if isinstance(weight, NvFp4Tensor):
        return (weight.codes, weight.scales, weight.tensor_scale)
    return (weight.codes, weight.scales)


def _version(tensor: torch.Tensor) -> int:
    """Return the count of in-place changes; tensors made under inference mode have none and count as unchanged."""
    return 0 if tensor.is_inference() else tensor._version


class DequantCache:
    """Least recently used fp32 weights, at most `limit_bytes` of them.

    Args:
        limit_bytes: upper bound on the bytes kept; a weight larger than this is decoded at every use.
    """

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        """Start empty."""
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self._lock = threading.RLock()  # reentrant: a weight may be collected, and forgotten, inside get
        self._owners: dict[int, weakref.ref[Weight]] = {}
        self._entries: OrderedDict[tuple[int, int | None], tuple[torch.Tensor, tuple[int, ...]]] = OrderedDict()

    def __len__(self) -> int:
        """Return how many weights (or experts of a stacked weight) are kept."""
        return len(self._entries)

    def get(self, weight: Weight, index: int | None = None) -> torch.Tensor:
        """Return the weight's values in fp32. Do not write to the result.

        Args:
            weight: a plain tensor or a container.
            index: with a stacked weight [E, N, K], which one; None for the whole.

        Returns:
            fp32, [N, K] or the shape of `weight`; a plain fp32 weight is returned as it is.
        """
        if isinstance(weight, torch.Tensor) and weight.dtype == torch.float32:
            return weight if index is None else weight[index]
        if weight.device.type != "cpu":
            return _dequantize(weight if index is None else weight[index])
        versions = tuple(map(_version, _tensors(weight)))
        key = (id(weight), index)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                if entry[1] == versions:
                    self._entries.move_to_end(key)
                    return entry[0]
                self._drop(key)
            values = _dequantize(weight if index is None else weight[index])
            if values.nbytes <= self.limit_bytes:
                self._own(weight)
                self._entries[key] = (values, versions)
                self.num_bytes += values.nbytes
                while self.num_bytes > self.limit_bytes:
                    self._drop(next(iter(self._entries)))
            return values

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._owners.clear()
            self.num_bytes = 0

    def _own(self, weight: Weight) -> None:
        weight_id = id(weight)
        if weight_id not in self._owners:
            self._owners[weight_id] = weakref.ref(weight, lambda _: self._forget(weight_id))

    def _forget(self, weight_id: int) -> None:
        with self._lock:
            self._owners.pop(weight_id, None)
            for key in [key for key in self._entries if key[0] == weight_id]:
                self._drop(key)

    def _drop(self, key: tuple[int, int | None]) -> None:
        self.num_bytes -= self._entries.pop(key)[0].nbytes


_CACHE = DequantCache()


def dequantized(weight: Weight, index: int | None = None) -> torch.Tensor:
    """Return a weight in fp32 from the process-wide cache; see `DequantCache.get`."""
    return _CACHE.get(weight, index)
