# SPDX-License-Identifier: Apache-2.0
"""compress_kv: pool the raw rows of the blocks that a step completes, and write the entries.

Math       raw row of token t: its values, and its scores plus ape[positions[t] % ratio]; it is stored at state_slots[t]
           where entry_slots[t] is not -1, token t completes a block, and the rows i of the block are those up to t:
           with overlap the first `ratio` rows give channels [:D] and the last `ratio` rows channels [D:]
           c[t, :] = sum_i softmax_i(s_i) * v_i           for every channel on its own; a missing row has score -inf
           y[t, :] = rope(rms_norm(c[t, :]) * norm_weight, positions[t] + 1 - ratio)
           y[t, :] goes to slot entry_slots[t] of `entries`, rounded as its row format says
Addresses  rows behind token t are found by ops/row_slots.py: in `step` as far as they are of this step, else in `state`
Nobody     slots of -1 write nothing; rows before the start of the sequence are missing
Numerics   fp32 throughout, one rounding to out_dtype, then that of the row format. Sums over rows by halves, so that an
           entry's bits depend on its own rows alone. The official code rounds c to bf16 before the norm; here it stays
           fp32
Memory     entries are pooled in groups whose gathered rows take at most 64 MiB (always at least one entry)
Tolerance  verify/tolerance.py, "compress_kv": softmax over up to 128 terms in another order
Kernels    one launch: raw rows stored, entries pooled from registers; rows of the step are not read back
Source     DeepSeek-V4 technical report (arXiv 2606.19348), compressed attention; docs/numerics.md, section "Operations"
"""

from __future__ import annotations

import torch

from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.ops.check import FLOAT32, FLOATS, INT64, check
from megamoe.ops.dispatch import pick
from megamoe.ops.fixed_order import sum_by_halves
from megamoe.ops.hadamard import reference as hadamard
from megamoe.ops.read_cache import check_pool
from megamoe.ops.read_cache import reference as read_rows
from megamoe.ops.rms_norm import reference as rms_norm
from megamoe.ops.rope import RopeTable
from megamoe.ops.rope import reference as rope
from megamoe.ops.row_slots import recent_slots
from megamoe.ops.write_cache import reference as write_rows

GATHER_BYTES = 64 * 2**20
INT32: tuple[torch.dtype, ...] = (torch.int32,)


