# SPDX-License-Identifier: Apache-2.0
"""sparse_attention: rows fetched once a token and block of heads, converted to fp16, multiplied on the matrix unit.

Meaning    ops/sparse_attention.py; this file only makes it fast. docs/kernels-attention.md draws it
Grid       a token, up to 64 heads, a range of items a block
Launches   one; for few tokens two: items are shared out in ranges of fixed size, and a second kernel joins them
Order      sums go over tiles of 64 columns in their order; of few tokens over the tiles of a range, then over ranges.
           So the number of tokens chooses between two orders (FEW_TOKENS), and nothing else does
Memory     16-byte loads of rows, a tile ahead of the products
Limits     rows FP8_ROPE_BF16 of 512 values, pages at multiples of 16 bytes; q bf16, fp16 operands, up to 128 heads
Bound      memory for the rows, or the matrix unit: 4 H 512 operations an item
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.kernels.attention.combine_splits_config import Config as CombineConfig
from megamoe.kernels.attention.sparse_attention_config import TILE, WIDTH, Config
from megamoe.kernels.parts.launch import as_heads, as_vector
from megamoe.kernels.parts.pool import as_pool
from megamoe.kernels.parts.records import RopeTable
from megamoe.kernels.store import kernel

FEW_TOKENS = 32
"""Up to so many tokens the items of a token are shared out."""
SPLIT_TILES = {"none": 1, "list": 2, "all": 4}
"""Tiles of a range, by how a token's entries are named."""


def configs(dims: Mapping[str, int]) -> Iterator[Any]:
    """Yield what a model needs for one entry of its shape table."""
    kinds = ("none",) if not dims["J"] else ("list", "all")
    for kind in kinds:
        yield CombineConfig(dims["H"], 64, kind)
        for has_step in (False, True):
            for split in (False, True):
                yield Config(dims["H"], 64, kind, has_step, split)


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
    pools = [pool for pool in (window, step, entries) if pool is not None]
    if (
        width != WIDTH
        or q.dtype != torch.bfloat16
        or out_dtype != torch.bfloat16
        or operand_dtype != torch.float16
        or any(pool.row_format is not RowFormat.FP8_ROPE_BF16 for pool in pools)
    ):
        raise NotImplementedError(
            "sparse_attention: the kernel takes bf16 queries of 512 channels, fp16 operands and FP8_ROPE_BF16 rows; "
            f"got {q.dtype} [{width}], {operand_dtype}, output {out_dtype} and rows "
            f"{', '.join(pool.row_format.name for pool in pools)}. Run the reference: "
            'with megamoe.ops.use("reference").'
        )
    y = torch.empty((num_tokens, heads, width), dtype=out_dtype, device=q.device)
    if y.numel() == 0:
        return y
    kind = "none" if entries is None else ("all" if entry_idx is None else "list")
    is_split = num_tokens <= FEW_TOKENS
    num_entries = 0
    if kind == "list":
        assert entry_idx is not None
        num_entries = entry_idx.shape[1]
    elif kind == "all":
        assert entry_tables is not None and entries is not None
        num_entries = entry_tables.shape[1] * entries.rows_per_block
    num_tiles = -(-window_size // TILE) + -(-num_entries // TILE)
    split_tiles = SPLIT_TILES[kind]
    num_splits = max(1, -(-num_tiles // split_tiles)) if is_split else 1
    if is_split:
        parts = torch.empty(num_tokens * num_splits * heads * width, dtype=torch.float32, device=q.device)
        stats = torch.empty(num_tokens * num_splits * heads * 2, dtype=torch.float32, device=q.device)
    else:
        parts = stats = torch.empty(4, dtype=torch.float32, device=q.device)
    into = parts.view(torch.uint8) if is_split else y.view(-1).view(torch.uint8)
    some = window_tables  # stands for what this layer does not have, and is not read
    visible = requests if num_visible is None else num_visible
    sink, inv_freq = as_vector(sink), as_vector(table.inv_freq)
    kernel(Config(heads, table.rope_dim, kind, step is not None, is_split), q.device)(
        as_heads(q),
        sink,
        inv_freq,
        positions,
        window_ends,
        requests,
        first_idx,
        visible,
        window_tables,
        some if entry_tables is None else entry_tables,
        requests[:, None] if entry_idx is None else entry_idx,
        as_pool("sparse_attention", "window", window),
        as_pool("sparse_attention", "step", window if step is None else step),
        as_pool("sparse_attention", "entries", window if entries is None else entries),
        into,
        stats,
        window_size,
        window.rows_per_block,
        1 if step is None else step.rows_per_block,
        1 if entries is None else entries.rows_per_block,
        split_tiles,
        num_splits,
        scale,
    )
    if is_split:
        kernel(CombineConfig(heads, table.rope_dim, kind), q.device)(
            parts,
            stats,
            sink,
            inv_freq,
            positions,
            requests,
            visible,
            y.view(-1).view(torch.uint8),
            window_size,
            num_entries,
            split_tiles,
            num_splits,
        )
    return y
