# SPDX-License-Identifier: Apache-2.0
"""read_cache: the values of cached rows, by slot.

Math       y[i, :] = values of row slots[i] of the pool, or zeros where slots[i] is -1
Numerics   the decoded values in fp32, which every row format represents exactly; nothing is rounded
           Row p of the pool is row p % rows_per_block of block p // rows_per_block, whatever the blocks' stride.
Tolerance  none: bit-exact
Kernels    none: what reads rows in a step decodes them itself
Source     docs/numerics.md, section "Cache rows"
"""

from __future__ import annotations

import math

import torch

from megamoe.formats.cache_rows import CachePool, decode_rows
from megamoe.ops.check import INT64, check
from megamoe.ops.dispatch import pick


def read_cache(pool: CachePool, slots: torch.Tensor) -> torch.Tensor:
    """Return the values of cached rows.

    Args:
        pool: where the rows are.
        slots: [...] int64 slot numbers; -1 means no row. A slot may appear any number of times.

    Returns:
        [..., width] fp32, contiguous, newly allocated; zeros where the slot is -1.

    Raises:
        TypeError: slots is not int64, or pool is not a CachePool.
        ValueError: (on the CPU) a slot is not in -1 .. num_slots - 1.
    """
    check_pool("read_cache", "pool", pool)
    check("read_cache", slots=(slots, "...", INT64), storage=(pool.storage, "N B"))
    rows: torch.Tensor = pick("read_cache", slots.device, reference)(pool, slots)
    return rows


def reference(pool: CachePool, slots: torch.Tensor) -> torch.Tensor:
    """Compute the operation's meaning in plain torch."""
    check_slots("read_cache", "slots", slots, pool)
    flat = slots.reshape(-1)
    is_row = flat >= 0
    if bool(is_row.all()):
        rows = _decode(pool, flat)
    else:
        rows = torch.zeros(flat.shape[0], pool.width, dtype=torch.float32, device=flat.device)
        rows[is_row] = _decode(pool, flat[is_row])
    return rows.reshape(*slots.shape, pool.width)


def _decode(pool: CachePool, slots: torch.Tensor) -> torch.Tensor:
    """Return the values of rows that exist, [T, width] fp32."""
    data, scales = row_views(pool)
    block, row = slots // pool.rows_per_block, slots % pool.rows_per_block
    return decode_rows(as_bytes(data[block, row]), as_bytes(scales[block, row]), pool.row_format, pool.width)


def row_views(pool: CachePool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views [num_blocks, rows_per_block, words] of the data and of the scales of every row.

    A word is the widest integer that the pool's strides allow: moving a row takes an eighth of the steps that moving
    its bytes takes. Rows that are read from the views go through `as_bytes`, rows to write through `as_words`.
    """
    return _in_words(pool.data_rows), _in_words(pool.scale_rows)


def _in_words(rows: torch.Tensor) -> torch.Tensor:
    size = rows.shape[-1]
    unit = math.gcd(size, rows.stride(0), rows.stride(1), rows.storage_offset(), 8)
    return rows.view(_WORDS[unit]) if size else rows


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bytes(words: torch.Tensor) -> torch.Tensor:
    """Return rows gathered from a row view as uint8 [T, row bytes]."""
    return words.view(torch.uint8) if words.shape[-1] else words


def as_words(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return uint8 rows [T, row bytes] in the words of a row view; rows that start between two words are copied."""
    data = data.clone() if data.storage_offset() % dtype.itemsize else data
    return data.view(dtype)


def check_pool(op: str, name: str, pool: CachePool) -> None:
    """Refuse what is not a pool.

    Raises:
        TypeError: pool is not a CachePool.
    """
    if not isinstance(pool, CachePool):
        raise TypeError(f"{op}: {name} must be a CachePool; got {type(pool).__name__}. CachePool.allocate makes one.")


def check_slots(op: str, name: str, slots: torch.Tensor, pool: CachePool) -> None:
    """Refuse slots that are neither -1 nor a row of the pool; for references, since it reads the slots.

    Raises:
        ValueError: a slot is not in -1 .. num_slots - 1.
    """
    if not slots.numel():
        return
    low, high = (int(bound) for bound in slots.aminmax())
    if low < -1 or high >= pool.num_slots:
        bad = low if low < -1 else high
        raise ValueError(
            f"{op}: {name} must be -1 or in 0 .. {pool.num_slots - 1}; got {bad} for a pool of "
            f"{pool.storage.shape[0]} blocks of {pool.rows_per_block} rows. Slots are block * rows_per_block + row."
        )


def refuse_twice(op: str, name: str, slots: torch.Tensor) -> None:
    """Refuse slots to write that name a row twice; for references, since it reads the slots.

    Args:
        op: the operation.
        name: of the argument, in the plural.
        slots: [T] int64, none of them negative.

    Raises:
        ValueError: a slot appears twice.
    """
    if slots.shape[0] < 2:
        return
    in_order = slots.sort().values
    twice = in_order[1:][in_order[1:] == in_order[:-1]]
    if twice.numel():
        raise ValueError(
            f"{op}: {name} must be distinct; slot {int(twice[0])} appears twice. Either a ring is too small for this "
            f"many tokens, or two sequences were given one page."
        )
