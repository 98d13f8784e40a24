# SPDX-License-Identifier: Apache-2.0
"""The numbers of tokens that decode steps are filled up to, so that a few shapes serve all of them.

A captured graph replays one shape. A decode step of T tokens is filled up to `bucket_of(T)` with tokens of nobody.
They cost no weight bytes: weights are read once whatever T is, and experts skip nobody's tokens. What they cost is
their share of the row work. Steps with a chunk of a prompt are not filled up: they are not captured.

    tokens           buckets                  filled up by at most
    1 to 8           every number             0
    9 to 16          steps of 2               1 token in 9     11 %
    17 to 32         steps of 4               3 in 17          18 %
    33 to 64         steps of 8               7 in 33          21 %
    65 to 128, ...   steps of an eighth of    15 in 65         23 %, below 25 % for any number
                     the power of two above

Over 1 to 64 tokens the mean is 6 %, with 20 shapes; powers of two alone would need 7 shapes and fill up by 34 %.
"""

from __future__ import annotations


def bucket_of(num_tokens: int) -> int:
    """Return the number of tokens that a decode step of `num_tokens` is filled up to.

    Raises:
        ValueError: num_tokens is negative.
    """
    if num_tokens < 0:
        raise ValueError(f"bucket_of: num_tokens must be >= 0; got {num_tokens}.")
    if num_tokens <= 8:
        return num_tokens
    step = 1 << ((num_tokens - 1).bit_length() - 3)
    return -(-num_tokens // step) * step


def buckets_up_to(most: int) -> list[int]:
    """Return every bucket that decode steps of 1 to `most` tokens use, ascending."""
    return sorted({bucket_of(num_tokens) for num_tokens in range(1, most + 1)})
