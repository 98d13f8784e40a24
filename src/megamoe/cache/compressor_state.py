# SPDX-License-Identifier: Apache-2.0
"""The part-filled compression blocks, derived from absolute positions.

Every `ratio` tokens of a sequence become one entry. The raw rows of recent tokens are kept in a ring, so
which rows an entry needs follows from its number alone: entry w pools positions w * ratio .. (w + 1) * ratio - 1 and,
when blocks overlap, the `ratio` positions before them too. There is no counter, nothing is shifted, and any split of a
sequence into chunks reads the same rows. Dropping a token (a rejected draft) is moving the position back.

Causality  a token at position t may use entry w iff w < (t + 1) // ratio: the token that completes a block sees it.
Source     DeepSeek-V4 technical report (arXiv 2606.19348), compressed sparse attention
"""

from __future__ import annotations


def num_rows_pooled(ratio: int, overlap: bool) -> int:
    """Return how many raw rows one entry pools: ratio, or twice that when blocks overlap.

    Raises:
        ValueError: ratio is not positive.
    """
    if ratio < 1:
        raise ValueError(f"compressor state: ratio must be >= 1; got {ratio}.")
    return ratio * (2 if overlap else 1)


def state_capacity(ratio: int, overlap: bool, ring_tokens: int) -> int:
    """Return the rows a ring of raw rows needs to survive steps that write up to `ring_tokens` tokens into it.

    The oldest row that any block end inside a step needs lies num_rows_pooled - 1 positions before the step's first
    token; one row more keeps the count simple.

    Raises:
        ValueError: ratio or ring_tokens is not positive.
    """
    if ring_tokens < 1:
        raise ValueError(f"compressor state: ring_tokens must be >= 1; got {ring_tokens}.")
    return num_rows_pooled(ratio, overlap) + ring_tokens
