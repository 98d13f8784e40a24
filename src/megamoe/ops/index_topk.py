# SPDX-License-Identifier: Apache-2.0
"""index_scores and index_topk: which compressed entries a token attends to.

Math       score[t, w] = sum_h head_weights[t, h] * max(q[t, h, :] . key[w, :], 0)
           A token keeps its top_k visible entries: score descending, then entry number ascending.
Numerics   q and keys are the values of their formats (FP4, FP8 or plain), exact in fp32; products and sums in fp32.
           Keys are taken in tiles of 128 and heads are summed by halves, so that a score's bits depend on its own query
           and key alone: not on the other tokens, on the number of keys, on pages, or on prefill against decode.
           Nothing is rounded between score and selection. The scales of quantized queries are applied to q here;
           folding them into the head weights is the same number in real arithmetic and may be done by kernels.
           When a token sees at most top_k entries all of them are selected and nothing is scored.
           A NaN score sorts first: it is selected rather than lost.
Memory     keys are decoded 4096 at a time; at most 16 MiB of logits and of scores at a time (always at least one token)
Tolerance  verify/tolerance.py, "index_scores"; selections may differ only where scores differ by less than that
Kernels    none yet; the CPU reference runs
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
    check_slots("index_scores", "key_slots", key_slots, keys)
    scores: torch.Tensor = pick("index_scores", q.device, scores_reference)(q, head_weights, keys, key_slots)
    return scores


def index_topk(
    q: IndexQuery,
    head_weights: torch.Tensor,
    keys: CachePool,
    *,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    num_visible: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """Select the entries that every token attends to.

    Args:
        q: [T, Hi, K] queries: FP4 (blocks of 32), FP8 rows, or plain bf16 or fp32.
        head_weights: [T, Hi] fp32, of either sign.
        keys: pool of index keys of width K, in any row format.
        block_tables: [B, max_blocks] int32; entry w of request b is row w % P of block block_tables[b, w // P], where
            P = keys.rows_per_block. Columns beyond a request's visible entries are not read.
        query_starts: [B + 1] int32; the tokens of request b are query_starts[b] .. query_starts[b + 1] - 1.
        num_visible: [T] int32; token t may select entries 0 .. num_visible[t] - 1.
        top_k: most entries a token selects.

    Returns:
        [T, top_k] int64 entry numbers in ascending order, then -1.

    Raises:
        TypeError: a dtype is not as above, or keys is not a CachePool.
        ValueError: a shape does not fit, query_starts does not go from 0 up to T, a visible entry lies beyond the block
            table or on a block the pool does not have, or top_k is negative.
    """
    check_pool("index_topk", "keys", keys)
    dims = check(
        "index_topk",
        q=(q, "T Hi K", QUERIES),
        head_weights=(head_weights, "T Hi", FLOAT32),
        block_tables=(block_tables, "B max_blocks", INT32),
        query_starts=(query_starts, "starts", INT32),
        num_visible=(num_visible, "T", INT32),
        storage=(keys.storage, "blocks bytes"),
    )
    _check_width("index_topk", q, keys)
    check_query_starts("index_topk", query_starts, dims["B"], dims["T"])
    if top_k < 0:
        raise ValueError(f"index_topk: top_k must be >= 0; got {top_k}.")
    if dims["T"]:
        low, high = (int(bound) for bound in num_visible.aminmax())
        if low < 0 or high > dims["max_blocks"] * keys.rows_per_block:
            raise ValueError(
                f"index_topk: num_visible must be in 0 .. {dims['max_blocks'] * keys.rows_per_block} (the rows of "
                f"{dims['max_blocks']} blocks of {keys.rows_per_block}); got {low if low < 0 else high}. "
                f"Extend the block table before the step."
            )
    _check_pages(keys, block_tables, query_starts, num_visible)
    run = pick("index_topk", q.device, reference)
    entry_idx: torch.Tensor = run(q, head_weights, keys, block_tables, query_starts, num_visible, top_k)
    return entry_idx


def entry_slots(
    entry_idx: torch.Tensor, block_tables: torch.Tensor, query_starts: torch.Tensor, rows_per_block: int
) -> torch.Tensor:
    """Return the slots of selected entries in a pool of entries.

    Args:
        entry_idx: [T, J] int64 entry numbers; -1 anywhere means none and stays -1.
        block_tables: [B, max_blocks] int32; entry w of request b is row w % P of block block_tables[b, w // P].
        query_starts: [B + 1] int32; the tokens of request b are query_starts[b] .. query_starts[b + 1] - 1.
        rows_per_block: P of the pool the slots are for.

    Returns:
        [T, J] int64.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape does not fit, query_starts does not go from 0 up to T, or an entry lies beyond the block
            table or on a page that is negative there.
    """
    dims = check(
        "entry_slots",
        entry_idx=(entry_idx, "T J", INT64),
        block_tables=(block_tables, "B max_blocks", INT32),
        query_starts=(query_starts, "starts", INT32),
    )
    check_query_starts("entry_slots", query_starts, dims["B"], dims["T"])
    if rows_per_block < 1:
        raise ValueError(f"entry_slots: rows_per_block must be >= 1; got {rows_per_block}.")
    if not entry_idx.numel():
        return entry_idx.clone()
    low, high = (int(bound) for bound in entry_idx.aminmax())
    if low < -1 or high >= dims["max_blocks"] * rows_per_block:
        raise ValueError(
            f"entry_slots: entries must be -1 or in 0 .. {dims['max_blocks'] * rows_per_block - 1} (the rows of "
            f"{dims['max_blocks']} blocks of {rows_per_block}); got {low if low < -1 else high}. "
            f"Extend the block table before the step."
        )
    if high < 0:
        return entry_idx.clone()
    is_entry = entry_idx >= 0
    pages = entry_idx.clamp(min=0) // rows_per_block  # [T, J]
    if dims["B"] == 1:
        blocks = block_tables[0].to(torch.int64)[pages]
    else:
        blocks = block_tables.to(torch.int64)[request_of_token(query_starts, dims["T"])[:, None], pages]
    if bool(((blocks < 0) & is_entry).any()):
        raise ValueError(
            "entry_slots: an entry lies on a page that is negative in the block table. Extend the block table before "
            "the step."
        )
    return torch.where(is_entry, blocks * rows_per_block + entry_idx % rows_per_block, -1)


def request_of_token(query_starts: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return the request [T] int64 that each token belongs to; requests without tokens have none."""
    tokens = torch.arange(num_tokens, dtype=query_starts.dtype, device=query_starts.device)
    return torch.searchsorted(query_starts[1:].contiguous(), tokens, right=True)


def check_query_starts(op: str, query_starts: torch.Tensor, num_requests: int, num_tokens: int) -> None:
    """Refuse query_starts that do not cut T tokens into B requests.

    Raises:
        ValueError: there are not B + 1 numbers, or they do not rise from 0 to T.
    """
    starts = query_starts.tolist()
    rises = all(a <= b for a, b in zip(starts, starts[1:], strict=False))
    if len(starts) != num_requests + 1 or starts[0] != 0 or starts[-1] != num_tokens or not rises:
        raise ValueError(
            f"{op}: query_starts must be B + 1 = {num_requests + 1} numbers that rise from 0 to T = {num_tokens}; got "
            f"{starts[:8]}{' ...' if len(starts) > 8 else ''}."
        )


def scores_reference(
    q: IndexQuery, head_weights: torch.Tensor, keys: CachePool, key_slots: torch.Tensor
) -> torch.Tensor:
    """Compute the meaning of index_scores in plain torch."""
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
    query_starts: torch.Tensor,
    num_visible: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """Compute the meaning of index_topk in plain torch."""
    columns = torch.arange(top_k, dtype=torch.int64, device=q.device)
    entry_idx = torch.where(columns < num_visible[:, None], columns, -1)  # right where all visible entries are selected
    needs_scores = num_visible > top_k
    if top_k == 0 or not bool(needs_scores.any()):
        return entry_idx
    query = query_values(q)
    starts = query_starts.tolist()
    for request, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        tokens = start + needs_scores[start:end].nonzero().squeeze(1)
        if not tokens.shape[0]:
            continue
        num_keys = int(num_visible[tokens].max())
        key_slots = _first_slots(block_tables[request], num_keys, keys.rows_per_block)
        for some in tokens.split(max(1, GROUP_BYTES // (4 * num_keys))):
            scores = scores_reference(query[some], head_weights[some], keys, key_slots)  # [tokens, num_keys]
            entry_idx[some] = _best(scores, num_visible[some], top_k)
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


def _check_pages(
    keys: CachePool, block_tables: torch.Tensor, query_starts: torch.Tensor, num_visible: torch.Tensor
) -> None:
    """Refuse visible entries on blocks that the pool does not have."""
    starts = query_starts.tolist()
    for request, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        if start == end:
            continue
        num_pages = -(-int(num_visible[start:end].max()) // keys.rows_per_block)
        if not num_pages:
            continue
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
