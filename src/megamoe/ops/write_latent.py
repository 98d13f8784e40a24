# SPDX-License-Identifier: Apache-2.0
"""write_latent: what follows the first projection of an attention layer: norm the query latent, store the latent row.

Math       y[t, :] = rms_norm(query_latent[t, :], q_norm)
           row slots[t] of the pool = encode(rope(rms_norm(kv[t, :], kv_norm), pos[t]))     nothing where slots[t] is -1
Numerics   those of ops/rms_norm.py, ops/rope.py and ops/write_cache.py: every result is rounded to the dtype of its
           input in between. Bit for bit their composition. Row-invariant.
Tolerance  verify/tolerance.py, "write_latent"
Kernels    one launch for rows and queries, each row in one warp or less
Source     DeepSeek-V4 reference code; the operations named above
"""

from __future__ import annotations

import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.ops import rms_norm, rope, write_cache
from megamoe.ops.check import FLOATS, INT64, check
from megamoe.ops.dispatch import pick
from megamoe.ops.read_cache import check_pool
from megamoe.ops.rope import RopeTable


def write_latent(
    query_latent: torch.Tensor | None,
    kv: torch.Tensor,
    q_norm: torch.Tensor | None,
    kv_norm: torch.Tensor,
    pool: CachePool,
    slots: torch.Tensor,
    pos: torch.Tensor,
    table: RopeTable,
    *,
    eps: float = 1e-6,
) -> torch.Tensor | None:
    """Norm the query latent; norm, rotate and store the latent rows, in place.

    Args:
        query_latent: [T, Q] bf16 or fp32, or None where there are rows and no queries. Both inputs may lie at any
            stride, as the columns of a stacked linear do. T may be 0.
        kv: [T, C] bf16 or fp32, key and value at once.
        q_norm: [Q] bf16 or fp32; given exactly when query_latent is.
        kv_norm: [C] bf16 or fp32.
        pool: where the rows go; its bytes outside the named slots are untouched.
        slots: [T] int64, distinct slot numbers; -1 skips the row.
        pos: [T] int64, absolute positions; -1 for a token that is nobody's, whose slot is -1.
        table: frequencies; R must not exceed C.
        eps: added to both means of squares.

    Returns:
        [T, Q] in the dtype of query_latent, contiguous, newly allocated; None without query_latent.

    Raises:
        TypeError: a dtype is not as above, or pool is not a CachePool.
        ValueError: a shape does not fit, one of query_latent and q_norm is missing, or (on the CPU) a slot is not in
            -1 .. num_slots - 1 or appears twice.
        NotImplementedError: the device has no kernel for this operation.
    """
    check_pool("write_latent", "pool", pool)
    dims = check(
        "write_latent",
        query_latent=(query_latent, "?T Q", FLOATS),
        kv=(kv, "T C", FLOATS),
        q_norm=(q_norm, "?Q", FLOATS),
        kv_norm=(kv_norm, "C", FLOATS),
        slots=(slots, "T", INT64),
        pos=(pos, "T", INT64),
        table=(table.inv_freq, "P"),
        storage=(pool.storage, "N B"),
    )
    if (query_latent is None) != (q_norm is None):
        raise ValueError(
            "write_latent: query_latent and q_norm go together; got one of them. Pass both, or None for both."
        )
    if dims["C"] != pool.width or dims["C"] < table.rope_dim:
        raise ValueError(
            f"write_latent: kv must be [T, {pool.width}] for this pool, with at least the {table.rope_dim} channels of "
            f"the table; got {list(kv.shape)}. A pool's width is fixed when it is allocated."
        )
    run = pick("write_latent", kv.device, reference)
    y: torch.Tensor | None = run(query_latent, kv, q_norm, kv_norm, pool, slots, pos, table, eps)
    return y


def reference(
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
    """Compute write_latent in plain torch."""
    rows = rope.reference(rms_norm.reference(kv, kv_norm, eps, kv.dtype), pos, table, False)
    write_cache.reference(rows, pool, slots)
    if query_latent is None:
        return None
    return rms_norm.reference(query_latent, q_norm, eps, query_latent.dtype)
