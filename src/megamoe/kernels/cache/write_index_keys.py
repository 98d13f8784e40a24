# SPDX-License-Identifier: Apache-2.0
"""write_index_keys: the launch of cache/compress.py, which rotates what it has in registers.

Meaning    ops/write_index_keys.py; everything else as in cache/compress.py
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
    for tokens in sorted({tokens_of_block(dims["ratio"], many) for many in (False, True)}):
        yield Config(dims["D"], dims["ratio"], True, 64, "f32", "bf16", True, "index_fp4", True, tokens)


def run(
    raw: torch.Tensor,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    state: CachePool,
    step: CachePool | None,
    keys: CachePool,
    positions: torch.Tensor,
    requests: torch.Tensor,
    first_idx: torch.Tensor,
    state_tables: torch.Tensor,
    state_slots: torch.Tensor,
    key_slots: torch.Tensor,
    table: RopeTable,
    ratio: int,
    rotate: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> None:
    """Compute write_index_keys."""
    where = (positions, requests, first_idx, state_tables, state_slots, key_slots)
    pools = (state, step, keys)
    compress("write_index_keys", raw, ape, norm_weight, *pools, *where, table, ratio, True, eps, out_dtype, rotate)
