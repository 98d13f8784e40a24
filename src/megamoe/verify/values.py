# SPDX-License-Identifier: Apache-2.0
"""What operations take and return, taken apart, copied and moved: tensors, containers, pools, tuples of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.formats.fp8 import Fp8BlockTensor, Fp8RowTensor
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.ops.plan_slots import EntrySlots, EntryTables, RowTables, StepSlots
from megamoe.ops.rope import RopeTable

CONTAINERS = (
    NvFp4Tensor,
    MxFp4Tensor,
    Fp8RowTensor,
    Fp8BlockTensor,
    RopeTable,
    RowTables,
    EntryTables,
    EntrySlots,
    StepSlots,
)
"""Frozen records of tensors, names and each other, which are rebuilt tensor by tensor."""


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def mapped(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return an argument or a result with a function applied to every tensor; of a pool to its whole storage.

    Args:
        value: a tensor, a container, a pool, a tuple of these, or anything else, which stays as it is.
        function: keeps shape and dtype.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(mapped(one, function) for one in value)
    if isinstance(value, CachePool):
        storage = function(whole_storage(value.storage)).as_strided(
            value.storage.shape, value.storage.stride(), value.storage.storage_offset()
        )
        return dataclasses.replace(value, storage=storage)
    if isinstance(value, CONTAINERS):
        changes: Any = {name: mapped(one, function) for name, one in _fields(value).items()}
        return dataclasses.replace(value, **changes)
    return value


def moved(value: Any, device: torch.device | str) -> Any:
    """Return an argument or a result on a device; what is there already is not copied."""
    return mapped(value, lambda one: one.to(device))


def copied(value: Any, device: torch.device | str) -> Any:
    """Return a copy of an argument or a result on a device, at another address even there."""
    return mapped(value, lambda one: one.to(device, copy=True))


def whole_storage(value: torch.Tensor) -> torch.Tensor:
    """Return every byte of the memory that a tensor lies in, uint8 [n], the tensor's own bytes and all others."""
    return torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.untyped_storage())


def rows_of(value: Any, index: torch.Tensor) -> Any:
    """Return some tokens of an argument or a result whose first dimension is the tokens; None is none.

    Block scales in tiles become row-major: tokens are apart there.
    """
    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(rows_of(one, index) for one in value)
    index = index.to(value.device)
    if isinstance(value, NvFp4Tensor):
        plain = value.row_major()
        return dataclasses.replace(
            plain,
            codes=plain.codes[index],
            scales=_rows(plain.scales, index),
            tensor_scale=plain.tensor_scale[index] if plain.tensor_scale.dim() else plain.tensor_scale,
        )
    if isinstance(value, MxFp4Tensor | Fp8RowTensor):
        return dataclasses.replace(value, codes=_rows(value.codes, index), scales=_rows(value.scales, index))
    return value[index]


def _rows(part: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return part.view(torch.uint8)[index].view(part.dtype)


def pool_rows(pool: CachePool, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the stored bytes of some rows, data and scales; negative slots are left out."""
    slots = slots.to(pool.device)
    slots = slots[slots >= 0]
    block, row = slots // pool.rows_per_block, slots % pool.rows_per_block
    return pool.data_rows[block, row], pool.scale_rows[block, row]


def rows_alone(pool: CachePool, slots: torch.Tensor) -> CachePool:
    """Return a pool of the rows that some slots name and of nothing else, a page each; negative slots are left out."""
    storage = torch.cat(pool_rows(pool, slots), dim=1)
    return dataclasses.replace(pool, storage=storage, rows_per_block=1)


def parts(value: Any, name: str = "y") -> dict[str, torch.Tensor]:
    """Return the tensors of a result by name: containers and tuples are taken apart, a pool is its whole storage."""
    if isinstance(value, tuple):
        return {key: part for index, one in enumerate(value) for key, part in parts(one, f"{name}{index}").items()}
    if isinstance(value, CachePool):
        return {f"{name}.storage": whole_storage(value.storage)}
    if isinstance(value, CONTAINERS):
        found = [parts(one, f"{name}.{key}") for key, one in _fields(value).items()]
        return {key: part for one in found for key, part in one.items() if isinstance(part, torch.Tensor)}
    return {name: value}


_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def plain(value: Any) -> dict[str, torch.Tensor]:
    """Return a result's tensors as bytes or numbers that torch compares bit by bit."""
    return {name: part.view(_INTEGER[part.dtype.itemsize]) for name, part in parts(value).items()}


def strided(value: Any, shift_bytes: int) -> Any:
    """Return a tensor of the same values whose rows lie further apart: by some bytes, or by one element for 0."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.numel() == 0:
        return value
    step = max(1, shift_bytes // value.element_size())
    wide = torch.empty((*value.shape[:-1], value.shape[-1] + step), dtype=value.dtype, device=value.device)
    view = wide[..., step:]
    view.copy_(value)
    return view
