# SPDX-License-Identifier: Apache-2.0
"""sparse_attention: one softmax over a token's window rows and its compressed entries, with a sink, rotated back.

Math       the items of token t are the last `window_size` rows up to position window_ends[t], those that exist, and
           the entries entry_idx[t] without -1, or entries 0 .. num_visible[t] - 1 where entry_idx is None
           z_i     = scale * (q[t, h] . row_i)
           o[t, h] = sum_i exp(z_i) * row_i / (sum_i exp(z_i) + exp(sink[h]))
           y[t, h] = the last R channels of o[t, h], rotated by -positions[t]
           Every row is key and value of all heads. The sink is a logit of its own: it is not scaled and has no value.
Addresses  rows and entries are found through block tables (ops/row_slots.py): nothing as long as a context is passed.
           A window row of this step is row t - d of `step` where the request began the step at token first_idx[t], as
           long as d <= t - first_idx[t]; without `step` it is in the ring like the others.
Nobody     a token whose request is -1 has no item and gives 0.
Rotation   o is rounded to out_dtype, then its last R channels are rotated in fp32 and rounded again, as `rope` does.
Numerics   rows are decoded exactly; products and sums in fp32; one rounding of o to out_dtype.
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
Kernels    tiles of 64 items, gathered into fp16, on wgmma or mma.sync; few tokens in ranges. docs/kernels-attention.md
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
from megamoe.ops.read_cache import check_pool
from megamoe.ops.read_cache import reference as read_rows
from megamoe.ops.rope import RopeTable
from megamoe.ops.rope import reference as rotate
from megamoe.ops.row_slots import recent_slots, row_slots

COLUMN_BLOCK = 64
HEAD_GROUP = 4
GROUP_BYTES = 16 * 2**20
INT32: tuple[torch.dtype, ...] = (torch.int32,)
NO_ENTRIES = "entries, entry_tables and num_visible go together"

Alternatives = list[tuple[CachePool, torch.Tensor]]
"""Slots [T, J] of the same columns in several pools; in each place at most one of them is not -1."""
OPERANDS: tuple[torch.dtype, ...] = (torch.float16, torch.float32)
LN2, LOG2_E = math.log(2.0), 1.0 / math.log(2.0)
FP16_HEADROOM = 15
"""The largest fp16 weight is 2^15: weights down to 2^-29 of it are then normal fp16 numbers."""


def sparse_attention(
    q: torch.Tensor,
    window: CachePool,
    entries: CachePool | None,
    sink: torch.Tensor,
    *,
    positions: torch.Tensor,
    requests: torch.Tensor,
    first_idx: torch.Tensor,
    window_size: int,
    window_tables: torch.Tensor,
    step: CachePool | None,
    entry_tables: torch.Tensor | None,
    entry_idx: torch.Tensor | None,
    num_visible: torch.Tensor | None,
    table: RopeTable,
    scale: float,
    window_ends: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    operand_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Attend to window rows and compressed entries in one softmax, and rotate the result back.

    Args:
        q: [T, H, C] bf16 or fp32 queries. T may be 0.
        window: rings of rows of width C.
        entries: pages of rows of width C, or None for a layer without them.
        sink: [H] fp32, one logit per head; -inf for none.
        positions: [T] int64; -1 for nobody.
        requests: [T] int32, the row of the block tables of each token; -1 for nobody.
        first_idx: [T] int32, the first token of the same request in this step; read where `step` is given.
        window_size: rows a token sees in the window, its own included.
        window_tables: [R, n] int32, blocks of `window`, read modulo n.
        step: window rows of this step, row t that of token t; None where they are in `window`.
        entry_tables: [R, m] int32, blocks of `entries`; given exactly when `entries` is.
        entry_idx: [T, J] int32 numbers of entries, -1 anywhere for none; None: all visible entries.
        num_visible: [T] int32, entries each token may use; given exactly when `entries` is.
        table: rotary frequencies; R channels are rotated back.
        scale: multiplies the products of queries and rows, and nothing else.
        window_ends: [T] int64, the position of the newest window row each token sees; its own position when None. Only
            without `step`.
        out_dtype: bf16 or fp32; the dtype of q when None.
        operand_dtype: what queries and softmax weights are rounded to before they are multiplied: fp16 or fp32.
            With fp16 a query beyond 65504 gives NaN in its head, and rows must lie within it, as cache rows do.

    Returns:
        [T, H, C] out_dtype, contiguous, newly allocated.

    Raises:
        TypeError: a dtype is not as above, or a pool is not a CachePool.
        ValueError: a shape does not fit, only some of the arguments of entries are given, or a row or entry lies
            outside its pool or beyond the block table.
    """
    out_dtype = q.dtype if out_dtype is None else out_dtype
    check_pool("sparse_attention", "window", window)
    dims = check(
        "sparse_attention",
        q=(q, "T H C", FLOATS),
        sink=(sink, "H", FLOAT32),
        positions=(positions, "T", INT64),
        window_ends=(window_ends, "?T", INT64),
        requests=(requests, "T", INT32),
        first_idx=(first_idx, "T", INT32),
        window_tables=(window_tables, "R n", INT32),
        entry_tables=(entry_tables, "?R m", INT32),
        entry_idx=(entry_idx, "?T J", INT32),
        num_visible=(num_visible, "?T", INT32),
        table=(table.inv_freq, "P"),
        window=(window.storage, "window_blocks window_bytes"),
        out_dtype=(out_dtype, FLOATS),
        operand_dtype=(operand_dtype, OPERANDS),
    )
    given = [one is not None for one in (entries, entry_tables, num_visible)]
    if any(given) != all(given) or (entry_idx is not None and not all(given)):
        raise ValueError(f"sparse_attention: {NO_ENTRIES}; got some of them. Pass all, or None for all.")
    if window_ends is not None and step is not None:
        raise ValueError(
            "sparse_attention: window_ends goes with step = None; got both. Rows of a step are counted back from each "
            "token's own, so put them into the rings first."
        )
    if window_size < 0:
        raise ValueError(f"sparse_attention: window_size must be >= 0; got {window_size}.")
    if dims["C"] < table.rope_dim:
        raise ValueError(
            f"sparse_attention: q must have at least the {table.rope_dim} channels of the rotary table; got C = "
            f"{dims['C']}. Pass the layer's own table."
        )
    for name, pool in (("window", window), ("step", step), ("entries", entries)):
        if pool is not None:
            _check_rows(name, pool, dims["C"], q.device)
    run = pick("sparse_attention", q.device, reference)
    y: torch.Tensor = run(
        q,
        window,
        entries,
        sink,
        positions,
        requests,
        first_idx,
        window_size,
        window_tables,
        step,
        entry_tables,
        entry_idx,
        num_visible,
        table,
        scale,
        positions if window_ends is None else window_ends,
        out_dtype,
        operand_dtype,
    )
    return y


