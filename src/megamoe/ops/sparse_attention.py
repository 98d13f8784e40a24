# SPDX-License-Identifier: Apache-2.0
"""sparse_attention: one softmax over a token's window rows and its compressed entries, with a sink.

Math       the items of token t are the rows window_slots[t] of `window` and entry_slots[t] of `entries`, without -1
           z_i     = scale * (q[t, h] . row_i)
           y[t, h] = sum_i exp(z_i) * row_i / (sum_i exp(z_i) + exp(sink[h]))
           Every row is key and value of all heads. The sink is a logit of its own: it is not scaled and has no value.
Numerics   rows are decoded exactly; products and sums in fp32; one rounding of y to out_dtype.
           operand_dtype float32: nothing else is rounded. The largest logit of the items is subtracted first.
           operand_dtype float16: q is rounded to fp16 before the scores, and the weights before they multiply rows:
             w_i = fp16(exp(z_i - (n - 15) ln 2)),   n = ceil(max z * log2 e)     the denominator adds unrounded weights
           Subtracting a power of two makes the rounding of a weight the same whatever maximum n came from: of all
           items, of a tile, or of those seen so far. So it does not depend on tiles or on how keys are split.
           A token with no item gives 0, and so does a sink of +inf (or one that lies more than about 88, with fp16 78,
           above every logit: its true result is below 1e-38, with fp16 1e-33).
           Columns are taken in blocks of 64, window first, each multiplied at one fixed size and added in column order.
           A head's bits therefore depend on its own query, rows and the columns they stand in: not on other tokens or
           heads, on pages, or on how many -1 columns follow. Moving an item to another column may change the last bits.
Memory     tokens are taken in groups whose gathered rows, products and logits take at most 16 MiB, and the distinct
           rows of a group are decoded once (at most as large again); always at least one token
Tolerance  verify/tolerance.py, "sparse_attention": sums of up to J terms in another order; with fp16, weights beside a
           rounding step
Kernels    none yet; the CPU reference runs
Source     DeepSeek-V4 technical report (arXiv 2606.19348), attention sink and compressed attention; docs/numerics.md,
           section "Operations", and docs/decisions/0012-attention-contract.md
"""

from __future__ import annotations

import math

import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.ops.check import FLOAT32, FLOATS, INT64, check
from megamoe.ops.dispatch import pick
from megamoe.ops.fixed_order import batched_matmul, sum_by_halves
from megamoe.ops.read_cache import check_pool, check_slots
from megamoe.ops.read_cache import reference as read_rows

COLUMN_BLOCK = 64
HEAD_GROUP = 4
GROUP_BYTES = 16 * 2**20
OPERANDS: tuple[torch.dtype, ...] = (torch.float16, torch.float32)
LN2, LOG2_E = math.log(2.0), 1.0 / math.log(2.0)
FP16_HEADROOM = 15
"""The largest fp16 weight is 2^15: weights down to 2^-29 of it are then normal fp16 numbers."""


