# SPDX-License-Identifier: Apache-2.0
"""write_index_keys: compress_kv for the keys of the indexer, which may be rotated by Hadamard before they are rounded.

Math       ops/compress_kv.py, with overlap; the key is hadamard(y[t, :]) where `rotate` is set, else y[t, :]
Numerics   as there: y is rounded to out_dtype, the rotation is fp32 and rounds to out_dtype, then the row format rounds
Tolerance  verify/tolerance.py, "compress_kv"
Kernels    that of compress_kv; the rotation is done in registers
Source     DeepSeek-V4 technical report (arXiv 2606.19348), lightning indexer; docs/numerics.md, section "Operations"
"""

from __future__ import annotations

import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.ops.check import FLOATS, INT64, check
from megamoe.ops.compress_kv import INT32, check_compressor
from megamoe.ops.compress_kv import reference as write_entries
from megamoe.ops.dispatch import pick
from megamoe.ops.rope import RopeTable


def write_index_keys(
    raw: torch.Tensor,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    state: CachePool,
    step: CachePool | None,
    keys: CachePool,
    *,
    positions: torch.Tensor,
    requests: torch.Tensor,
    first_idx: torch.Tensor,
    state_tables: torch.Tensor,
    state_slots: torch.Tensor,
    key_slots: torch.Tensor,
    table: RopeTable,
    ratio: int,
    rotate: bool,
    eps: float = 1e-6,
    out_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Store the raw rows of a step's index compressor, and write the index keys of the blocks that it completes.

    Arguments and errors are those of `compress_kv` with overlap; `keys` is the pool of index keys, `key_slots` where
    they go, and `rotate` says whether a key is multiplied by the Hadamard matrix before it is rounded.
    """
    check_compressor("write_index_keys", raw, ape, norm_weight, state, step, keys, ratio, True, "keys")
    check(
        "write_index_keys",
        raw=(raw, "T width"),
        positions=(positions, "T", INT64),
        requests=(requests, "T", INT32),
        first_idx=(first_idx, "T", INT32),
        state_tables=(state_tables, "R n", INT32),
        state_slots=(state_slots, "T", INT64),
        key_slots=(key_slots, "T", INT64),
        out_dtype=(out_dtype, FLOATS),
    )
    pick("write_index_keys", raw.device, reference)(
        raw,
        ape,
        norm_weight,
        state,
        step,
        keys,
        positions,
        requests,
        first_idx,
        state_tables,
        state_slots,
        key_slots,
        table,
        ratio,
        rotate,
        eps,
        out_dtype,
    )


def reference(
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
    """Compute the operation's meaning in plain torch."""
    where = (positions, requests, first_idx, state_tables, state_slots, key_slots)
    write_entries(raw, ape, norm_weight, state, step, keys, *where, table, ratio, True, eps, out_dtype, rotate)
