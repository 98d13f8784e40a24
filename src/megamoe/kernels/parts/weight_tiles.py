# SPDX-License-Identifier: Apache-2.0
"""Host side of y = x w^T for many tokens: tiles of 256 weight rows by 128 tokens on wgmma.

The weight is the M side of the instruction and comes from registers: two consumer warpgroups load codes and scales of
128 rows each straight from global memory one step ahead, decode them while the tensor cores work on the step before,
and never write them to shared memory. Blocks are persistent: while consumers store one tile, the producer is already
loading for the next. Tokens are the N side: one producer warp brings 128 x 64 of them a step through TMA.
Four-bit weights make the tall side cheap, so a block reads 25 KB a step and needs no cluster to share loads.
"""

from __future__ import annotations

import dataclasses

import torch

from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.kernels.parts.linear_stream import DTYPE_NAMES, num_multiprocessors
from megamoe.kernels.store import kernel

BLOCK_ROWS = 256
BLOCK_TOKENS = 128
STAGES = 8
CONSUMERS = 256
THREADS = CONSUMERS + 128
OUT_STRIDE = BLOCK_ROWS + 8  # values between tokens of the output tile in shared memory: rows start in other banks


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        num_columns: K.
        scaled: x is code * block scale * 2^-7 of NVFP4 activations, and each token has a tensor scale.
        out: "bf16" or "f32".
    """

    num_columns: int
    scaled: bool
    out: str


def tile_linear(
    x: torch.Tensor, x_tensor_scale: torch.Tensor | None, w: NvFp4Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """Multiply with wgmma.

    Args:
        x: [T, K] bf16, contiguous.
        x_tensor_scale: [T] fp32 of expanded NVFP4 activations, or None.
        w: [N, K] in fragment order.
        out_dtype: bf16 or fp32.
    """
    num_rows, num_columns = w.shape
    out = torch.empty(x.shape[0], num_rows, dtype=out_dtype, device=w.device)
    if out.numel() == 0:
        return out
    config = Config(num_columns, x_tensor_scale is not None, DTYPE_NAMES[out_dtype])
    scales = (w.tensor_scale.view(1),) if x_tensor_scale is None else (w.tensor_scale.view(1), x_tensor_scale)
    num_tiles = -(-num_rows // BLOCK_ROWS) * -(-x.shape[0] // BLOCK_TOKENS)
    blocks = min(num_multiprocessors(w.device), num_tiles)
    kernel(__name__, config, w.device)(x, w.codes, w.scales.view(torch.uint8), *scales, out, blocks)
    return out