def sparse_attention(
    q: torch.Tensor,
    window: CachePool,
    window_slots: torch.Tensor,
    entries: CachePool | None,
    entry_slots: torch.Tensor | None,
    sink: torch.Tensor,
    *,
    scale: float,
    out_dtype: torch.dtype | None = None,
    operand_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Attend to window rows and compressed entries in one softmax.

    Args:
        q: [T, H, C] bf16 or fp32 queries. T may be 0.
        window: pool of rows of width C.
        window_slots: [T, W] int64; -1 anywhere means no item. A slot named twice counts twice. W may be 0.
        entries: pool of rows of width C, or None.
        entry_slots: [T, J] int64 like window_slots; given exactly when `entries` is. J may be 0.
        sink: [H] fp32, one logit per head; -inf for none.
        scale: multiplies the products of queries and rows, and nothing else.
        out_dtype: bf16 or fp32; the dtype of q when None.
        operand_dtype: what queries and softmax weights are rounded to before they are multiplied: fp16 or fp32.
            With fp16 a query beyond 65504 gives NaN in its head, and rows must lie within it, as cache rows do.

    Returns:
        [T, H, C] out_dtype, contiguous, newly allocated.

    Raises:
        TypeError: a dtype is not as above, or a pool is not a CachePool.
        ValueError: a shape does not fit, only one of entries and entry_slots is given, or a slot is not in
            -1 .. num_slots - 1 of its pool.
    """
    out_dtype = q.dtype if out_dtype is None else out_dtype
    check_pool("sparse_attention", "window", window)
    dims = check(
        "sparse_attention",
        q=(q, "T H C", FLOATS),
        window_slots=(window_slots, "T W", INT64),
        entry_slots=(entry_slots, "?T J", INT64),
        sink=(sink, "H", FLOAT32),
        window=(window.storage, "window_blocks window_bytes"),
        out_dtype=(out_dtype, FLOATS),
        operand_dtype=(operand_dtype, OPERANDS),
    )
    if (entries is None) != (entry_slots is None):
        raise ValueError(
            "sparse_attention: entries and entry_slots go together; got one of them. Pass both, or None for both."
        )
    _check_rows("window", window, window_slots, dims["C"], q.device)
    if entries is not None and entry_slots is not None:
        check_pool("sparse_attention", "entries", entries)
        _check_rows("entries", entries, entry_slots, dims["C"], q.device)
    run = pick("sparse_attention", q.device, reference)
    y: torch.Tensor = run(q, window, window_slots, entries, entry_slots, sink, scale, out_dtype, operand_dtype)
    return y


def _check_rows(name: str, pool: CachePool, slots: torch.Tensor, width: int, device: torch.device) -> None:
    if pool.width != width:
        raise ValueError(
            f"sparse_attention: {name} must hold rows of width C = {width}, as q has; got width {pool.width}. "
            f"A row is key and value at once, so queries are as wide as rows."
        )
    if pool.device != device:
        raise ValueError(f"sparse_attention: {name} is on {pool.device} and q on {device}. Move them to one device.")
    check_slots("sparse_attention", "window_slots" if name == "window" else "entry_slots", slots, pool)


def reference(
    q: torch.Tensor,
    window: CachePool,
    window_slots: torch.Tensor,
    entries: CachePool | None,
    entry_slots: torch.Tensor | None,
    sink: torch.Tensor,
    scale: float,
    out_dtype: torch.dtype,
    operand_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute the operation's meaning in plain torch."""
    num_tokens, num_heads, width = q.shape
    sources = [(window, _to_blocks(window_slots))]
    if entries is not None and entry_slots is not None:
        sources.append((entries, _to_blocks(entry_slots)))
    sources = [(pool, slots) for pool, slots in sources if slots.shape[1]]
    y = torch.zeros(num_tokens, num_heads, width, dtype=out_dtype, device=q.device)
    num_blocks = sum(slots.shape[1] for _, slots in sources) // COLUMN_BLOCK
    token_bytes = 4 * num_blocks * (COLUMN_BLOCK * width + 2 * num_heads * width + 3 * COLUMN_BLOCK * num_heads)
    group = max(1, GROUP_BYTES // max(token_bytes, 1))
    for start in range(0, num_tokens if num_blocks else 0, group):
        part = slice(start, start + group)
        rows = _gather([(pool, slots[part]) for pool, slots in sources])  # [T, J, C] fp32
        is_item = torch.cat([slots[part] >= 0 for _, slots in sources], dim=1)  # [T, J]
        y[part] = _attend(q[part].to(torch.float32), rows, is_item, sink, scale, operand_dtype)
    return y


def _to_blocks(slots: torch.Tensor) -> torch.Tensor:
    """Drop the columns after the last item of all tokens, then fill up with -1 to whole blocks."""
    used = (slots >= 0).any(0).nonzero()
    num_columns = int(used[-1]) + 1 if used.numel() else 0
    return torch.nn.functional.pad(slots[:, :num_columns], (0, -num_columns % COLUMN_BLOCK), value=-1)


def _gather(sources: list[tuple[CachePool, torch.Tensor]]) -> torch.Tensor:
    """Return rows [T, J, C] fp32, zeros at -1; a row that several tokens share is decoded once."""
    if sources[0][1].shape[0] == 1:
        return torch.cat([read_rows(pool, slots) for pool, slots in sources], dim=1)
    decoded, row_idx, num_rows = [], [], 0
    for pool, slots in sources:
        distinct, idx = slots.unique(return_inverse=True)
        decoded.append(read_rows(pool, distinct))
        row_idx.append(idx + num_rows)
        num_rows += distinct.shape[0]
    idx = torch.cat(row_idx, dim=1)  # [T, J] into the decoded rows
    return torch.cat(decoded).index_select(0, idx.view(-1)).view(*idx.shape, -1)


def _attend(
    q: torch.Tensor,
    rows: torch.Tensor,
    is_item: torch.Tensor,
    sink: torch.Tensor,
    scale: float,
    operand_dtype: torch.dtype,
) -> torch.Tensor:
    """Return [T, H, C] fp32 from queries and gathered rows [T, J, C]; J is a multiple of COLUMN_BLOCK."""
    num_tokens, num_heads, width = q.shape
    num_blocks = rows.shape[1] // COLUMN_BLOCK
    num_tiles = num_tokens * num_blocks
    tiles = rows.view(num_tiles, COLUMN_BLOCK, width)
    q = _rounded(q, operand_dtype)
    q_tiles = q[:, None].expand(-1, num_blocks, -1, -1).reshape(num_tiles, num_heads, width)
    logits = _by_head_groups(q_tiles, tiles.transpose(1, 2)).mul_(scale)  # [T * blocks, H, 64]
    logits.masked_fill_(~is_item.view(num_tiles, 1, COLUMN_BLOCK), -torch.inf)
    per_token = logits.view(num_tokens, num_blocks, num_heads, COLUMN_BLOCK)
    top = per_token.amax(dim=(1, 3))  # [T, H]
    top = top.masked_fill(top == -torch.inf, 0.0)  # no item: every weight below is 0
    if operand_dtype == torch.float16:
        top = top.mul_(LOG2_E).ceil_().sub_(FP16_HEADROOM).mul_(LN2)
    weights = (per_token - top[:, None, :, None]).exp_()
    weight_sums = sum_by_halves(weights, -1)  # [T, blocks, H]
    weights = _rounded(weights, operand_dtype).reshape(num_tiles, num_heads, COLUMN_BLOCK)
    values = _by_head_groups(weights, tiles).view(num_tokens, num_blocks, num_heads, width)
    total, y = torch.exp(sink - top), torch.zeros_like(q)
    for block in range(num_blocks):
        total += weight_sums[:, block]
        y += values[:, block]
    return y.div_(total.masked_fill_(total == 0.0, 1.0)[..., None])


def _by_head_groups(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Multiply [B, H, K] by [B, K, N], HEAD_GROUP rows a call: ranks cut heads, and a BLAS chooses by their number."""
    num_heads = x.shape[1]
    if num_heads == HEAD_GROUP:
        return batched_matmul(x, y)
    x = torch.nn.functional.pad(x, (0, 0, 0, -num_heads % HEAD_GROUP))
    return torch.cat([batched_matmul(group, y) for group in x.split(HEAD_GROUP, dim=1)], dim=1)[:, :num_heads]


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return fp32 values rounded to `dtype`; x itself for fp32."""
    return x.to(dtype).to(torch.float32)
