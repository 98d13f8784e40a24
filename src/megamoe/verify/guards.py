# SPDX-License-Identifier: Apache-2.0
"""Outputs that notice what a kernel does to them: poisoned before, fenced on both sides.

Inside `with GuardedOutputs(poison)` every tensor that `torch.empty` makes lies between two fences in a larger
allocation, and all of it, the tensor itself included, is filled with the poison byte. A kernel that leaves an element
unwritten returns poison (0xFF is NaN in every floating-point format here); one that writes too far breaks a fence.
Running twice with different poisons finds unwritten integers, too.

What an operation writes in place is fenced by `fenced`, with the same byte each time: the memory between the fences can
then be compared whole, bytes that nothing may write included.
"""

from __future__ import annotations

import dataclasses
import math
from types import TracebackType
from typing import Any

import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.verify.values import mapped, parts, whole_storage

FENCE_BYTES = 4096
FENCE = 0xA5


class GuardedOutputs:
    """Fences around everything `torch.empty` allocates in a `with` block.

    Args:
        poison: the byte to fill with.
    """

    def __init__(self, poison: int = 0xFF) -> None:
        """Nothing is changed yet."""
        self.poison = poison
        self._allocations: list[torch.Tensor] = []
        self._original = torch.empty

    def __enter__(self) -> GuardedOutputs:
        """Replace `torch.empty`."""
        torch.empty = self._empty
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Put `torch.empty` back."""
        torch.empty = self._original

    def _empty(self, *size: Any, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> torch.Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        dtype = dtype or torch.get_default_dtype()
        num_bytes = math.prod(shape) * dtype.itemsize
        room = -(-num_bytes // 256) * 256
        whole = self._original(room + 2 * FENCE_BYTES, dtype=torch.uint8, device=device, **rest)
        whole.fill_(self.poison)
        self._allocations.append(whole[:FENCE_BYTES])
        self._allocations.append(whole[FENCE_BYTES + num_bytes :])
        return whole[FENCE_BYTES : FENCE_BYTES + num_bytes].view(dtype).view(shape)

    @property
    def num_outputs(self) -> int:
        """Tensors allocated so far."""
        return len(self._allocations) // 2

    def check(self, op: str) -> None:
        """Look at all fences.

        Raises:
            AssertionError: a byte outside an output was written.
        """
        for index, fence in enumerate(self._allocations):
            changed = (fence != self.poison).nonzero()
            if len(changed):
                side = "before" if index % 2 == 0 else "after"
                raise AssertionError(
                    f"{op}: wrote {len(changed)} bytes {side} output {index // 2}, the first {int(changed[0])} bytes "
                    "into its fence"
                )


def fenced(value: Any, device: torch.device | str) -> Any:
    """Return a copy of an argument on a device, with the fence byte before and behind the memory that it lies in.

    Strides stay, and so do the bytes between rows and pages. A pool's storage is copied whole.
    """

    if isinstance(value, CachePool):
        source = whole_storage(value.storage)
        storage = _between_fences(source, device)[FENCE_BYTES : FENCE_BYTES + source.numel()].as_strided(
            value.storage.shape, value.storage.stride(), FENCE_BYTES + value.storage.storage_offset()
        )
        return dataclasses.replace(value, storage=storage)
    return mapped(value, lambda one: _fenced_tensor(one, device))


def _fenced_tensor(one: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    size = one.element_size()
    last = sum((count - 1) * step for count, step in zip(one.shape, one.stride(), strict=True))
    first = one.storage_offset() * size
    source = whole_storage(one)[first : first + (last + 1) * size if one.numel() else first]
    whole = _between_fences(source, device)
    return (
        whole[: whole.numel() // size * size].view(one.dtype).as_strided(one.shape, one.stride(), FENCE_BYTES // size)
    )


def _between_fences(source: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    whole = torch.full((source.numel() + 2 * FENCE_BYTES,), FENCE, dtype=torch.uint8, device=device)
    whole[FENCE_BYTES : FENCE_BYTES + source.numel()] = source.to(device)
    return whole


def check_fences(op: str, name: str, value: Any) -> None:
    """Look at the fences of an argument that was written in place.

    Raises:
        AssertionError: a byte outside its memory was written.
    """
    tensors = [value.storage] if isinstance(value, CachePool) else list(parts(value).values())
    for one in tensors:
        whole = whole_storage(one)
        for side, fence in (("before", whole[:FENCE_BYTES]), ("behind", whole[-FENCE_BYTES:])):
            changed = (fence != FENCE).nonzero()
            if len(changed):
                raise AssertionError(f"{op}: wrote {len(changed)} bytes {side} {name}, which it changes in place")
