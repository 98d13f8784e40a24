# SPDX-License-Identifier: Apache-2.0
"""Where a row of a sequence lies in a pool: the one address formula of every cache operation.

    slot of row w of request r = block_tables[r, (w // P) % n] * P + w % P        P rows a block, n blocks a request

A ring is a block table of the few blocks that a sequence keeps, read modulo: with n = 1, block r and P rows, position p
is row p % P of ring r. Pages of a sequence are a table as long as the longest sequence, so that nothing wraps. A window
that another engine keeps in blocks is the same formula with its own n and P.

Rows of the current step may lie elsewhere: a prefill chunk is longer than a ring, so its rows lie in the step area, one
row per token of the step, until the end of the layer. `recent_slots` says for the rows behind each token in which of
the two they are: token t's request began the step at token first_idx[t], so d rows back is token t - d of the step
where d <= t - first_idx[t], and a row of the ring otherwise.

These functions are references: they look at values. No door calls them.
"""

from __future__ import annotations

import torch


def row_slots(
    row_idx: torch.Tensor, requests: torch.Tensor, block_tables: torch.Tensor, rows_per_block: int
) -> torch.Tensor:
    """Return the slots of rows of requests.

    Args:
        row_idx: [T] or [T, J] int64, number of the row in its sequence; negative for nobody's.
        requests: [T] int32, the row of `block_tables` of each token; negative for nobody.
        block_tables: [R, n] int32.
        rows_per_block: P.

    Returns:
        int64 in the shape of row_idx, -1 where the row or the request is nobody's.

    Raises:
        ValueError: a row lies on a block that is negative in the table, or a request is not in it.
    """
    num_requests, num_blocks = block_tables.shape
    is_row = row_idx >= 0
    if not num_blocks or not num_requests:
        if bool((is_row & _beside(requests >= 0, row_idx)).any()):
            raise ValueError("row_slots: the block table is empty and a row of it is asked for. Extend the table.")
        return torch.full_like(row_idx, -1)
    if requests.numel():
        low, high = (int(bound) for bound in requests.aminmax())
        if high >= num_requests:
            raise ValueError(
                f"row_slots: requests must be -1 or in 0 .. {num_requests - 1}, the rows of block_tables; got {high}."
            )
        if low < 0:
            is_row &= _beside(requests >= 0, row_idx)
            requests = requests.clamp(min=0)
    if num_blocks == 1:  # a ring of one block: a number a token, whatever the number of its rows
        blocks = _beside(block_tables[requests, 0], row_idx)
    else:
        block = torch.floor_divide(row_idx, rows_per_block).remainder_(num_blocks)
        blocks = block_tables[_beside(requests, row_idx), block]
    if blocks.numel() and int(blocks.min()) < 0 and bool(((blocks < 0) & is_row).any()):
        raise ValueError(
            "row_slots: a row lies on a block that is negative in the block table. Extend the table before the step."
        )
    slots = (row_idx % rows_per_block).add_(blocks.to(torch.int64), alpha=rows_per_block)
    return slots.masked_fill_(is_row.logical_not_(), -1)


def _beside(of_token: torch.Tensor, row_idx: torch.Tensor) -> torch.Tensor:
    """Return a number per token [T] in the dimensions of rows [T] or [T, J]."""
    return of_token[:, None] if row_idx.dim() == 2 else of_token


def recent_slots(
    ends: torch.Tensor,
    num_rows: int,
    requests: torch.Tensor,
    block_tables: torch.Tensor,
    rows_per_block: int,
    first_idx: torch.Tensor | None,
    tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return where the last `num_rows` rows of each token are, oldest first.

    Args:
        ends: [T] int64, position of the newest row each token reads; negative for nobody.
        num_rows: rows to go back, the newest included.
        requests: [T] int32.
        block_tables: [R, n] int32, of the rings.
        rows_per_block: of the rings.
        first_idx: [T] int32, the step's first token of the same request, where the rows of this step lie in the step
            area; None where they are in the rings already.
        tokens: [T] int64, the numbers of these tokens in the step; None where they are 0 .. T - 1.

    Returns:
        (slots [T, num_rows] in the rings, slots [T, num_rows] in the step area or None); -1 where the row is in the
        other one, or before the start of the sequence.
    """
    back = torch.arange(num_rows - 1, -1, -1, dtype=torch.int64, device=ends.device)
    positions = ends[:, None] - back
    if first_idx is None:
        return row_slots(positions, requests, block_tables, rows_per_block), None
    tokens = torch.arange(ends.shape[0], dtype=torch.int64, device=ends.device) if tokens is None else tokens
    token = tokens[:, None] - back
    is_new = (token >= first_idx[:, None]) & (positions >= 0) & (requests >= 0)[:, None]
    in_ring = row_slots(positions.masked_fill(is_new, -1), requests, block_tables, rows_per_block)
    return in_ring, torch.where(is_new, token, -1)
