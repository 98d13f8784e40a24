# SPDX-License-Identifier: Apache-2.0
"""save_rows: copy the last rows of sequences at some lengths from their rings, and from the step area, to snapshots.

Math       save (request r, length L, start s, first token f, block b): for j = 0 .. P - 1, P rows a block of `target`,
           row j of block b = the row of position L - P + j of r: row f + position - s of `step` where position >= s,
           a row of the ring otherwise
Numerics   none: bytes move
Nobody     a save whose request is -1 copies nothing
Tolerance  none: bit-exact
Kernels    as copy_cache's
Source     docs/engine.md, section "Prefix reuse"; ops/row_slots.py
"""

from __future__ import annotations

import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.ops.check import check
from megamoe.ops.copy_cache import reference as copy_rows
from megamoe.ops.dispatch import pick
from megamoe.ops.read_cache import check_pool, check_slots
from megamoe.ops.row_slots import row_slots

INT32: tuple[torch.dtype, ...] = (torch.int32,)


def save_rows(
    ring: CachePool, step: CachePool | None, target: CachePool, saves: torch.Tensor, block_tables: torch.Tensor
) -> None:
    """Copy rows in place to `target`.

    Args:
        ring: rings of the rows of earlier steps.
        step: rows of this step, by token; None where they are in the rings already.
        target: one block per snapshot; the rows of a block are the rows that are copied. Row format and width are those
            of `ring`.
        saves: [S, 5] int32: request, length, position of the request's first token in this step, number of that token
            in the step, block of `target`. Each save of a request has a block of its own.
        block_tables: [R, n] int32, of the rings.

    Raises:
        TypeError: a dtype is not as above, or a pool is not a CachePool.
        ValueError: the pools hold different rows, or (on the CPU) a row lies outside its pool, or a save has no block,
            or that of another one.
    """
    pools = {"ring": ring, "target": target} | ({"step": step} if step is not None else {})
    for name, pool in pools.items():
        check_pool("save_rows", name, pool)
        if (pool.row_format, pool.width) != (ring.row_format, ring.width):
            raise ValueError(
                f"save_rows: all pools must hold the same rows; got {ring.row_format.name} of width {ring.width} in "
                f"ring and {pool.row_format.name} of width {pool.width} in {name}. Bytes are copied, not converted."
            )
    check(
        "save_rows",
        saves=(saves, "S 5", INT32),
        block_tables=(block_tables, "R n", INT32),
        **{name: (pool.storage, f"{name}_blocks {name}_bytes") for name, pool in pools.items()},
    )
    pick("save_rows", saves.device, reference)(ring, step, target, saves, block_tables)


def reference(
    ring: CachePool, step: CachePool | None, target: CachePool, saves: torch.Tensor, block_tables: torch.Tensor
) -> None:
    """Compute the operation's meaning in plain torch."""
    requests = saves[:, 0]
    _, length, start, first, block = saves.to(torch.int64).unbind(1)
    _check_blocks(block[requests >= 0], target)
    num_rows = target.rows_per_block
    row = torch.arange(num_rows, dtype=torch.int64, device=saves.device)
    positions = (length[:, None] - num_rows + row).masked_fill((requests < 0)[:, None], -1)  # [S, P]
    to = torch.where(positions >= 0, block[:, None] * num_rows + row, -1)
    is_new = torch.zeros_like(positions, dtype=torch.bool)
    if step is not None:
        is_new = (positions >= start[:, None]) & (positions >= 0)
        in_step = torch.where(is_new, first[:, None] + positions - start[:, None], -1)
        _copy(step, in_step, target, to)
    in_ring = row_slots(positions.masked_fill(is_new, -1), requests, block_tables, ring.rows_per_block)
    _copy(ring, in_ring, target, to)


def _check_blocks(blocks: torch.Tensor, target: CachePool) -> None:
    if not blocks.numel():
        return
    low, high = (int(bound) for bound in blocks.aminmax())
    if low < 0 or high >= target.num_blocks:
        raise ValueError(
            f"save_rows: blocks of saves must be in 0 .. {target.num_blocks - 1}, the snapshots of target; got "
            f"{low if low < 0 else high}. A save that is not wanted has request -1."
        )
    if blocks.unique().numel() < blocks.numel():
        raise ValueError(
            f"save_rows: blocks of saves must be distinct; got {blocks.tolist()}. Two boundaries cannot share a "
            f"snapshot."
        )


def _copy(source: CachePool, source_slots: torch.Tensor, target: CachePool, target_slots: torch.Tensor) -> None:
    check_slots("save_rows", "the rows of this step or of the rings", source_slots, source)
    copy_rows(source, source_slots.flatten(), target, target_slots.flatten())
