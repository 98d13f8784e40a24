# SPDX-License-Identifier: Apache-2.0
"""Host side of FP8 linears for many tokens: tiles of 128 or 256 weight rows by 64 or 128 tokens on wgmma.

The weight is the M side of the instruction and comes from registers: two consumer warpgroups expand the codes while the
tensor cores work. Tokens, expanded before (fp8/fp8_expand.py), are the N side. A producer warp brings 128 columns a
stage by TMA. One block a multiprocessor takes one tile after another, and while it stores one, the next is on its way.

E8M0 scales are folded: code * scale is a bf16 number on either side, and products are added in fp32 over all of K.
Codes come by TMA, too. Where a side has fp32 scales, codes alone are multiplied, in fp16: the products of 128 columns
are added from zero, then both scales multiply them in fp32 and they join the sums; a lane loads its codes itself.

Hopper's FP8 instructions would be twice as fast, but they add with some 14 bits: not this operation (docs/kernels.md).
"""

from __future__ import annotations

import torch

from megamoe.kernels.fp8.fp8_expand import expand_fp8
from megamoe.kernels.fp8.fp8_stream import scale_bytes
from megamoe.kernels.fp8.fp8_tiles_sm90_config import GROUP_ROWS, Config
from megamoe.kernels.parts.launch import DTYPE_NAMES, num_multiprocessors
from megamoe.kernels.store import kernel

TILE_TIMES = {(2 * GROUP_ROWS, 128): 2.0, (GROUP_ROWS, 128): 1.03, (GROUP_ROWS, 64): 0.75}
"""Rows and tokens of a tile → how long one takes, as measured with many columns: small tiles wait more."""


def tile_linear(
    x: torch.Tensor, x_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """Multiply with wgmma; arguments as fp8_stream.stream_linear has them."""
    out = torch.empty(x.shape[0], w.shape[0], dtype=out_dtype, device=w.device)
    folded = are_folded(x_scales, w_scales)
    values, factors = expand_fp8(x, x_scales, folded)
    multiply_tiles(values, factors, w, w_scales, out)
    return out


def grouped_tile_linear(
    x: torch.Tensor, x_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """Multiply groups with wgmma, one launch a group.

    Args:
        x: [T, G, K] uint8 codes, contiguous and 16-byte aligned.
        x_scales: [T, G, K/128] E8M0 or fp32, contiguous.
        w: [G, N, K] uint8 codes, contiguous and 16-byte aligned.
        w_scales: [G, ceil(N/128), K/128] E8M0 or fp32, contiguous.
        out_dtype: bf16 or fp32.

    Returns:
        [T, G, N].
    """
    num_tokens, num_groups, _ = x.shape
    out = torch.empty(num_tokens, num_groups, w.shape[1], dtype=out_dtype, device=w.device)
    folded = are_folded(x_scales, w_scales)
    if folded:  # one expansion for all; a group's tokens are rows of a wider matrix
        values = expand_fp8(x.flatten(0, 1), x_scales.flatten(0, 1), folded)[0].view(x.shape)
    for group in range(num_groups):
        if folded:
            tokens, factors = values[:, group], None
        else:
            tokens, factors = expand_fp8(x[:, group].contiguous(), x_scales[:, group].contiguous(), folded)
        multiply_tiles(tokens, factors, w[group], w_scales[group], out[:, group])
    return out


def are_folded(x_scales: torch.Tensor, w_scales: torch.Tensor) -> bool:
    """Return whether scales are powers of two on both sides, so that they are part of the operands."""
    return x_scales.dtype == w_scales.dtype == torch.float8_e8m0fnu


def multiply_tiles(
    values: torch.Tensor, factors: torch.Tensor | None, w: torch.Tensor, w_scales: torch.Tensor, out: torch.Tensor
) -> None:
    """Launch the tile kernel.

    Args:
        values: [T, K] bf16 where scales are folded, else fp16, in the order of expand_fp8; rows at any stride.
        factors: as expand_fp8 returns them; unused where scales are folded.
        w: [N, K] uint8 codes.
        w_scales: [ceil(N/128), K/128].
        out: [T, N] bf16 or fp32, written; rows at any stride that is a multiple of 16.
    """
    num_tokens, num_rows = out.shape
    folded = values.dtype == torch.bfloat16
    multiprocessors = num_multiprocessors(w.device)
    rows, tokens = tile_shape(num_rows, num_tokens, folded, multiprocessors)
    config = Config(rows, tokens, folded, DTYPE_NAMES[out.dtype])
    scales = (*(() if folded else (factors,)), *scale_bytes(w_scales))
    blocks = min(multiprocessors, -(-num_rows // rows) * -(-num_tokens // tokens))
    kernel(config, w.device)(values, w, *scales, out, blocks)


def tile_shape(num_rows: int, num_tokens: int, folded: bool, multiprocessors: int) -> tuple[int, int]:
    """Return rows and tokens of the tiles that should end first. Sums have the same order in all of them."""

    def time(shape: tuple[int, int]) -> float:
        tiles = -(-num_rows // shape[0]) * -(-num_tokens // shape[1])
        return -(-tiles // multiprocessors) * TILE_TIMES[shape]

    return min((shape for shape in TILE_TIMES if folded or shape[0] == GROUP_ROWS), key=time)
