# SPDX-License-Identifier: Apache-2.0
"""Host side of fp8_linear for many tokens: tiles of 128 weight rows by 64 or 128 tokens on wgmma.

The weight is the M side of the instruction and comes from registers: two consumer warpgroups load the codes of 64 rows
each straight from global memory, row-major as they are, and expand them to fp16 while the tensor cores work. Tokens,
expanded to fp16 before (parts/fp8_expand.py), are the N side: a producer warp brings 128 columns of them a stage by
TMA, with their scales of those columns. The products of 128 columns are added from zero; then both scales multiply them
in fp32 and they join the sums. Two blocks of neighboring rows form a cluster: each brings half of the tokens to both.

Hopper's FP8 instructions would be twice as fast, but they add with some 14 bits: not this operation (docs/kernels.md).
"""

from __future__ import annotations

import dataclasses

import torch

from megamoe.kernels.parts.fp8_expand import expand_fp8
from megamoe.kernels.parts.fp8_stream import DTYPE_NAMES, scale_bytes
from megamoe.kernels.store import kernel

BLOCK_ROWS = 128
CONSUMERS = 256
THREADS = CONSUMERS + 128
OUT_STRIDE = BLOCK_ROWS + 8  # values between tokens of the output tile in shared memory: rows start in other banks
SMALL_BLOCK, LARGE_BLOCK = 64, 128


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        block_tokens: tokens of a tile.
        out: "bf16" or "f32".
        cluster: blocks that share the loads of tokens: 1 or 2.
    """

    block_tokens: int
    out: str
    cluster: int = 2

    @property
    def stages(self) -> int:
        """Stages of 128 columns of tokens in shared memory."""
        return 5 if self.block_tokens == LARGE_BLOCK else 8


def tile_linear(
    x: torch.Tensor, x_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """Multiply with wgmma; arguments as fp8_stream.stream_linear has them."""
    num_tokens = x.shape[0]
    values, factors = expand_fp8(x, x_scales)
    out = torch.empty(num_tokens, w.shape[0], dtype=out_dtype, device=w.device)
    config = Config(SMALL_BLOCK if num_tokens <= SMALL_BLOCK else LARGE_BLOCK, DTYPE_NAMES[out_dtype])
    kernel(__name__, config, w.device)(values, factors, w, *scale_bytes(w_scales), out)
    return out
