# SPDX-License-Identifier: Apache-2.0
"""The part-filled compression blocks, derived from absolute positions.

Every `ratio` tokens of a sequence become one entry. The raw rows of recent tokens are kept in a ring (see ring.py), so
which rows an entry needs follows from its number alone: entry w pools positions w * ratio .. (w + 1) * ratio - 1 and,
when blocks overlap, the `ratio` positions before them too. There is no counter, nothing is shifted, and any split of a
sequence into chunks reads the same rows. Dropping a token (a rejected draft) is moving the position back.

Causality  a token at position t may use entry w iff w < (t + 1) // ratio: the token that completes a block sees it.
Source     DeepSeek-V4 technical report (arXiv 2606.19348), compressed sparse attention
"""

from __future__ import annotations

import torch

from megamoe.cache.ring import ring_slots


def num_rows_pooled(ratio: int, overlap: bool) -> int:
    """Return how many raw rows one entry pools: ratio, or twice that when blocks overlap.

    Raises:
        ValueError: ratio is not positive.
    """
    if ratio < 1:
        raise ValueError(f"compressor state: ratio must be >= 1; got {ratio}.")
    return ratio * (2 if overlap else 1)


def state_capacity(ratio: int, overlap: bool, max_chunk: int) -> int:
    """Return the rows a ring of raw rows needs to survive chunks of up to `max_chunk` tokens.

    The oldest row that any block end inside a chunk needs lies num_rows_pooled - 1 positions before the chunk's first
    token; one row more keeps the count simple.

    Raises:
        ValueError: ratio or max_chunk is not positive.
    """
    if max_chunk < 1:
        raise ValueError(f"compressor state: max_chunk must be >= 1; got {max_chunk}.")
    return num_rows_pooled(ratio, overlap) + max_chunk


def completed_entries(start_pos: int, num_tokens: int, ratio: int) -> range:
    """Return the numbers of the entries that tokens start_pos .. start_pos + num_tokens - 1 complete.

    Raises:
        ValueError: a number is negative, or ratio is not positive.
    """
    if start_pos < 0 or num_tokens < 0 or ratio < 1:
        raise ValueError(
            f"completed_entries: start_pos and num_tokens must be >= 0 and ratio >= 1; got {start_pos}, {num_tokens} "
            f"and {ratio}."
        )
    return range(start_pos // ratio, (start_pos + num_tokens) // ratio)


def num_visible_entries(positions: torch.Tensor, ratio: int) -> torch.Tensor:
    """Return how many entries a token at each position may use, int32 in the shape of positions: (t + 1) // ratio."""
    return ((positions + 1) // ratio).to(torch.int32)


def block_row_slots(
    entry_idx: torch.Tensor, ratio: int, overlap: bool, capacity: int, *, ring_idx: torch.Tensor | int = 0
) -> torch.Tensor:
    """Return the slots of the raw rows that each entry pools, oldest first.

    Args:
        entry_idx: [W] int64, numbers of completed entries.
        ratio: tokens per entry.
        overlap: entries pool the block before their own too.
        capacity: rows of one ring; see state_capacity.
        ring_idx: int, or [W] int64: the ring of each entry's sequence.

    Returns:
        [W, num_rows_pooled] int64, -1 for positions before the start of the sequence.

    Raises:
        ValueError: ratio is not positive, or a ring is smaller than one block needs.
    """
    num_rows = num_rows_pooled(ratio, overlap)
    if capacity < num_rows:
        raise ValueError(
            f"block_row_slots: capacity must be at least the {num_rows} rows of a block; got {capacity}. "
            f"Use state_capacity."
        )
    back = torch.arange(-num_rows, 0, dtype=torch.int64, device=entry_idx.device)
    rings = ring_idx[:, None] if isinstance(ring_idx, torch.Tensor) else ring_idx
    return ring_slots((entry_idx[:, None] + 1) * ratio + back, capacity, ring_idx=rings)
