# SPDX-License-Identifier: Apache-2.0
"""write_latent: the latent row normed, rotated, rounded and stored, the query latent normed; one launch.

Meaning    ops/write_latent.py; this file only makes it fast
Grid       blocks of 128 threads: the first ones have latent rows, the others query latents; a row in one warp or less
Memory     16-byte loads; stores of 8 to 16 bytes, a scale byte per group
Limits     C a multiple of 64 up to 512, Q one of 8 up to 4096, R one of 8; pages at multiples of 16 bytes; slots below
           2^31
Bound      memory: C values read and a row of the pool written; Q values read and written
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.kernels.cache.write_latent_config import Config
from megamoe.kernels.parts.launch import DTYPE_NAMES, as_rows, as_vector
from megamoe.kernels.parts.pool import ROW_NAMES, as_pool
from megamoe.kernels.parts.records import RopeTable
from megamoe.kernels.store import kernel

MAX_LATENT_WIDTH = 512
MAX_QUERY_WIDTH = 4096


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    query = (dims["Q"], "bf16", "bf16") if "Q" in dims else (None, None, None)
    yield Config(dims["C"], dims["R"], "bf16", "bf16", "fp8_rope_bf16", *query)


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
    y = None if query_latent is None else torch.empty(query_latent.shape, dtype=query_latent.dtype, device=kv.device)
    if not kv.shape[0]:
        return y
    width, query_width = kv.shape[1], 0 if query_latent is None else query_latent.shape[1]
    if width % 64 or width > MAX_LATENT_WIDTH or query_width % 8 or query_width > MAX_QUERY_WIDTH or table.rope_dim % 8:
        raise NotImplementedError(
            f"write_latent: the kernel takes latents of a multiple of 64 up to {MAX_LATENT_WIDTH} channels, of which a "
            f"multiple of 8 rotate, and query latents of a multiple of 8 up to {MAX_QUERY_WIDTH}; got {width}, "
            f'{table.rope_dim} and {query_width}. Run the reference: with megamoe.ops.use("reference").'
        )
    names = (DTYPE_NAMES[kv.dtype], DTYPE_NAMES[kv_norm.dtype], ROW_NAMES[pool.row_format])
    latent = (
        as_rows(kv),
        as_vector(kv_norm),
        as_pool("write_latent", "pool", pool),
        slots,
        pos,
        as_vector(table.inv_freq),
        pool.rows_per_block,
        eps,
    )
    if query_latent is None or q_norm is None or y is None:
        kernel(Config(width, table.rope_dim, *names, None, None, None), kv.device)(*latent)
        return None
    query = (query_width, DTYPE_NAMES[query_latent.dtype], DTYPE_NAMES[q_norm.dtype])
    launch = kernel(Config(width, table.rope_dim, *names, *query), kv.device)
    launch(as_rows(query_latent), as_vector(q_norm), y, *latent)
    return y
