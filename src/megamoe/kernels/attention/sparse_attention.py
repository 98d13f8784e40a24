# SPDX-License-Identifier: Apache-2.0
"""sparse_attention: rows gathered into fp16 tiles, scores and values on the matrix unit.

Meaning    ops/sparse_attention.py; this file only makes it fast. docs/kernels-attention.md draws it
Few tokens the tiles of 64 items of a token are cut into up to 6 ranges, more than 32 tiles into up to 16; fp32 sums of
           the ranges are added in the order of items by a second launch (attention_combine_device.py)
Many       one launch: a thread block goes over all items of up to 64 heads and writes the result
Order      the ranges follow from the token's own number of items, so its bits depend on no other token; the two ways
           add in different orders
Memory     a row is read once for 64 heads, by 16-byte loads, while the tile before is multiplied
Limits     operand_dtype fp16, C 512, R a multiple of 8 up to 64, FP8_ROPE_BF16 rows, pages at multiples of 16 bytes
Bound      many items: the matrix unit; few: the latency of a gathered row
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.kernels.attention import attention_combine_config, attention_tiles_config, attention_tiles_sm90_config
from megamoe.kernels.attention.attention_tiles_config import TILE_ITEMS
from megamoe.kernels.parts.launch import DTYPE_NAMES, as_heads, as_vector
from megamoe.kernels.parts.pool import as_pool
from megamoe.kernels.parts.records import RopeTable
from megamoe.kernels.store import architecture_of, kernel

OP = "sparse_attention"
WIDTH = 512
MAX_ROPE = 64
FEW_BLOCKS = 22  # tokens times blocks of 64 heads
MANY_TILES = 32
SPLITS = (6, 16)  # ranges up to so many tiles, and beyond
FEW_HEADS = 32  # which wgmma would multiply as 64


def configs(dims: Mapping[str, int]) -> Iterator[Any]:
    """Yield what a model needs for one entry of its shape table."""
    heads, rope = dims["H"], dims.get("R", MAX_ROPE)
    for out in ("bf16", "partial"):
        yield attention_tiles_config.Config(heads, dims["C"], rope, "bf16", out)
        if heads > FEW_HEADS:
            yield attention_tiles_sm90_config.Config(heads, dims["C"], rope, "bf16", out)
    yield attention_combine_config.Config(heads, dims["C"], rope, "bf16")


def few_tokens(num_heads: int) -> int:
    """Return up to how many tokens items are cut into ranges."""
    return max(1, FEW_BLOCKS // -(-num_heads // attention_tiles_config.MAX_ROWS))


def num_splits(num_tiles: int) -> int:
    """Return into how many ranges the tiles of a token are cut at most."""
    share = -(-num_tiles // SPLITS[num_tiles > MANY_TILES])
    return -(-num_tiles // max(share, 1)) or 1


def run(
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
    window_ends: torch.Tensor,
    out_dtype: torch.dtype,
    operand_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute sparse_attention."""
    num_tokens, heads, width = q.shape
    _require(q, (("window", window), ("step", step), ("entries", entries)), table, operand_dtype)
    out = torch.empty((num_tokens, heads, width), dtype=out_dtype, device=q.device)
    if out.numel() == 0:
        return out
    of_step, of_entries = window if step is None else step, window if entries is None else entries
    entry_tables = window_tables if entry_tables is None else entry_tables
    num_visible = requests if num_visible is None else num_visible
    num_tiles = -(-window_size // TILE_ITEMS)
    if entries is not None:
        room = entry_tables.shape[1] * entries.rows_per_block if entry_idx is None else entry_idx.shape[1]
        num_tiles += -(-room // TILE_ITEMS)
    splits = num_splits(num_tiles) if num_tokens <= few_tokens(heads) else 1
    name, inv_freq, sink = DTYPE_NAMES[out_dtype], as_vector(table.inv_freq), as_vector(sink)
    target = out
    if splits > 1:
        target = torch.empty((num_tokens, splits, heads, width), dtype=torch.float32, device=q.device)
    stats = torch.empty((num_tokens, splits, heads, 2), dtype=torch.float32, device=q.device)
    key = (heads, width, table.rope_dim, DTYPE_NAMES[q.dtype], "partial" if splits > 1 else name)
    is_sm90 = heads > FEW_HEADS and architecture_of(q.device) == "sm90"
    tiles = attention_tiles_sm90_config.Config(*key) if is_sm90 else attention_tiles_config.Config(*key)
    kernel(tiles, q.device)(
        as_heads(q),
        as_pool(OP, "window", window),
        as_pool(OP, "step", of_step),
        as_pool(OP, "entries", of_entries),
        sink,
        positions,
        window_ends,
        requests,
        first_idx,
        window_tables,
        entry_tables,
        requests[:, None] if entry_idx is None else entry_idx,
        num_visible,
        inv_freq,
        target,
        stats,
        window.rows_per_block,
        of_step.rows_per_block,
        of_entries.rows_per_block,
        window_size,
        int(step is not None),
        int(entries is not None),
        int(entry_idx is not None),
        splits,
        scale,
    )
    if splits > 1:
        combine = attention_combine_config.Config(heads, width, table.rope_dim, name)
        kernel(combine, q.device)(target, stats, sink, positions, inv_freq, out.view(-1, width))
    return out


def _require(
    q: torch.Tensor, pools: tuple[tuple[str, CachePool | None], ...], table: RopeTable, operand_dtype: torch.dtype
) -> None:
    """Refuse what there is no kernel for."""
    reference = 'run the reference: with megamoe.ops.use("reference").'
    if operand_dtype != torch.float16:
        raise NotImplementedError(
            f"{OP}: the kernel multiplies fp16; got operand_dtype {operand_dtype}. Take a recipe with fp16 attention "
            f"(w4a16, w4a4), or {reference}"
        )
    if q.shape[2] != WIDTH or table.rope_dim > MAX_ROPE or table.rope_dim % 8:
        raise NotImplementedError(
            f"{OP}: the kernel takes C = {WIDTH} and a rotary table of a multiple of 8 channels up to {MAX_ROPE}; got "
            f"{q.shape[2]} and {table.rope_dim}. Run another head size with the reference: "
            'with megamoe.ops.use("reference").'
        )
    for name, pool in pools:
        if pool is not None and pool.row_format is not RowFormat.FP8_ROPE_BF16:
            raise NotImplementedError(
                f"{OP}: the kernel takes FP8_ROPE_BF16 rows; got {pool.row_format.name} in {name}. Store rows in that "
                f"format, or {reference}"
            )
