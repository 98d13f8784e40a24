# SPDX-License-Identifier: Apache-2.0
"""Where an absolute position lives in a ring of fixed capacity.

A pool of rings has one block per sequence: block `ring_idx` of `capacity` rows. Position p of that sequence is row
p % capacity of its ring, so nothing but the position says where a row is, and nothing has to be shifted. A step first
writes the rows of all its tokens and then reads, so a ring that must keep `num_kept` rows before a token needs
num_kept + max_chunk rows to survive a chunk of max_chunk tokens.
"""

from __future__ import annotations

import torch


def ring_slots(positions: torch.Tensor, capacity: int, *, ring_idx: torch.Tensor | int = 0) -> torch.Tensor:
    """Return the slots of positions in their rings.

    Args:
        positions: int64, any shape; absolute positions, -1 (or any negative number) for "none".
        capacity: rows of one ring.
        ring_idx: int, or int64 that broadcasts against positions: the ring of each position.

    Returns:
        int64 in the shape of positions: ring_idx * capacity + position % capacity, or -1 for a negative position.

    Raises:
        ValueError: capacity is not positive.
    """
    if capacity < 1:
        raise ValueError(f"ring_slots: capacity must be >= 1; got {capacity}.")
    return torch.where(positions >= 0, positions % capacity + ring_idx * capacity, -1)


def window_read_slots(
    positions: torch.Tensor, window: int, capacity: int, *, ring_idx: torch.Tensor | int = 0
) -> torch.Tensor:
    """Return the slots of the last `window` positions up to and including each position, oldest first.

    Args:
        positions: [T] int64, absolute.
        window: positions a token sees, itself included.
        capacity: rows of one ring, at least window (and window + max_chunk - 1 to survive a chunk).
        ring_idx: int, or [T] int64: the ring of each token.

    Returns:
        [T, window] int64. Column j is position - window + 1 + j, or -1 before the start of the sequence.

    Raises:
        ValueError: window is not in 1 .. capacity.
    """
    if not 1 <= window <= capacity:
        raise ValueError(f"window_read_slots: window must be in 1 .. capacity = {capacity}; got {window}.")
    back = torch.arange(1 - window, 1, dtype=torch.int64, device=positions.device)
    rings = ring_idx[:, None] if isinstance(ring_idx, torch.Tensor) else ring_idx
    return ring_slots(positions[:, None] + back, capacity, ring_idx=rings)


def paged_slots(row_idx: torch.Tensor, block_table: torch.Tensor, rows_per_block: int) -> torch.Tensor:
    """Return the slots of the rows of one sequence that lie in its pages.

    Args:
        row_idx: int64, any shape; number of the row in the sequence (an entry), or -1 for "none".
        block_table: [num_blocks] integers, the sequence's pages in order.
        rows_per_block: rows of one page.

    Returns:
        int64 in the shape of row_idx: block_table[w // P] * P + w % P, or -1 where row_idx is negative.

    Raises:
        ValueError: a row lies beyond the block table, or on a page that is -1 there.
    """
    pages = row_idx.clamp(min=0) // rows_per_block
    if row_idx.numel() and int(row_idx.max()) >= block_table.shape[0] * rows_per_block:
        raise ValueError(
            f"paged_slots: row {int(row_idx.max())} needs page {int(row_idx.max()) // rows_per_block} of the sequence; "
            f"its block table has {block_table.shape[0]} pages of {rows_per_block} rows. Extend the sequence first."
        )
    if not block_table.shape[0]:
        return torch.full_like(row_idx, -1)
    blocks = block_table.to(torch.int64)[pages]
    if bool(((blocks < 0) & (row_idx >= 0)).any()):
        raise ValueError("paged_slots: a row lies on a page that is -1 in the block table. Extend the sequence first.")
    return torch.where(row_idx >= 0, blocks * rows_per_block + row_idx % rows_per_block, -1)
