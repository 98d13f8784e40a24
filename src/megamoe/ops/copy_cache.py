# SPDX-License-Identifier: Apache-2.0
"""copy_cache: copy stored rows from one pool to another, bytes as they are.

Math       row target_slots[i] of `target` = row source_slots[i] of `source`      nothing where either slot is -1
Numerics   none: bytes move, nothing is decoded, so a copied row reads as the original in every format
Tolerance  none: bit-exact
Kernels    one pass; pages at multiples of 16 bytes and below 2 GiB, rows of a multiple of 16 bytes with a multiple of
           4 bytes of scales; slots below 2^31
Source     docs/engine.md, section "Prefix reuse"
"""

from __future__ import annotations

import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.ops.check import INT64, check
from megamoe.ops.dispatch import pick
from megamoe.ops.read_cache import check_pool, check_slots, refuse_twice, row_views


def copy_cache(source: CachePool, source_slots: torch.Tensor, target: CachePool, target_slots: torch.Tensor) -> None:
    """Copy rows in place from `source` to `target`.

    Args:
        source: where the rows are.
        source_slots: [T] int64; -1 skips the row.
        target: where they go; its row format and width are those of `source`. Its bytes outside the named slots are
            untouched. It may be the same pool if no slot is both read and written.
        target_slots: [T] int64, distinct where a row is copied; -1 skips the row.

    Raises:
        TypeError: slots are not int64, or a pool is not a CachePool.
        ValueError: the pools hold different rows, the slots differ in number, or (on the CPU) a slot is not in
            -1 .. num_slots - 1 or two rows are copied to one slot.
    """
    check_pool("copy_cache", "source", source)
    check_pool("copy_cache", "target", target)
    check(
        "copy_cache",
        source_slots=(source_slots, "T", INT64),
        target_slots=(target_slots, "T", INT64),
        source=(source.storage, "source_blocks source_bytes"),
        target=(target.storage, "target_blocks target_bytes"),
    )
    if (source.row_format, source.width) != (target.row_format, target.width):
        raise ValueError(
            f"copy_cache: both pools must hold the same rows; got {source.row_format.name} of width {source.width} and "
            f"{target.row_format.name} of width {target.width}. Bytes are copied, not converted."
        )
    pick("copy_cache", source_slots.device, reference)(source, source_slots, target, target_slots)


def reference(source: CachePool, source_slots: torch.Tensor, target: CachePool, target_slots: torch.Tensor) -> None:
    """Compute the operation's meaning in plain torch."""
    check_slots("copy_cache", "source_slots", source_slots, source)
    check_slots("copy_cache", "target_slots", target_slots, target)
    is_kept = (source_slots >= 0) & (target_slots >= 0)
    source_slots, target_slots = source_slots[is_kept], target_slots[is_kept]
    refuse_twice("copy_cache", "target_slots", target_slots)
    from_block, from_row = source_slots // source.rows_per_block, source_slots % source.rows_per_block
    to_block, to_row = target_slots // target.rows_per_block, target_slots % target.rows_per_block
    for read, written in zip(row_views(source), row_views(target), strict=True):
        if read.shape[-1]:
            size = min(read.element_size(), written.element_size())  # the pools' strides may allow different words
            words = _WORDS[size]
            written.view(words)[to_block, to_row] = read.view(words)[from_block, from_row]


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
