# SPDX-License-Identifier: Apache-2.0
"""write_cache: round rows to the pool's format and store them, by slot.

Math       row slots[t] of the pool = encode(rows[t, :])          nothing where slots[t] is -1
Numerics   formats/cache_rows.py says how each format rounds; every row is rounded on its own
Tolerance  none: bit-exact
Kernels    none: steps write rows with write_latent, compress_kv and write_index_keys, which round them as this does
Source     docs/numerics.md, section "Cache rows"
"""

from __future__ import annotations

import torch

from megamoe.formats.cache_rows import CachePool, encode_rows
from megamoe.ops.check import FLOATS, INT64, check
from megamoe.ops.dispatch import pick
from megamoe.ops.read_cache import as_words, check_pool, check_slots, refuse_twice, row_views


def write_cache(rows: torch.Tensor, pool: CachePool, slots: torch.Tensor) -> None:
    """Store rows in place.

    Args:
        rows: [T, width] bf16 or fp32. T may be 0.
        pool: where the rows go; its bytes outside the named slots are untouched.
        slots: [T] int64, distinct slot numbers; -1 skips the row.

    Raises:
        TypeError: a dtype is not as above, or pool is not a CachePool.
        ValueError: a shape does not fit, or (on the CPU) a slot is not in -1 .. num_slots - 1 or appears twice.
    """
    check_pool("write_cache", "pool", pool)
    check(
        "write_cache",
        rows=(rows, "T width", FLOATS),
        slots=(slots, "T", INT64),
        storage=(pool.storage, "N B"),
    )
    if rows.shape[1] != pool.width:
        raise ValueError(
            f"write_cache: rows must be [T, {pool.width}] for this pool; got {list(rows.shape)}. "
            f"A pool's width is fixed when it is allocated."
        )
    pick("write_cache", rows.device, reference)(rows, pool, slots)


def reference(rows: torch.Tensor, pool: CachePool, slots: torch.Tensor) -> None:
    """Compute the operation's meaning in plain torch."""
    check_slots("write_cache", "slots", slots, pool)
    is_kept = slots >= 0
    if not bool(is_kept.all()):
        rows, slots = rows[is_kept], slots[is_kept]
    if not slots.shape[0]:
        return
    refuse_twice("write_cache", "slots", slots)
    data, scales = encode_rows(rows, pool.row_format)
    block, row = slots // pool.rows_per_block, slots % pool.rows_per_block
    for section, values in zip(row_views(pool), (data, scales), strict=True):
        if section.shape[-1]:
            section[block, row] = as_words(values, section.dtype)
