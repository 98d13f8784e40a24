# SPDX-License-Identifier: Apache-2.0
"""Sums and products whose order depends on the number of terms alone.

A reference must give a token the same bits whatever shares its call. `torch.sum` chooses its order from the shape and
strides of the whole tensor, and a BLAS its algorithm from the whole shape. So sums are elementwise additions here, and
matrix products have one fixed size each; only their number varies. `ops/matmul.py` does the same for weights.
"""

from __future__ import annotations

import functools

import torch

INNER_BLOCK = 512  # longer sums are split here rather than by a BLAS
SIZE_MULTIPLE = 4  # a BLAS treats the last one to three rows, columns or terms specially
MIN_BATCH = 2  # the threads share out a batch matrix by matrix, but split the sums of a single matrix


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
    on the number of threads. Callers therefore keep M, K and N fixed and let only B vary.

    Args:
        x: [B, M, K] fp32; B may be 0.
        y: [B, K, N] fp32, expanded over B or not.

    Returns:
        [B, M, N] fp32.
    """
    batch, num_columns = x.shape[0], y.shape[2]
    spare_inner, spare_columns = -x.shape[2] % SIZE_MULTIPLE, -num_columns % SIZE_MULTIPLE
    if spare_inner or spare_columns:
        x = torch.nn.functional.pad(x, (0, spare_inner))
        y = torch.nn.functional.pad(y, (0, spare_columns, 0, spare_inner))
    if 0 < batch < MIN_BATCH:
        x, y = x.expand(MIN_BATCH, -1, -1), y.expand(MIN_BATCH, -1, -1)
    if x.shape[2] <= INNER_BLOCK:
        product = torch.bmm(x, y)
    else:
        blocks = zip(x.split(INNER_BLOCK, 2), y.split(INNER_BLOCK, 1), strict=True)
        product = functools.reduce(torch.add, [torch.bmm(part, other) for part, other in blocks])
    return product[:batch, :, :num_columns].contiguous() if spare_columns else product[:batch]
