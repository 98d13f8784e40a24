# SPDX-License-Identifier: Apache-2.0
"""Sums and products whose order depends on the number of terms alone.

A reference must give a token the same bits whatever shares its call. `torch.sum` chooses its order from the shape and
strides of the whole tensor, and a BLAS its algorithm from the whole shape. So sums are elementwise additions here, and
matrix products have one fixed size each; only their number varies. `ops/matmul.py` does the same for weights.
"""

from __future__ import annotations

import torch

MIN_BATCH = 2


def sum_by_halves(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum one dimension: the first half is added to the second until one term is left.

    An odd last term waits for the next round. Adding zeros at the end may change the order; callers keep the length of
    `dim` fixed.

    Args:
        x: any shape; `dim` must have at least one term.
        dim: the dimension to sum, negative or not.

    Returns:
        x without `dim`, same dtype.

    Raises:
        ValueError: there is no term to sum.
    """
    length = x.shape[dim]
    if length < 1:
        raise ValueError(f"sum_by_halves: dimension {dim} of {list(x.shape)} has no terms.")
    while length > 1:
        half = length // 2
        added = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
        x = torch.cat((added, x.narrow(dim, length - 1, 1)), dim) if length % 2 else added
        length -= half
    return x.squeeze(dim)


def batched_matmul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Multiply B pairs of small matrices.

    The bits of a product depend on its own two matrices and their sizes alone: not on B, on its place in the batch, or
    on the number of threads. Threads share out a batch matrix by matrix, but they split the sums of a single matrix, so
    a batch of one is computed as two. Callers keep M, K and N fixed and let only B vary.

    Args:
        x: [B, M, K] fp32, expanded over B or not; B may be 0.
        y: [B, K, N] fp32, expanded over B or not.

    Returns:
        [B, M, N] fp32.
    """
    batch = x.shape[0]
    if 0 < batch < MIN_BATCH:
        return torch.bmm(x.expand(MIN_BATCH, -1, -1), y.expand(MIN_BATCH, -1, -1))[:batch]
    return torch.bmm(x, y)