def compress_kv(
    raw: torch.Tensor,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    state: CachePool,
    step: CachePool | None,
    entries: CachePool,
    *,
    positions: torch.Tensor,
    requests: torch.Tensor,
    first_idx: torch.Tensor,
    state_tables: torch.Tensor,
    state_slots: torch.Tensor,
    entry_slots: torch.Tensor,
    table: RopeTable,
    ratio: int,
    overlap: bool,
    eps: float = 1e-6,
    out_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Store the raw rows of a step, and write the entries of the blocks that it completes.

    Args:
        raw: [T, 2 * coff * D] fp32, any row stride: coff * D values, then coff * D scores; coff is 2 with overlap,
            else 1. T may be 0.
        ape: [ratio, coff * D] fp32 or bf16, added to the scores by the place of the token in its block.
        norm_weight: [D] bf16 or fp32.
        state: FP32 rings of raw rows.
        step: FP32 raw rows of this step, row t that of token t; None where they go to `state`.
        entries: pages of entries of width D, in any row format.
        positions: [T] int64; -1 for nobody.
        requests: [T] int32, the row of the block tables of each token; -1 for nobody.
        first_idx: [T] int32, the first token of the same request in this step; read where `step` is given.
        state_tables: [R, n] int32, blocks of `state`, read modulo n.
        state_slots: [T] int64, where the raw rows go: in `step` if it is given, else in `state`; -1 for nobody.
        entry_slots: [T] int64, where the entry goes that each token completes; -1 where it completes none.
        table: the layer's rotary table.
        ratio: tokens per entry.
        overlap: the block before pools into the entry too.
        eps: of the norm.
        out_dtype: bf16 or fp32, what an entry is rounded to before its row format.

    Raises:
        TypeError: a dtype is not as above, or a pool is not a CachePool.
        ValueError: a shape does not fit, a pool of raw rows is not FP32, or a slot lies outside its pool.
    """
    check_compressor("compress_kv", raw, ape, norm_weight, state, step, entries, ratio, overlap)
    check(
        "compress_kv",
        raw=(raw, "T width"),
        positions=(positions, "T", INT64),
        requests=(requests, "T", INT32),
        first_idx=(first_idx, "T", INT32),
        state_tables=(state_tables, "R n", INT32),
        state_slots=(state_slots, "T", INT64),
        entry_slots=(entry_slots, "T", INT64),
        out_dtype=(out_dtype, FLOATS),
    )
    pick("compress_kv", raw.device, reference)(
        raw,
        ape,
        norm_weight,
        state,
        step,
        entries,
        positions,
        requests,
        first_idx,
        state_tables,
        state_slots,
        entry_slots,
        table,
        ratio,
        overlap,
        eps,
        out_dtype,
    )


def check_compressor(
    op: str,
    raw: torch.Tensor,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    state: CachePool,
    step: CachePool | None,
    entries: CachePool,
    ratio: int,
    overlap: bool,
    entries_name: str = "entries",
) -> None:
    """Refuse what does not fit together; shapes and formats only."""
    pools = {"state": state, entries_name: entries} | ({"step": step} if step is not None else {})
    for name, pool in pools.items():
        check_pool(op, name, pool)
    dims = check(
        op,
        raw=(raw, "T width", FLOAT32),
        ape=(ape, "ratio half", FLOATS),
        norm_weight=(norm_weight, "D", FLOATS),
        **{name: (pool.storage, f"{name}_blocks {name}_bytes") for name, pool in pools.items()},
    )
    half = (2 if overlap else 1) * dims["D"]
    if ratio < 1 or dims["ratio"] != ratio or dims["half"] != half or dims["width"] != 2 * half:
        raise ValueError(
            f"{op}: for D = {dims['D']}{' with overlap' if overlap else ''} raw must be [T, {2 * half}] (values, then "
            f"scores) and ape [ratio, {half}]; got {list(raw.shape)} and {list(ape.shape)} for ratio {ratio}."
        )
    for name, pool in pools.items():
        is_raw = name != entries_name
        if pool.width != (2 * half if is_raw else dims["D"]) or (is_raw and pool.row_format is not RowFormat.FP32):
            wanted = f"FP32 rows of width {2 * half}" if is_raw else f"rows of width {dims['D']}"
            raise ValueError(
                f"{op}: {name} must hold {wanted}; got {pool.row_format.name} rows of width {pool.width}. Allocate the "
                f"pools of a layer with cache.pools.allocate_layer."
            )


def reference(
    raw: torch.Tensor,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    state: CachePool,
    step: CachePool | None,
    entries: CachePool,
    positions: torch.Tensor,
    requests: torch.Tensor,
    first_idx: torch.Tensor,
    state_tables: torch.Tensor,
    state_slots: torch.Tensor,
    entry_slots: torch.Tensor,
    table: RopeTable,
    ratio: int,
    overlap: bool,
    eps: float,
    out_dtype: torch.dtype,
    rotate: bool = False,
) -> None:
    """Compute the operation's meaning in plain torch; `rotate` is what write_index_keys adds to it."""
    _store_raw_rows(raw, ape, positions, state if step is None else step, state_slots, ratio)
    done = (entry_slots >= 0).nonzero().squeeze(1)  # the tokens that complete a block
    if not done.shape[0]:
        return
    firsts = None if step is None else first_idx[done]
    num_rows = (2 if overlap else 1) * ratio
    in_state, in_step = recent_slots(
        positions[done], num_rows, requests[done], state_tables, state.rows_per_block, firsts, done
    )
    sources = [(state, in_state)]
    if step is not None and in_step is not None:
        sources.append((step, in_step))
    new = entries_of(sources, norm_weight, positions[done] + 1 - ratio, table, ratio, overlap, eps, out_dtype)
    write_rows(hadamard(new, out_dtype) if rotate else new, entries, entry_slots[done])


def _store_raw_rows(
    raw: torch.Tensor, ape: torch.Tensor, positions: torch.Tensor, pool: CachePool, slots: torch.Tensor, ratio: int
) -> None:
    """Store values and scores, with `ape` added to the scores, as FP32 rows."""
    values, scores = raw.chunk(2, dim=-1)
    write_rows(torch.cat((values, scores + ape[positions % ratio]), dim=-1), pool, slots)


def entries_of(
    sources: list[tuple[CachePool, torch.Tensor]],
    norm_weight: torch.Tensor,
    entry_pos: torch.Tensor,
    table: RopeTable,
    ratio: int,
    overlap: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Return entries [W, D] in out_dtype: pooled, normed, and rotated at the position of each block's first token.

    Args:
        sources: pools, and the slots [W, coff * ratio] in them, oldest row first; in each place at most one is not -1.
        norm_weight: [D].
        entry_pos: [W] int64.
        table: the layer's rotary table.
        ratio: tokens per entry.
        overlap: the first `ratio` rows are of the block before.
        eps: of the norm.
        out_dtype: bf16 or fp32.
    """
    if not entry_pos.shape[0]:
        return torch.empty(0, norm_weight.shape[0], dtype=out_dtype, device=entry_pos.device)
    pool, slots = sources[0]
    group = max(1, GATHER_BYTES // (4 * slots.shape[1] * pool.width))
    parts = [slice(first, first + group) for first in range(0, slots.shape[0], group)]
    pooled = torch.cat([_pool_rows([(one, at[part]) for one, at in sources], ratio, overlap) for part in parts])
    normed = rms_norm(pooled, norm_weight, eps, torch.float32)
    return rope(normed, entry_pos, table, False).to(out_dtype)


def _pool_rows(sources: list[tuple[CachePool, torch.Tensor]], ratio: int, overlap: bool) -> torch.Tensor:
    """Return the weighted means [W, D] of the rows of each block."""
    rows, is_row = _rows(sources)  # [W, coff * ratio, 2 * coff * D], [W, coff * ratio]
    values, scores = rows.chunk(2, dim=-1)
    scores = scores.masked_fill(~is_row[..., None], -torch.inf)
    if overlap:
        values, scores = _overlapped(values, ratio), _overlapped(scores, ratio)  # [W, 2 * ratio, D]
    top = scores.amax(dim=1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0.0))
    total = sum_by_halves(weights, 1)
    return sum_by_halves(weights * values, 1) / total.masked_fill(total == 0.0, 1.0)


def _rows(sources: list[tuple[CachePool, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of a place, and whether it has one."""
    (pool, slots), *others = sources
    rows, is_row = read_rows(pool, slots), slots >= 0
    for pool, slots in others:
        here = slots >= 0
        rows, is_row = torch.where(here[..., None], read_rows(pool, slots), rows), is_row | here
    return rows, is_row


def _overlapped(x: torch.Tensor, ratio: int) -> torch.Tensor:
    """Return the first half of the channels for the block before and the second half for the block itself."""
    before, own = x.chunk(2, dim=-1)
    return torch.cat((before[:, :ratio], own[:, ratio:]), dim=1)
