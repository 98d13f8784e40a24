# SPDX-License-Identifier: Apache-2.0
"""compress_kv: pool the raw rows of completed blocks into entries.

Math       v_i, s_i = values and scores of row row_slots[w, i] (ape already added to the scores)
           with overlap the first `ratio` rows give channels [:D] and the last `ratio` rows channels [D:]
           c[w, :] = sum_i softmax_i(s_i) * v_i           for every channel on its own; a missing row has score -inf
           y[w, :] = rope(rms_norm(c[w, :]) * norm_weight, entry_pos[w])
Numerics   fp32 throughout, one rounding to out_dtype. Sums over rows by halves, so that an entry's bits depend on its
           own rows alone. The official code rounds c to bf16 before the norm; here it stays fp32.
           A block without any row gives zeros (padding of a batch), not NaN.
Memory     entries are pooled in groups whose gathered rows take at most 64 MiB (always at least one entry)
Tolerance  verify/tolerance.py, "compress_kv": softmax over up to 128 terms in another order
Kernels    none yet; the CPU reference runs
Source     DeepSeek-V4 technical report (arXiv 2606.19348), compressed attention; docs/numerics.md, section "Operations"
"""

from __future__ import annotations

import torch

from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.ops.check import FLOATS, INT64, check
from megamoe.ops.dispatch import pick
from megamoe.ops.fixed_order import sum_by_halves
from megamoe.ops.read_cache import check_pool, check_slots
from megamoe.ops.read_cache import reference as read_rows
from megamoe.ops.rms_norm import rms_norm
from megamoe.ops.rope import RopeTable, rope

GATHER_BYTES = 64 * 2**20


def compress_kv(
    pool: CachePool,
    row_slots: torch.Tensor,
    norm_weight: torch.Tensor,
    entry_pos: torch.Tensor,
    table: RopeTable,
    *,
    ratio: int,
    overlap: bool,
    eps: float = 1e-6,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Pool, normalise and rotate the entries of completed blocks.

    Args:
        pool: FP32 rows of width 2 * coff * D: coff * D values, then coff * D scores; coff is 2 with overlap, else 1.
        row_slots: [W, coff * ratio] int64, oldest row first; -1 for rows before the start of the sequence. W may be 0.
        norm_weight: [D] bf16 or fp32.
        entry_pos: [W] int64, the position of each block's first token, at which the entry is rotated.
        table: the layer's rotary table.
        ratio: tokens per entry.
        overlap: the block before pools into the entry too.
        eps: of the norm.
        out_dtype: bf16 or fp32.

    Returns:
        [W, D] out_dtype, contiguous, newly allocated.

    Raises:
        TypeError: a dtype is not as above, or pool is not a CachePool.
        ValueError: a shape does not fit, the pool is not FP32, or a slot is not in -1 .. num_slots - 1.
    """
    check_pool("compress_kv", "pool", pool)
    dims = check(
        "compress_kv",
        row_slots=(row_slots, "W rows", INT64),
        norm_weight=(norm_weight, "D", FLOATS),
        entry_pos=(entry_pos, "W", INT64),
        storage=(pool.storage, "N B"),
        out_dtype=(out_dtype, FLOATS),
    )
    coff = 2 if overlap else 1
    if ratio < 1 or dims["rows"] != coff * ratio:
        raise ValueError(
            f"compress_kv: row_slots must have {'2 * ' if overlap else ''}ratio columns; got {list(row_slots.shape)} "
            f"for ratio {ratio}{' with overlap' if overlap else ''}. cache.compressor_state.block_row_slots makes them."
        )
    if pool.row_format is not RowFormat.FP32 or pool.width != 2 * coff * dims["D"]:
        raise ValueError(
            f"compress_kv: pool must hold FP32 rows of width {2 * coff * dims['D']} (values, then scores, for D = "
            f"{dims['D']}{' with overlap' if overlap else ''}); got {pool.row_format.name} rows of width {pool.width}."
        )
    check_slots("compress_kv", "row_slots", row_slots, pool)
    run = pick("compress_kv", row_slots.device, reference)
    entries: torch.Tensor = run(pool, row_slots, norm_weight, entry_pos, table, ratio, overlap, eps, out_dtype)
    return entries


def reference(
    pool: CachePool,
    row_slots: torch.Tensor,
    norm_weight: torch.Tensor,
    entry_pos: torch.Tensor,
    table: RopeTable,
    ratio: int,
    overlap: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute the operation's meaning in plain torch."""
    if not row_slots.shape[0]:
        return torch.empty(0, norm_weight.shape[0], dtype=out_dtype, device=row_slots.device)
    group = max(1, GATHER_BYTES // (4 * row_slots.shape[1] * pool.width))
    pooled = torch.cat([_pool_rows(pool, slots, ratio, overlap) for slots in row_slots.split(group)])  # [W, D]
    normed = rms_norm(pooled, norm_weight, eps=eps, out_dtype=torch.float32)
    return rope(normed, entry_pos, table).to(out_dtype)


def _pool_rows(pool: CachePool, row_slots: torch.Tensor, ratio: int, overlap: bool) -> torch.Tensor:
    """Return the weighted means [W, D] of the rows of each block."""
    rows = read_rows(pool, row_slots)  # [W, coff * ratio, 2 * coff * D]
    values, scores = rows.chunk(2, dim=-1)
    scores = scores.masked_fill((row_slots < 0)[..., None], -torch.inf)
    if overlap:
        values, scores = _overlapped(values, ratio), _overlapped(scores, ratio)  # [W, 2 * ratio, D]
    top = scores.amax(dim=1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0.0))
    total = sum_by_halves(weights, 1)
    return sum_by_halves(weights * values, 1) / total.masked_fill(total == 0.0, 1.0)


def _overlapped(x: torch.Tensor, ratio: int) -> torch.Tensor:
    """Return the first half of the channels for the block before and the second half for the block itself."""
    before, own = x.chunk(2, dim=-1)
    return torch.cat((before[:, :ratio], own[:, ratio:]), dim=1)
