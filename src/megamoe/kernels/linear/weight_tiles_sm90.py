# SPDX-License-Identifier: Apache-2.0
"""Host side of y = x w^T in tiles on wgmma: NVFP4 or bf16 weights, one matrix or one for each group of the input.

The weight is the M side of the instruction, tokens are the N side. A producer warp brings tokens and weights of a step
(64 columns) by TMA, several stages deep. NVFP4 weights travel as codes and scales in fragment order; each warp of the
consumer warpgroups loads those of its own rows from shared memory and decodes them into registers, while the tensor
cores work on the step before. bf16 weights are read by the instruction where they lie.

Blocks are persistent: while consumers scale one tile, the producer is already loading for the next, and three warps
that have nothing else to do carry finished tiles from shared memory to global memory. Tiles are visited in bands of
token blocks, so that a weight comes from memory about once and not once for every 128 tokens.

How large a tile is decides no bit: every output is the sum over K in steps of 16 in ascending order.
"""

from __future__ import annotations

import torch

from megamoe.formats.fragment_layout import TILE_COLUMNS
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.kernels.linear.weight_tiles_sm90_config import Config
from megamoe.kernels.parts.launch import DTYPE_NAMES, num_multiprocessors
from megamoe.kernels.store import kernel

NVFP4_TILES = {(128, 256): 600, (256, 128): 620, (128, 128): 350, (128, 64): 255, (64, 128): 225, (64, 64): 215}
"""Rows and tokens of the tiles that exist → nanoseconds of a step, measured on an H100."""

BF16_TILES = {(128, 256): 740, (128, 128): 390, (64, 64): 250, (64, 16): 130}
"""The same for bf16 weights."""


def best_tile(
    tiles: dict[tuple[int, int], int], num_groups: int, num_rows: int, num_columns: int, num_tokens: int, blocks: int
) -> tuple[int, int]:
    """Return the tile that is done first: rounds of blocks times nanoseconds of a tile. It decides no bit."""

    def nanoseconds(tile: tuple[int, int]) -> float:
        rows, tokens = tile
        rounds = -(-num_groups * -(-num_rows // rows) * -(-num_tokens // tokens) // blocks)
        return rounds * (-(-num_columns // TILE_COLUMNS) * tiles[tile] + 600 + rows * tokens / 9)

    return min(tiles, key=nanoseconds)


def tile_keys(weight: str, scaled: bool, out: str, *, row_scales: bool = False) -> list[Config]:
    """Return the compile keys for every number of rows, columns and tokens."""
    tiles = NVFP4_TILES if weight == "nvfp4" else BF16_TILES
    return [Config(weight, scaled, out, *tile, row_scales) for tile in tiles]


def require_bf16(op: str, x: torch.Tensor, w: torch.Tensor, multiple: int) -> None:
    """Refuse what the copy engine or the matrix instruction does not take."""
    if x.dtype != torch.bfloat16 or w.dtype != torch.bfloat16:
        raise NotImplementedError(
            f"{op}: the kernel takes bf16 activations and bf16 weights; got {x.dtype} and {w.dtype}. Convert them, or "
            'run the reference: with megamoe.ops.use("reference").'
        )
    if w.shape[-1] % multiple:
        raise NotImplementedError(
            f"{op}: the kernel takes K a multiple of {multiple}; got {w.shape[-1]}. Pad x and w with zeros, or run the "
            'reference: with megamoe.ops.use("reference").'
        )


def tile_linear(
    x: torch.Tensor,
    x_tensor_scale: torch.Tensor | None,
    w: NvFp4Tensor,
    out_dtype: torch.dtype,
    tile: tuple[int, int] | None = None,
    blocks: int | None = None,
) -> torch.Tensor:
    """Multiply by NVFP4 weights.

    Args:
        x: [T, K] or [T, G, K] bf16, contiguous.
        x_tensor_scale: [T] or [T, G] fp32 of expanded NVFP4 activations, or None.
        w: [N, K], with one tensor scale or one per row, or [G, N, K], in fragment order; for G above 1, K is a multiple
            of 128.
        out_dtype: bf16 or fp32.
    """
    token_scales = () if x_tensor_scale is None else (x_tensor_scale.view(-1),)
    num_columns = w.shape[-1]
    weight = (
        w.codes.view(-1, num_columns // 2),
        w.scales.view(torch.uint8).view(-1, num_columns // 16),
        w.tensor_scale.view(-1),
    )
    arguments, row_scales = (*weight, *token_scales), w.scale_per == "row"
    return _launch("nvfp4", x, tuple(w.shape), arguments, out_dtype, tile, blocks, row_scales)


def plain_tile_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    out_dtype: torch.dtype,
    tile: tuple[int, int] | None = None,
    blocks: int | None = None,
) -> torch.Tensor:
    """Multiply by bf16 weights.

    Args:
        x: [T, K] or [T, G, K] bf16, contiguous, K a multiple of 8, for G above 1 of 64.
        w: [N, K] or [G, N, K] bf16, contiguous.
        out_dtype: bf16 or fp32.
    """
    weight = (w.view(-1, w.shape[-1]),)
    if out_dtype == torch.bfloat16 and w.shape[-2] % 8:  # rows of the result would not be 16-byte aligned
        return _launch("bf16", x, tuple(w.shape), weight, torch.float32, tile, blocks).to(out_dtype)
    return _launch("bf16", x, tuple(w.shape), weight, out_dtype, tile, blocks)


def _launch(
    weight: str,
    x: torch.Tensor,
    w_shape: tuple[int, ...],
    arguments: tuple[torch.Tensor, ...],
    out_dtype: torch.dtype,
    tile: tuple[int, int] | None,
    blocks: int | None,
    row_scales: bool = False,
) -> torch.Tensor:
    *groups, num_rows, num_columns = w_shape
    num_tokens, num_groups = x.shape[0], groups[0] if groups else 1
    out = torch.empty(num_tokens, *groups, num_rows, dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    multiprocessors = num_multiprocessors(x.device)
    tiles = NVFP4_TILES if weight == "nvfp4" else BF16_TILES
    tile = tile or best_tile(tiles, num_groups, num_rows, num_columns, num_tokens, multiprocessors)
    config = Config(weight, len(arguments) == 4, DTYPE_NAMES[out_dtype], *tile, row_scales)
    num_tiles = num_groups * -(-num_rows // config.rows) * -(-num_tokens // config.tokens)
    blocks = blocks or min(multiprocessors, num_tiles)
    kernel(config, x.device)(x.view(num_tokens, -1), *arguments, out.view(num_tokens, -1), num_groups, blocks)
    return out
