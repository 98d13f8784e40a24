# SPDX-License-Identifier: Apache-2.0
"""index_scores and index_topk: which compressed entries a token attends to.

Math       score[t, w] = sum_h head_weights[t, h] * max(q[t, h, :] . key[w, :], 0)
           A token keeps its top_k visible entries: score descending, then entry number ascending.
Numerics   q and keys are the values of their formats (FP4, FP8 or plain), exact in fp32; products and sums in fp32.
           Keys are taken in tiles of 128 and heads are summed by halves, so that a score's bits depend on its own query
           and key alone: not on the other tokens, on the number of keys, on pages, or on prefill against decode.
           Nothing is rounded between score and selection. The scales of quantized queries are applied to q here;
           folding them into the head weights is the same number in real arithmetic and may be done by kernels.
           When a token sees at most top_k entries all of them are selected and nothing is scored. Nobody (request -1)
           selects nothing.
           A NaN score sorts first: it is selected rather than lost.
Memory     keys are decoded 4096 at a time; at most 16 MiB of logits and of scores at a time (always at least one
           token). Scores are as many as a request's entries, which the pool bounds, not as the longest context has
Tolerance  verify/tolerance.py, "index_scores"; selections may differ only where scores differ by less than that
Kernels    kernels/indexer/index_topk.py for FP4 queries and keys: scores (on Hopper by wgmma), then a radix select;
           index_scores has none, the CPU reference runs
Source     DeepSeek-V4 technical report (arXiv 2606.19348), lightning indexer; docs/numerics.md, section "Operations"
"""

from __future__ import annotations

import torch

from megamoe.formats import fp8, mxfp4
from megamoe.formats.cache_rows import CachePool
from megamoe.formats.fp8 import Fp8RowTensor
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.ops.check import FLOAT32, INT64, check
from megamoe.ops.dispatch import pick
from megamoe.ops.fixed_order import batched_matmul, sum_by_halves
from megamoe.ops.read_cache import check_pool, check_slots
from megamoe.ops.read_cache import reference as read_rows

IndexQuery = torch.Tensor | MxFp4Tensor | Fp8RowTensor

KEY_TILE = 128
KEY_GROUP = 32 * KEY_TILE
GROUP_BYTES = 16 * 2**20
QUERIES = (torch.bfloat16, torch.float32, MxFp4Tensor, Fp8RowTensor)
INT32: tuple[torch.dtype, ...] = (torch.int32,)


def index_scores(q: IndexQuery, head_weights: torch.Tensor, keys: CachePool, key_slots: torch.Tensor) -> torch.Tensor:
    """Score keys for every token.

    Args:
        q: [T, Hi, K] queries: FP4 (blocks of 32), FP8 rows, or plain bf16 or fp32.
        head_weights: [T, Hi] fp32, of either sign.
        keys: pool of index keys of width K, in any row format.
        key_slots: [N] int64 slots of the keys; -1 is a key of zeros. N may be 0.

    Returns:
        [T, N] fp32, contiguous, newly allocated.

    Raises:
        TypeError: a dtype is not as above, or keys is not a CachePool.
        ValueError: a shape does not fit, or a slot is not in -1 .. num_slots - 1.
    """
    check_pool("index_scores", "keys", keys)
    check(
        "index_scores",
        q=(q, "T Hi K", QUERIES),
        head_weights=(head_weights, "T Hi", FLOAT32),
        key_slots=(key_slots, "N", INT64),
        storage=(keys.storage, "blocks bytes"),
    )
    _check_width("index_scores", q, keys)
    scores: torch.Tensor = pick("index_scores", q.device, scores_reference)(q, head_weights, keys, key_slots)
    return scores


