# SPDX-License-Identifier: Apache-2.0
"""Scores of all visible entries, the first of the two kernels behind index_topk.

Grid       `splits` blocks a token, which share its tiles of entries; a warp takes 16 entries at a time
Products   on Hopper wgmma of 64 entries by all heads, keys decoded into registers and the query into shared memory;
           elsewhere the warp's matrix unit, the query in registers
Memory     keys go through a ring of each warp, three tiles ahead
Numerics   codes times their scale, relative to the largest scale of their head or key, are exact in bf16 (within 2^126
           of it); fp32 sums of exact products over 128 channels. Largest scales go into head weights and, after the
           sum over heads, into the score. A score is stored as an integer of the same order
Limits     FP4 queries and keys of 128 channels, heads a multiple of 8 up to 64; 2^32 / rows of a block entries
Bound      instructions: 16 entries cost a warp some 400
"""

from __future__ import annotations

import functools

import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.kernels.indexer import index_scores_config, index_scores_sm90_config
from megamoe.kernels.parts.launch import as_heads, as_rows, is_of, num_multiprocessors
from megamoe.kernels.parts.pool import as_pool
from megamoe.kernels.store import kernel

TILE = 64
START = 10
"""What a block costs before its first entries, in tiles."""


@functools.cache
def num_splits(num_tokens: int, capacity: int, processors: int) -> int:
    """Return the number of blocks that share the entries of a token, so that the last wave of blocks ends early."""
    tiles = -(-capacity // TILE)

    def cost(splits: int) -> int:
        return -(-num_tokens * splits // processors) * (START + -(-tiles // splits))

    return min(range(1, min(processors, tiles) + 1), key=cost)


def inverse_of(divisor: int) -> int:
    """Return ceil(2^32 / divisor) as an int32, 0 for 1: its product with a number holds the quotient above bit 32.

    That is exact for numbers below 2^32 / divisor.
    """
    inverse = -(-(2**32) // divisor) % 2**32
    return inverse - 2**32 if inverse >= 2**31 else inverse


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
    if capacity * keys.rows_per_block > 2**32:
        raise NotImplementedError(
            f"index_topk: the kernel takes block tables with room for up to 2^32 / {keys.rows_per_block} entries; got "
            f'{capacity}. Use smaller blocks, or run the reference: with megamoe.ops.use("reference").'
        )
    splits = num_splits(q.shape[0], capacity, num_multiprocessors(scores.device))
    tensors = (
        as_heads(q.codes),
        q.scales.view(torch.uint8),
        as_rows(head_weights),
        as_pool("index_topk", "keys", keys),
        block_tables,
        requests,
        num_visible,
        scores,
    )
    heads, rows = q.shape[1], keys.rows_per_block
    if is_of("sm90", scores.device):
        own = index_scores_sm90_config.Config(heads)
        kernel(own, scores.device)(*tensors, rows, inverse_of(rows), top_k, splits)
    else:
        kernel(index_scores_config.Config(heads), scores.device)(*tensors, rows, top_k, splits)