def _check_rows(name: str, pool: CachePool, width: int, device: torch.device) -> None:
    check_pool("sparse_attention", name, pool)
    if pool.width != width:
        raise ValueError(
            f"sparse_attention: {name} must hold rows of width C = {width}, as q has; got width {pool.width}. "
            f"A row is key and value at once, so queries are as wide as rows."
        )
    if pool.device != device:
        raise ValueError(f"sparse_attention: {name} is on {pool.device} and q on {device}. Move them to one device.")


def reference(
    q: torch.Tensor,
    window: CachePool,
    entries: CachePool | None,
    sink: torch.Tensor,
    positions: torch.Tensor,
    requests: torch.Tensor,
    first_idx: torch.Tensor,
    window_size: int,
    window_tables: torch.Tensor,
    step: CachePool | None,
    entry_tables: torch.Tensor | None,
    entry_idx: torch.Tensor | None,
    num_visible: torch.Tensor | None,
    table: RopeTable,
    scale: float,
    window_ends: torch.Tensor,
    out_dtype: torch.dtype,
    operand_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute the operation's meaning in plain torch."""
    in_ring, in_step = recent_slots(
        window_ends, window_size, requests, window_tables, window.rows_per_block, None if step is None else first_idx
    )
    columns: list[Alternatives] = [[(window, in_ring)]]
    if step is not None and in_step is not None:
        columns[0].append((step, in_step))
    if entries is not None and entry_tables is not None and num_visible is not None:
        idx = visible_entries(num_visible, requests) if entry_idx is None else entry_idx.to(torch.int64)
        check_entries("sparse_attention", idx, entry_tables, entries.rows_per_block)
        columns.append([(entries, row_slots(idx, requests, entry_tables, entries.rows_per_block))])
    o = attend_slots(q, columns, sink, scale, out_dtype, operand_dtype)
    return rotate(o, positions, table, True)


def visible_entries(num_visible: torch.Tensor, requests: torch.Tensor) -> torch.Tensor:
    """Return the numbers [T, J] int64 of all entries a token may use, -1 filled up; J is the most that a token may."""
    visible = num_visible.masked_fill(requests < 0, 0)
    most = int(visible.max()) if visible.numel() else 0
    numbers = torch.arange(most, dtype=torch.int64, device=num_visible.device)
    return torch.where(numbers < visible[:, None], numbers, -1)


def check_entries(op: str, entry_idx: torch.Tensor, block_tables: torch.Tensor, rows_per_block: int) -> None:
    """Refuse entries that lie beyond the block tables.

    Raises:
        ValueError: an entry is not in -1 .. (blocks * rows_per_block) - 1.
    """
    if not entry_idx.numel():
        return
    low, high = (int(bound) for bound in entry_idx.aminmax())
    room = block_tables.shape[1] * rows_per_block
    if low < -1 or high >= room:
        raise ValueError(
            f"{op}: entries must be -1 or in 0 .. {room - 1} (the rows of {block_tables.shape[1]} blocks of "
            f"{rows_per_block}); got {low if low < -1 else high}. Extend the block table before the step."
        )


def attend_slots(
    q: torch.Tensor,
    columns: list[Alternatives],
    sink: torch.Tensor,
    scale: float,
    out_dtype: torch.dtype,
    operand_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return o [T, H, C] from the slots of every item.

    Args:
        q: [T, H, C].
        columns: groups of columns, the window first.
        sink: [H] fp32.
        scale: of the products.
        out_dtype: bf16 or fp32.
        operand_dtype: fp16 or fp32.
    """
    num_tokens, num_heads, width = q.shape
    columns = [_to_blocks(group) for group in columns]
    columns = [group for group in columns if group[0][1].shape[1]]
    y = torch.zeros(num_tokens, num_heads, width, dtype=out_dtype, device=q.device)
    num_blocks = sum(group[0][1].shape[1] for group in columns) // COLUMN_BLOCK
    token_bytes = 4 * num_blocks * (COLUMN_BLOCK * width + 2 * num_heads * width + 3 * COLUMN_BLOCK * num_heads)
    size = max(1, GROUP_BYTES // max(token_bytes, 1))
    for start in range(0, num_tokens if num_blocks else 0, size):
        part = slice(start, start + size)
        here = [[(pool, slots[part]) for pool, slots in group] for group in columns]
        rows, is_item = _gather(here)  # [T, J, C] fp32, [T, J]
        y[part] = _attend(q[part].to(torch.float32), rows, is_item, sink, scale, operand_dtype)
    return y


def _to_blocks(group: Alternatives) -> Alternatives:
    """Drop the columns after the last item of all tokens, then fill up with -1 to whole blocks."""
    num_columns = 0
    for _, slots in group:
        if slots.shape[1] and bool((slots[:, -1] >= 0).any()):  # as in a window, whose newest row is the last
            num_columns = slots.shape[1]
            break
        used = (slots >= 0).any(0).nonzero()
        num_columns = max(num_columns, int(used[-1]) + 1 if used.numel() else 0)
    pad = (0, -num_columns % COLUMN_BLOCK)
    if not pad[1] and num_columns == group[0][1].shape[1]:
        return group
    return [(pool, torch.nn.functional.pad(slots[:, :num_columns], pad, value=-1)) for pool, slots in group]


def _gather(columns: list[Alternatives]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows [T, J, C] fp32, zeros where there is no item, and where there is one; rows are decoded once."""
    is_item = torch.cat([_any([slots >= 0 for _, slots in group]) for group in columns], dim=1)
    if is_item.shape[0] == 1 and all(len(group) == 1 for group in columns):
        return torch.cat([read_rows(pool, slots) for ((pool, slots),) in columns], dim=1), is_item
    decoded, row_idx, num_rows = [], [], 0
    for group in columns:
        of_group = torch.empty(0)
        for pool, slots in group:
            distinct, idx = slots.unique(return_inverse=True)
            decoded.append(read_rows(pool, distinct))
            idx = idx + num_rows
            num_rows += distinct.shape[0]
            of_group = torch.where(slots >= 0, idx, of_group) if of_group.numel() else idx
        row_idx.append(of_group)
    idx = torch.cat(row_idx, dim=1)  # [T, J] into the decoded rows
    return torch.cat(decoded).index_select(0, idx.view(-1)).view(*idx.shape, -1), is_item


def _any(masks: list[torch.Tensor]) -> torch.Tensor:
    found = masks[0]
    for mask in masks[1:]:
        found = found | mask
    return found


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
