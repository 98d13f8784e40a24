# SPDX-License-Identifier: Apache-2.0
"""Scores of all visible entries, the first of the two kernels behind index_topk.

Grid       `splits` blocks a token, each takes every splits-th tile of 128 entries; a warp 16 entries at a time
Memory     the query is in registers; keys go through a ring of each warp, three tiles ahead
Numerics   codes times their scale, relative to the largest scale of their head or key, are exact in bf16 (within 2^126
           of it); fp32 sums of exact products over 128 channels. Largest scales go into head weights and, after the
           sum over heads, into the score. A score is stored as an integer of the same order
Limits     FP4 queries and keys of 128 channels, heads a multiple of 8 up to 64
Bound      memory for one token, the matrix unit from a few on
"""

from __future__ import annotations

import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.kernels.indexer.index_scores_config import TILE, Config
from megamoe.kernels.parts.launch import as_heads, as_rows, num_multiprocessors
from megamoe.kernels.parts.pool import as_pool
from megamoe.kernels.store import kernel

WAVES = 4
"""Blocks a multiprocessor takes one after another where there are several tokens, so that all end together."""


def num_splits(num_tokens: int, capacity: int, processors: int) -> int:
    """Return the number of blocks that share the entries of a token."""
    wanted = processors if num_tokens == 1 else -(-WAVES * processors // num_tokens)
    return max(1, min(wanted, -(-capacity // TILE)))


def run(
    q: MxFp4Tensor,
    head_weights: torch.Tensor,
    keys: CachePool,
    block_tables: torch.Tensor,
    requests: torch.Tensor,
    num_visible: torch.Tensor,
    top_k: int,
    scores: torch.Tensor,
) -> None:
    """Write the scores of the tokens that see more than top_k entries; all others stay as they are."""
    capacity = block_tables.shape[1] * keys.rows_per_block
    splits = num_splits(q.shape[0], capacity, num_multiprocessors(scores.device))
    kernel(Config(q.shape[1]), scores.device)(
        as_heads(q.codes),
        q.scales.view(torch.uint8),
        as_rows(head_weights),
        as_pool("index_topk", "keys", keys),
        block_tables,
        requests,
        num_visible,
        scores,
        keys.rows_per_block,
        top_k,
        splits,
    )
