# SPDX-License-Identifier: Apache-2.0
"""row_invariant_matmul: the one matrix product that all references use.

Math       y[m, n] = sum_k  x[m, k] * w[n, k]
Numerics   fp32 products and fp32 accumulation. The sum over k is split into blocks of 512, added in ascending order.
           A row of the result has the same bits whatever other rows are in the call and however many there are, so
           decoding a token alone equals computing it inside a batch.

Why it is written like this: a BLAS chooses its algorithm by the whole shape. The row-vector case, small row counts
and, with several threads, long sums (split between threads when K >= 1024) all add in another order than the large
matrix does. So the shape of every BLAS call is fixed here: always 8 rows (padded with zeros), never more than 512 of
K, and a number of columns that is a multiple of 4 (the last one to three columns of a tile are a special case, too).
The calls made for a token then only depend on N and K.
"""

from __future__ import annotations

import torch

TILE_ROWS = 8
BLOCK_K = 512
COLUMN_MULTIPLE = 4


def row_invariant_matmul(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Multiply x by the transpose of w so that a row's result does not depend on the other rows.

    Args:
        x: [M, K] fp32. M and K may be 0.
        w: [N, K] fp32.

    Returns:
        [M, N] fp32, contiguous, newly allocated.

    Raises:
        ValueError: the shapes do not agree.
        TypeError: x or w is not fp32.
    """
    if x.dtype != torch.float32 or w.dtype != torch.float32:
        raise TypeError(f"row_invariant_matmul: x and w must be float32; got {x.dtype} and {w.dtype}.")
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"row_invariant_matmul: needs x [M, K] and w [N, K]; got {list(x.shape)} and {list(w.shape)}.")
    num_rows, num_k = x.shape
    num_columns = w.shape[0]
    if num_k == 0:
        return x.new_zeros(num_rows, num_columns)
    spare_rows = -num_rows % TILE_ROWS
    spare_columns = -num_columns % COLUMN_MULTIPLE
    if spare_rows:
        x = torch.constant_pad_nd(x, (0, 0, 0, spare_rows))
    if spare_columns:
        w = torch.constant_pad_nd(w, (0, 0, 0, spare_columns))
    x, wt = x.contiguous(), w.t()  # [M, K], [K, N]
    if x.shape[0] == TILE_ROWS:  # the common case when decoding
        y = torch.mm(x[:, :BLOCK_K], wt[:BLOCK_K])
        _add_remaining_blocks(x, wt, y)
    else:
        y = x.new_empty(x.shape[0], wt.shape[1])  # [M, N]
        for row in range(0, x.shape[0], TILE_ROWS):
            x_tile, y_tile = x[row : row + TILE_ROWS], y[row : row + TILE_ROWS]
            torch.mm(x_tile[:, :BLOCK_K], wt[:BLOCK_K], out=y_tile)
            _add_remaining_blocks(x_tile, wt, y_tile)
    if spare_columns:
        return y[:num_rows, :num_columns].contiguous()
    return y[:num_rows] if spare_rows else y


def _add_remaining_blocks(x: torch.Tensor, wt: torch.Tensor, y: torch.Tensor) -> None:
    for start in range(BLOCK_K, x.shape[1], BLOCK_K):
        stop = start + BLOCK_K
        y.addmm_(x[:, start:stop], wt[start:stop])
