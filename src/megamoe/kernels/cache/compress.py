# SPDX-License-Identifier: Apache-2.0
"""What compress_kv and write_index_keys launch: the one kernel of both.

Meaning    ops/compress_kv.py, ops/write_index_keys.py; this file only makes them fast
Grid       one block a token: it stores the token's raw row and, if the token completes a block of tokens, its entry;
           from MANY_TOKENS on 8 tokens a block (ratio 128), which keep more rows on their way
Memory     16-byte loads. Rows of this step are read from the argument and not from where they are being stored, so that
           no block waits for another; older ones from the rings. A thread has four rows' loads in flight
Order      sums over rows go in the order of rows, in 2 parts of 4 rows (ratio 4) or 4 of 32 (ratio 128) that are joined
           in their order: bits depend on an entry's rows alone
Nobody     slots of -1, and rows before the start of a sequence, touch no memory
Limits     D 128 or 512, R a multiple of 8; pages at multiples of 16 bytes; slots below 2^31
Bound      memory: the raw rows of an entry, its bytes, and each raw row twice
"""

from __future__ import annotations

import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.kernels.cache.compress_config import Config
from megamoe.kernels.parts.launch import DTYPE_NAMES, as_rows, as_vector
from megamoe.kernels.parts.pool import ROW_NAMES, as_pool
from megamoe.kernels.parts.records import RopeTable
from megamoe.kernels.store import kernel

WIDTHS = (128, 512)
MANY_TOKENS = 512
"""From so many tokens on a block may go through several: the bits are the same."""
FEW_ROWS = 8
"""Up to so many tokens an entry a block has one token: of several that complete one, each would wait for the other."""


def tokens_of_block(ratio: int, many: bool) -> int:
    """Return how many tokens a block goes through."""
    return 8 if many and ratio > FEW_ROWS else 1


def compress(
    op: str,
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
    rotate: bool,
) -> None:
    """Store raw rows and write entries; arguments as those of the operations."""
    width = norm_weight.shape[0]
    if width not in WIDTHS:
        raise NotImplementedError(
            f"{op}: the kernel takes entries of {' or '.join(map(str, WIDTHS))} values; got {width}. Run the "
            'reference: with megamoe.ops.use("reference").'
        )
    if not raw.shape[0]:
        return
    names = (DTYPE_NAMES[ape.dtype], DTYPE_NAMES[norm_weight.dtype])
    is_rounded = out_dtype == torch.bfloat16
    row_format = ROW_NAMES[entries.row_format]
    tokens = tokens_of_block(ratio, raw.shape[0] >= MANY_TOKENS)
    config = Config(width, ratio, overlap, table.rope_dim, *names, is_rounded, row_format, rotate, tokens)
    into = state if step is None else step
    kernel(config, raw.device)(
        as_rows(raw),
        as_rows(ape),
        as_vector(norm_weight),
        as_pool(op, "state", state),
        as_pool(op, "state or step", into),
        as_pool(op, "entries", entries),
        positions,
        requests,
        first_idx,
        state_tables,
        state_slots,
        entry_slots,
        as_vector(table.inv_freq),
        state.rows_per_block,
        into.rows_per_block,
        entries.rows_per_block,
        0 if step is None else 1,
        eps,
    )
