# SPDX-License-Identifier: Apache-2.0
"""write_latent: a latent row normed, rotated, rounded and stored in one pass; the query latent normed.

Meaning    ops/write_latent.py; this file only makes it fast
Launches   two, or one without a query latent
Grid       128 threads for several rows (parts/rows.py)
Memory     16-byte loads; stores of 8 to 16 bytes, a scale byte per group
Limits     C a multiple of 64 up to 512, R one of 8; pages at multiples of 16 bytes
Bound      memory: C values read, a row of the pool written
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.kernels.cache.write_latent_config import Config
from megamoe.kernels.parts.launch import DTYPE_NAMES, as_rows, as_vector, require_width
from megamoe.kernels.parts.pool import ROW_NAMES, as_pool
from megamoe.kernels.rows import rms_norm
from megamoe.kernels.store import kernel
from megamoe.ops.rope import RopeTable


def configs(dims: Mapping[str, int]) -> Iterator[Any]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config(dims["C"], dims["R"], "bf16", "bf16", "fp8_rope_bf16")
    if "Q" in dims:
        yield from rms_norm.configs({"K": dims["Q"]})


def run(
    query_latent: torch.Tensor | None,
    kv: torch.Tensor,
    q_norm: torch.Tensor | None,
    kv_norm: torch.Tensor,
    pool: CachePool,
    slots: torch.Tensor,
    pos: torch.Tensor,
    table: RopeTable,
    eps: float,
) -> torch.Tensor | None:
    """Compute write_latent."""
    if kv.shape[0]:
        width = kv.shape[1]
        require_width("write_latent", width, 64)
        names = (DTYPE_NAMES[kv.dtype], DTYPE_NAMES[kv_norm.dtype], ROW_NAMES[pool.row_format])
        launch = kernel(Config(width, table.rope_dim, *names), kv.device)
        storage = as_pool("write_latent", "pool", pool)
        inv_freq, weight = as_vector(table.inv_freq), as_vector(kv_norm)
        launch(as_rows(kv), weight, storage, slots, pos, inv_freq, pool.rows_per_block, eps)
    if query_latent is None:
        return None
    return rms_norm.run(query_latent, q_norm, eps, query_latent.dtype)
