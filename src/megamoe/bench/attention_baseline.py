# SPDX-License-Identifier: Apache-2.0
"""What sparse_attention is timed against: rows gathered and decoded by torch, two bf16 products and a softmax."""

from __future__ import annotations

import torch

from megamoe.formats.cache_rows import FP8_GROUP, ROPE_WIDTH, CachePool
from megamoe.ops.rope import RopeTable


def _slots(rows: torch.Tensor, requests: torch.Tensor, tables: torch.Tensor, rows_per_block: int) -> torch.Tensor:
    known, own = rows.clamp(min=0).long(), requests.clamp(min=0).long()[:, None]
    blocks = tables[own, known // rows_per_block % tables.shape[1]].long()
    return torch.where((rows >= 0) & (requests >= 0)[:, None], blocks * rows_per_block + known % rows_per_block, -1)


def _rows(pool: CachePool, slots: torch.Tensor) -> torch.Tensor:
    """Return rows [..., 512] bf16 of FP8_ROPE_BF16 slots; those of -1 are of slot 0, to be masked."""
    block, row = slots.clamp(min=0) // pool.rows_per_block, slots.clamp(min=0) % pool.rows_per_block
    data, scales = pool.data_rows[block, row], pool.scale_rows[block, row]
    codes = data[..., : -2 * ROPE_WIDTH].view(torch.float8_e4m3fn).bfloat16().unflatten(-1, (-1, FP8_GROUP))
    latent = codes * torch.exp2(scales[..., :-1].float() - 127.0).bfloat16()[..., None]
    return torch.cat((latent.flatten(-2), data[..., -2 * ROPE_WIDTH :].contiguous().view(torch.bfloat16)), dim=-1)


def sparse_attention(
    q: torch.Tensor,
    window: CachePool,
    entries: CachePool | None,
    sink: torch.Tensor,
    positions: torch.Tensor,
    requests: torch.Tensor,
    first_idx: torch.Tensor,
    window_size: int,
    window_tables: torch.Tensor,
    step: CachePool | None,
    entry_tables: torch.Tensor | None,
    entry_idx: torch.Tensor | None,
    num_visible: torch.Tensor | None,
    table: RopeTable,
    scale: float,
    operand_dtype: torch.dtype,
) -> torch.Tensor:
    """Attend and rotate back."""
    back = torch.arange(window_size - 1, -1, -1, device=q.device)
    newest = positions[:, None] - back
    slots = _slots(newest, requests, window_tables, window.rows_per_block)
    rows, is_item = _rows(window, slots), slots >= 0
    if step is not None:
        token = torch.arange(q.shape[0], device=q.device)[:, None] - back
        is_new = (token >= first_idx[:, None]) & (newest >= 0) & (requests >= 0)[:, None]
        rows = torch.where(is_new[..., None], _rows(step, token), rows)
    if entries is not None and entry_tables is not None and num_visible is not None:
        if entry_idx is None:
            numbers = torch.arange(entry_tables.shape[1] * entries.rows_per_block, device=q.device)
            entry_idx = torch.where(numbers < num_visible[:, None], numbers, -1)
        chosen = _slots(entry_idx, requests, entry_tables, entries.rows_per_block)
        rows, is_item = torch.cat((rows, _rows(entries, chosen)), dim=1), torch.cat((is_item, chosen >= 0), dim=1)
    logits = torch.matmul(q, rows.mT).float() * scale  # [T, H, J]
    logits = logits.masked_fill(~is_item[:, None], -torch.inf)
    weights = torch.cat((logits, sink[None, :, None].expand(q.shape[0], -1, 1)), dim=-1).softmax(-1)[..., :-1]
    o = torch.matmul(weights.to(q.dtype), rows)
    plain, pairs = o[..., : -table.rope_dim], o[..., -table.rope_dim :].float().unflatten(-1, (-1, 2))
    angles = (positions.float()[:, None] * table.inv_freq)[:, None]
    cos, sin = angles.cos(), angles.sin()
    even, odd = pairs.unbind(-1)
    turned = torch.stack((even * cos + odd * sin, odd * cos - even * sin), dim=-1).flatten(-2)
    return torch.cat((plain, turned.to(q.dtype)), dim=-1)
