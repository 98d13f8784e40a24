# SPDX-License-Identifier: Apache-2.0
"""What the kernels that write rows into caches are timed against: the same work in torch, operation by operation.

Slots of -1 are the last row here: to leave them out would take a synchronization. Nobody's rows are worked out, too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megamoe.formats.cache_rows import FP8_GROUP, ROPE_WIDTH, CachePool, RowFormat
from megamoe.ops.hadamard import reference as hadamard
from megamoe.ops.read_cache import as_bytes, as_words, row_views
from megamoe.ops.rope import RopeTable


def _encode(x: torch.Tensor, row_format: RowFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Return data and scales of rows as bytes."""
    x = x.float()
    if row_format is RowFormat.FP32:
        return x.view(torch.uint8), x.new_empty((x.shape[0], 0), dtype=torch.uint8)
    if row_format is RowFormat.FP8_ROPE_BF16:
        groups = x[:, :-ROPE_WIDTH].unflatten(-1, (-1, FP8_GROUP))
        exponent = torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448.0))
        codes = (groups / torch.exp2(exponent)).to(torch.float8_e4m3fn).flatten(1).view(torch.uint8)
        data = torch.cat((codes, x[:, -ROPE_WIDTH:].bfloat16().view(torch.uint8)), dim=1)
        return data, F.pad((exponent.squeeze(-1) + 127.0).to(torch.uint8), (0, 1))
    if row_format is RowFormat.INDEX_FP8:
        scale = torch.exp2(torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448.0)))
        return (x / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale.view(torch.uint8)
    groups = x.unflatten(-1, (-1, 32))
    exponent = torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 6.0))
    quotient = groups / torch.exp2(exponent)
    steps = torch.linspace(0.0, 7.0, 8, device=x.device)
    thresholds = torch.where(steps < 4.0, steps / 2.0 + 0.25, torch.where(steps < 6.0, steps - 1.5, 5.0))[:7]
    codes = torch.bucketize(quotient.abs(), thresholds).to(torch.uint8) | (quotient.signbit().to(torch.uint8) << 3)
    pairs = codes.flatten(1).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4), (exponent.squeeze(-1) + 127.0).to(torch.uint8)


def _write(x: torch.Tensor, pool: CachePool, slots: torch.Tensor) -> None:
    block, row = slots // pool.rows_per_block, slots % pool.rows_per_block
    for section, values in zip(row_views(pool), _encode(x, pool.row_format), strict=True):
        if section.shape[-1]:
            section[block, row] = as_words(values.contiguous(), section.dtype)


def _rotated(x: torch.Tensor, pos: torch.Tensor, table: RopeTable) -> torch.Tensor:
    plain, pairs = x[:, : -table.rope_dim], x[:, -table.rope_dim :].unflatten(-1, (-1, 2))
    angles = pos.float()[:, None] * table.inv_freq
    cos, sin = angles.cos(), angles.sin()
    even, odd = pairs.unbind(-1)
    return torch.cat((plain, torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(1)), dim=1)


def write_latent(
    query_latent: torch.Tensor | None,
    kv: torch.Tensor,
    q_norm: torch.Tensor | None,
    kv_norm: torch.Tensor,
    pool: CachePool,
    slots: torch.Tensor,
    pos: torch.Tensor,
    table: RopeTable,
) -> torch.Tensor | None:
    """Norm, rotate, round and scatter."""
    rows = F.rms_norm(kv, kv_norm.shape, kv_norm.to(kv.dtype), 1e-6)
    _write(_rotated(rows.float(), pos, table).to(kv.dtype), pool, slots)
    if query_latent is None or q_norm is None:
        return None
    return F.rms_norm(query_latent, q_norm.shape, q_norm.to(query_latent.dtype), 1e-6)


def compress(
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
    out_dtype: torch.dtype,
    rotate: bool = False,
) -> None:
    """Store raw rows in rings, gather those of every token and pool them; rows before the first are slot 0's."""
    values, scores = raw.chunk(2, dim=-1)
    _write(torch.cat((values, scores + ape[positions % ratio]), dim=-1), state, state_slots)
    num_rows, size = (2 if overlap else 1) * ratio, state.rows_per_block
    row = (positions[:, None] - torch.arange(num_rows - 1, -1, -1, device=raw.device)).clamp(min=0)
    slots = state_tables[requests[:, None], row // size % state_tables.shape[1]].long() * size + row % size
    gathered = as_bytes(row_views(state)[0][slots // size, slots % size]).view(torch.float32)  # [T, rows, width]
    values, scores = gathered.chunk(2, dim=-1)
    if overlap:
        half = values.shape[-1] // 2
        values, scores = (torch.cat((one[:, :ratio, :half], one[:, ratio:, half:]), dim=1) for one in (values, scores))
    pooled = (scores.softmax(1) * values).sum(1)
    normed = F.rms_norm(pooled, norm_weight.shape, norm_weight.float(), 1e-6)
    new = _rotated(normed, positions + 1 - ratio, table).to(out_dtype)
    _write(hadamard(new, out_dtype) if rotate else new, entries, entry_slots)


def write_index_keys(*, keys: CachePool, key_slots: torch.Tensor, rotate: bool, **arguments: object) -> None:
    """Pool with overlap, and rotate."""
    given: dict[str, object] = {**arguments, "entries": keys, "entry_slots": key_slots, "overlap": True}
    compress(**given, rotate=rotate)  # type: ignore[arg-type]
