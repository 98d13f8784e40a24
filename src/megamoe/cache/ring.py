# SPDX-License-Identifier: Apache-2.0
"""Where an absolute position lives: in a ring of fixed capacity, or in the pages of its sequence.

A pool of rings has one block per sequence: block `ring_idx` of `capacity` rows. Position p of that sequence is row
p % capacity of its ring, so nothing but the position says where a row is, and nothing has to be shifted. A step first
writes the rows of all its tokens and then reads, so a ring that must keep `num_kept` rows before a token needs
num_kept + max_chunk rows to survive a chunk of max_chunk tokens.

These functions are integer arithmetic. They take numpy arrays, with which an engine plans a step on the host (a tenth
of the cost of small tensors), or tensors; the result is of the same kind.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]
Positions = TypeVar("Positions", IntArray, torch.Tensor)


def where_not_negative(positions: Positions, slots: Positions) -> Positions:
    """Return `slots`, and -1 where the position is negative."""
    if isinstance(positions, torch.Tensor):
        return torch.where(positions >= 0, slots, -1)
    return np.where(positions >= 0, slots, -1)


def ring_slots(positions: Positions, capacity: int, *, ring_idx: Any = 0) -> Positions:
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
    slots: Positions = where_not_negative(positions, positions % capacity + ring_idx * capacity)
    return slots


def window_read_slots(positions: Positions, window: int, capacity: int, *, ring_idx: Any = 0) -> Positions:
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
    rings = ring_idx if isinstance(ring_idx, int) else ring_idx[:, None]
    return ring_slots(positions[:, None] + offsets(positions, 1 - window, 1), capacity, ring_idx=rings)


def offsets(like: Positions, start: int, stop: int) -> Positions:
    """Return start .. stop - 1 as an array of the kind of `like`."""
    if isinstance(like, torch.Tensor):
        return torch.arange(start, stop, dtype=torch.int64, device=like.device)
    return np.arange(start, stop, dtype=np.int64)


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
    tables = block_table.cpu().numpy()[None]
    row = row_idx.cpu().numpy()
    slots = batch_paged_slots(row, np.zeros((1,) * row.ndim, dtype=np.int64), tables, rows_per_block)
    return torch.from_numpy(slots).to(row_idx.device)


def batch_paged_slots(
    row_idx: IntArray, sequence_idx: IntArray, block_tables: npt.NDArray[Any], rows_per_block: int
) -> IntArray:
    """Return the slots of rows that lie in the pages of several sequences.

    Args:
        row_idx: int64, any shape; number of the row in its sequence (an entry), or -1 for "none".
        sequence_idx: int64 that broadcasts against row_idx: the line of block_tables of each row.
        block_tables: [B, num_blocks] integers, each sequence's pages in order; -1 where it has none.
        rows_per_block: rows of one page.

    Returns:
        int64 in the shape of row_idx: the page of row w * P plus w % P, or -1 where row_idx is negative.

    Raises:
        ValueError: a row lies beyond its block table, or on a page that is -1 there.
    """
    if not row_idx.size:
        return row_idx
    last = int(row_idx.max())
    if last >= block_tables.shape[1] * rows_per_block:
        raise ValueError(
            f"paged_slots: row {last} needs page {last // rows_per_block} of the sequence; its block table has "
            f"{block_tables.shape[1]} pages of {rows_per_block} rows. Extend the sequence first."
        )
    if last < 0:
        return row_idx.clip(-1, -1)
    blocks = block_tables[sequence_idx, row_idx.clip(0) // rows_per_block].astype(np.int64)
    if bool(((blocks < 0) & (row_idx >= 0)).any()):
        raise ValueError("paged_slots: a row lies on a page that is -1 in the block table. Extend the sequence first.")
    return where_not_negative(row_idx, blocks * rows_per_block + row_idx % rows_per_block)
