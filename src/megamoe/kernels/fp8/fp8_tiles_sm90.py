# SPDX-License-Identifier: Apache-2.0
"""Host side of fp8_linear for many tokens: tiles of 128 or 256 weight rows by 64 or 128 tokens on wgmma.

The weight is the M side of the instruction and comes from registers: two consumer warpgroups expand the codes while the
tensor cores work. Tokens, expanded before (fp8/fp8_expand.py), are the N side. A producer warp brings 128 columns a
stage by TMA. One block a multiprocessor takes one tile after another, and while it stores one, the next is on its way.

E8M0 scales are folded: code * scale is a bf16 number on either side, and products are added in fp32 over all of K.
Codes come by TMA, too. Where a side has fp32 scales, codes alone are multiplied, in fp16: the products of 128 columns
are added from zero, then both scales multiply them in fp32 and they join the sums; a lane loads its codes itself.

Hopper's FP8 instructions would be twice as fast, but they add with some 14 bits: not this operation (docs/kernels.md).
"""

from __future__ import annotations

import dataclasses

import torch

from megamoe.kernels.fp8.fp8_expand import expand_fp8
from megamoe.kernels.fp8.fp8_stream import BLOCK, DTYPE_NAMES, num_multiprocessors, scale_bytes
from megamoe.kernels.store import kernel

CONSUMERS = 256
THREADS = CONSUMERS + 128
SHARED_BYTES = 208 * 1024  # for stages
MAX_STAGES = 6
GROUP_ROWS = 128  # rows of one wgmma of both consumer warpgroups
TILE_TIMES = {(2 * GROUP_ROWS, 128): 2.0, (GROUP_ROWS, 128): 1.03, (GROUP_ROWS, 64): 0.75}
"""Rows and tokens of a tile → how long one takes, as measured with many columns: small tiles wait more."""
UNDO = 2.0**7  # folded weights are held times 2^-7, so that the factor of their bytes stays in bf16's range


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        block_rows: weight rows of a tile, 128 or 256 (folded alone).
        block_tokens: tokens of a tile, 64 or 128.
        folded: scales are part of the bf16 operands.
        out: "bf16" or "f32".
    """

    block_rows: int
    block_tokens: int
    folded: bool
    out: str

    @property
    def stage_bytes(self) -> int:
        """Bytes of 128 columns of a tile's operands."""
        return BLOCK * (2 * self.block_tokens + (self.block_rows if self.folded else 0))

    @property
    def stages(self) -> int:
        """Stages in shared memory."""
        return min(MAX_STAGES, SHARED_BYTES // self.stage_bytes)


def tile_linear(
    x: torch.Tensor, x_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """Multiply with wgmma; arguments as fp8_stream.stream_linear has them."""
    num_tokens, num_rows = x.shape[0], w.shape[0]
    folded = x_scales.dtype == w_scales.dtype == torch.float8_e8m0fnu
    values, factors = expand_fp8(x, x_scales, folded)
    out = torch.empty(num_tokens, num_rows, dtype=out_dtype, device=w.device)
    multiprocessors = num_multiprocessors(w.device)
    rows, tokens = tile_shape(num_rows, num_tokens, folded, multiprocessors)
    config = Config(rows, tokens, folded, DTYPE_NAMES[out_dtype])
    scales = (*(() if folded else (factors,)), *scale_bytes(w_scales))
    blocks = min(multiprocessors, -(-num_rows // rows) * -(-num_tokens // tokens))
    kernel(__name__, config, w.device)(values, w, *scales, out, blocks)
    return out


def tile_shape(num_rows: int, num_tokens: int, folded: bool, multiprocessors: int) -> tuple[int, int]:
    """Return rows and tokens of the tiles that should end first. Sums have the same order in all of them."""

    def time(shape: tuple[int, int]) -> float:
        tiles = -(-num_rows // shape[0]) * -(-num_tokens // shape[1])
        return -(-tiles // multiprocessors) * TILE_TIMES[shape]

    return min((shape for shape in TILE_TIMES if folded or shape[0] == GROUP_ROWS), key=time)
