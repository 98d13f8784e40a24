# SPDX-License-Identifier: Apache-2.0
"""Sums and products whose order depends on the number of terms alone.

A reference must give a token the same bits whatever shares its call. `torch.sum` chooses its order from the shape and
strides of the whole tensor, and a BLAS its algorithm from the whole shape. So sums are elementwise additions here, and
matrix products have one fixed size each; only their number varies. `ops/matmul.py` does the same for weights.
"""

from __future__ import annotations

import functools

import torch

INNER_BLOCK = 512  # a BLAS splits sums of 1024 terms and more between threads
INNER_MULTIPLE = 4  # and treats the last one to three terms of others specially


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


def tile_products(x: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """Multiply each of B small matrices by the transpose of its tile.

    The bits of a product depend on its own two matrices and their sizes alone, not on B or on its place in the batch.

    Args:
        x: [B, M, K] fp32; callers keep M and K fixed.
        tiles: [B, N, K] fp32, or expanded to it; callers keep N fixed, a multiple of 4.

    Returns:
        [B, M, N] fp32.
    """
    spare = -x.shape[2] % INNER_MULTIPLE
    if spare:
        x, tiles = torch.nn.functional.pad(x, (0, spare)), torch.nn.functional.pad(tiles, (0, spare))
    if x.shape[2] <= INNER_BLOCK:
        return torch.bmm(x, tiles.transpose(1, 2))
    blocks = zip(x.split(INNER_BLOCK, 2), tiles.split(INNER_BLOCK, 2), strict=True)
    return functools.reduce(torch.add, [torch.bmm(part, tile.transpose(1, 2)) for part, tile in blocks])
