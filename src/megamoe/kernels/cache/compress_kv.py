# SPDX-License-Identifier: Apache-2.0
"""compress_kv: the launch of cache/compress.py.

Meaning    ops/compress_kv.py; everything else as in cache/compress.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.kernels.cache.compress import compress, tokens_of_block
from megamoe.kernels.cache.compress_config import Config
from megamoe.kernels.parts.records import RopeTable


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    ratio, overlap = dims["ratio"], dims["coff"] == 2
    for tokens in sorted({tokens_of_block(ratio, many) for many in (False, True)}):
        yield Config(dims["D"], ratio, overlap, 64, "f32", "bf16", True, "fp8_rope_bf16", False, tokens)


def run(
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
) -> None:
    """Compute compress_kv."""
    where = (positions, requests, first_idx, state_tables, state_slots, entry_slots)
    pools = (state, step, entries)
    compress("compress_kv", raw, ape, norm_weight, *pools, *where, table, ratio, overlap, eps, out_dtype, False)