def index_topk(
    q: IndexQuery,
    head_weights: torch.Tensor,
    keys: CachePool,
    *,
    block_tables: torch.Tensor,
    requests: torch.Tensor,
    num_visible: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """Select the entries that every token attends to.

    Args:
        q: [T, Hi, K] queries: FP4 (blocks of 32), FP8 rows, or plain bf16 or fp32.
        head_weights: [T, Hi] fp32, of either sign.
        keys: pool of index keys of width K, in any row format.
        block_tables: [R, max_blocks] int32; entry w of request r is row w % P of block block_tables[r, w // P], where
            P = keys.rows_per_block. Columns beyond a request's visible entries are not read.
        requests: [T] int32, the row of block_tables of each token; -1 for nobody, who selects nothing.
        num_visible: [T] int32; token t may select entries 0 .. num_visible[t] - 1.
        top_k: most entries a token selects.

    Returns:
        [T, top_k] int32 entry numbers in ascending order, then -1.

    Raises:
        TypeError: a dtype is not as above, or keys is not a CachePool.
        ValueError: a shape does not fit, a visible entry lies beyond the block table or on a block the pool does not
            have, or top_k is negative.
    """
    check_pool("index_topk", "keys", keys)
    check(
        "index_topk",
        q=(q, "T Hi K", QUERIES),
        head_weights=(head_weights, "T Hi", FLOAT32),
        block_tables=(block_tables, "R max_blocks", INT32),
        requests=(requests, "T", INT32),
        num_visible=(num_visible, "T", INT32),
        storage=(keys.storage, "blocks bytes"),
    )
    _check_width("index_topk", q, keys)
    if top_k < 0:
        raise ValueError(f"index_topk: top_k must be >= 0; got {top_k}.")
    run = pick("index_topk", q.device, reference)
    entry_idx: torch.Tensor = run(q, head_weights, keys, block_tables, requests, num_visible, top_k)
    return entry_idx


def scores_reference(
    q: IndexQuery, head_weights: torch.Tensor, keys: CachePool, key_slots: torch.Tensor
) -> torch.Tensor:
    """Compute the meaning of index_scores in plain torch."""
    check_slots("index_scores", "key_slots", key_slots, keys)
    num_heads = max(q.shape[1], 1)
    query = query_values(q)
    scores = torch.empty(query.shape[0], key_slots.shape[0], dtype=torch.float32, device=q.device)
    for first in range(0, key_slots.shape[0], KEY_GROUP):
        keys_here = slice(first, first + KEY_GROUP)
        tiles = _key_tiles(keys, key_slots[keys_here])  # [tiles, KEY_TILE, K]
        token_group = max(1, GROUP_BYTES // (4 * num_heads * KEY_TILE * tiles.shape[0]))
        for start in range(0, query.shape[0], token_group):
            tokens = slice(start, start + token_group)
            scores[tokens, keys_here] = _group_scores(query[tokens], head_weights[tokens], tiles)[
                :, : key_slots.shape[0] - first
            ]
    return scores


def _key_tiles(keys: CachePool, key_slots: torch.Tensor) -> torch.Tensor:
    """Return the values of keys in whole tiles [tiles, KEY_TILE, K], filled up with zeros."""
    values = read_rows(keys, key_slots)
    spare = -values.shape[0] % KEY_TILE
    if spare:
        values = torch.nn.functional.pad(values, (0, 0, 0, spare))
    return values.view(-1, KEY_TILE, keys.width)


def _group_scores(query: torch.Tensor, head_weights: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """Return scores [T, tiles * KEY_TILE] of every key of the tiles."""
    num_tokens, num_heads, _ = query.shape
    if not num_heads:
        return torch.zeros(num_tokens, tiles.shape[0] * KEY_TILE, dtype=torch.float32, device=query.device)
    keys = tiles.mT  # [tiles, K, KEY_TILE]
    if num_tokens < tiles.shape[0]:  # one batch per token or one per tile: the same products, fewer calls
        per_token = [batched_matmul(q.expand(tiles.shape[0], -1, -1), keys) for q in query]  # [tiles, Hi, KEY_TILE]
        logits = torch.stack(per_token).transpose(1, 2).reshape(num_tokens, num_heads, -1)  # [T, Hi, keys]
    else:
        logits = torch.cat([batched_matmul(query, key.expand(num_tokens, -1, -1)) for key in keys], dim=2)
    return sum_by_halves(logits.clamp_(min=0.0).mul_(head_weights[:, :, None]), 1)


def query_values(q: IndexQuery) -> torch.Tensor:
    """Return the values of a query in fp32, exactly."""
    if isinstance(q, MxFp4Tensor):
        return mxfp4.dequantize(q)
    if isinstance(q, Fp8RowTensor):
        return fp8.dequantize(q, torch.float32)
    return q.to(torch.float32)


def reference(
    q: IndexQuery,
    head_weights: torch.Tensor,
    keys: CachePool,
    block_tables: torch.Tensor,
    requests: torch.Tensor,
    num_visible: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """Compute the meaning of index_topk in plain torch."""
    num_visible = num_visible.masked_fill(requests < 0, 0)
    _check_visible(num_visible, block_tables, keys.rows_per_block)
    columns = torch.arange(top_k, dtype=torch.int32, device=q.device)
    entry_idx = torch.where(columns < num_visible[:, None], columns, -1)  # right where all visible entries are selected
    needs_scores = num_visible > top_k
    _check_pages(keys, block_tables, requests, num_visible)
    if top_k == 0 or not bool(needs_scores.any()):
        return entry_idx
    query = query_values(q)
    scored = needs_scores.nonzero().squeeze(1)
    for request in requests[scored].unique().tolist():
        tokens = scored[requests[scored] == request]
        num_keys = int(num_visible[tokens].max())
        key_slots = _first_slots(block_tables[request], num_keys, keys.rows_per_block)
        for some in tokens.split(max(1, GROUP_BYTES // (4 * num_keys))):
            scores = scores_reference(query[some], head_weights[some], keys, key_slots)  # [tokens, num_keys]
            entry_idx[some] = _best(scores, num_visible[some], top_k).to(torch.int32)
    return entry_idx


def _first_slots(block_table: torch.Tensor, num_rows: int, rows_per_block: int) -> torch.Tensor:
    """Return the slots [num_rows] of the first rows that lie in the pages of one request."""
    num_pages = -(-num_rows // rows_per_block)
    offsets = torch.arange(rows_per_block, device=block_table.device)
    return (block_table[:num_pages, None].to(torch.int64) * rows_per_block + offsets).reshape(-1)[:num_rows]


def _best(scores: torch.Tensor, num_visible: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return the top_k visible entries of each row in ascending order; every row sees more than top_k."""
    columns = torch.arange(scores.shape[1], device=scores.device)
    scores = scores.masked_fill(columns >= num_visible[:, None], -torch.inf)
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices  # stable: ties by lowest entry
    return order[:, :top_k].sort(dim=1).values


def _check_visible(num_visible: torch.Tensor, block_tables: torch.Tensor, rows_per_block: int) -> None:
    """Refuse numbers of entries that do not fit the block tables."""
    if not num_visible.numel():
        return
    low, high = (int(bound) for bound in num_visible.aminmax())
    room = block_tables.shape[1] * rows_per_block
    if low < 0 or high > room:
        raise ValueError(
            f"index_topk: num_visible must be in 0 .. {room} (the rows of {block_tables.shape[1]} blocks of "
            f"{rows_per_block}); got {low if low < 0 else high}. Extend the block table before the step."
        )


def _check_pages(
    keys: CachePool, block_tables: torch.Tensor, requests: torch.Tensor, num_visible: torch.Tensor
) -> None:
    """Refuse requests that are not in the tables, and visible entries on blocks that the pool does not have."""
    if requests.numel() and int(requests.max()) >= block_tables.shape[0]:
        raise ValueError(
            f"index_topk: requests must be -1 or in 0 .. {block_tables.shape[0] - 1}, the rows of block_tables; got "
            f"{int(requests.max())}."
        )
    seeing = requests[num_visible > 0]
    for request in (seeing.unique() if seeing.shape[0] > 1 else seeing).tolist():
        num_pages = -(-int(num_visible[requests == request].max()) // keys.rows_per_block)
        low, high = (int(bound) for bound in block_tables[request, :num_pages].aminmax())
        if low < 0 or high >= keys.num_blocks:
            raise ValueError(
                f"index_topk: request {request} sees entries on block {low if low < 0 else high}; blocks are in 0 .. "
                f"{keys.num_blocks - 1}. Extend the block table before the step."
            )


def _check_width(op: str, q: IndexQuery, keys: CachePool) -> None:
    if q.shape[2] != keys.width:
        raise ValueError(
            f"{op}: q must be [T, Hi, {keys.width}], as wide as the pool's keys; got {list(q.shape)}. Allocate the "
            f"pool with the index head's width."
        )
