# SPDX-License-Identifier: Apache-2.0
"""Host side of the routed experts for many tokens an expert: both matrix products in tiles on wgmma.

    sort_pairs     pairs by expert; a pass is up to 32, 64 or 112 pairs of one
    gather_rows    their tokens side by side, NVFP4 ones expanded to bf16
    gate_up        h = clamped_swiglu(w1 x, w3 x) * route weight; a thread owns the same row of w1 and of w3
    down           w2 h, stored at the pair's place
    sum_slots      slots added in ascending order, then the shared output

A tile is 256 weight rows (128 of w1 and of w3) and one pass. Blocks stay and take tiles in turn, all rows of a pass
first, so that a pass's tokens come from L2. A producer warp brings codes, scales and tokens to shared memory several
steps ahead, past the end of a tile; two consumer warpgroups decode and multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megamoe.formats.fragment_layout import TILE_CODE_BYTES, TILE_COLUMNS, TILE_SCALE_BYTES
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.kernels.experts import gather_rows, gather_rows_config, sort_pairs, sort_pairs_config
from megamoe.kernels.experts.expert_tiles_sm90_config import Config
from megamoe.kernels.experts.sort_pairs import SortedPairs
from megamoe.kernels.parts.launch import DTYPE_NAMES, num_multiprocessors
from megamoe.kernels.rows import expand_nvfp4, expand_nvfp4_config
from megamoe.kernels.store import kernel

PASS_TOKENS = (32, 64, 112)
"""Sizes of a pass, a kernel each: one with several would run out of registers, and wait after every instruction."""

Weights = tuple[NvFp4Tensor, NvFp4Tensor, NvFp4Tensor]


def pass_tokens_for(num_pairs: int, num_experts: int) -> int:
    """Return the size of a pass: enough for most experts of an even routing.

    An expert with more pairs has more passes. The number decides no result, only how often weights are read.
    """
    mean = num_pairs / num_experts
    return next((size for size in PASS_TOKENS if mean + 1.5 * mean**0.5 <= size), PASS_TOKENS[-1])


def tile_keys(width: int, inner_size: int, num_experts: int, x_name: str, hidden_name: str) -> list[Any]:
    """Return the compile keys of every number of tokens.

    Args:
        width, inner_size, num_experts: D, F, E.
        x_name: "bf16" or "nvfp4", what both products multiply.
        hidden_name: dtype that gate_up stores.
    """
    keys: list[Any] = [gather_rows_config.Config(width, x_name)]
    if x_name == "nvfp4":
        keys.append(expand_nvfp4_config.Config())
    for size in PASS_TOKENS:
        keys += [
            sort_pairs_config.Config(num_experts, size),
            Config("gate_up", inner_size, width, size, x_name == "nvfp4", hidden_name),
            Config("down", width, inner_size, size, x_name == "nvfp4", "bf16"),
        ]
    return keys


def _weight(w: NvFp4Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes [row tiles, words], scales [row tiles, words] and tensor scales [E]."""
    num_rows, num_columns = w.shape[-2:]
    chunks, row_tiles = num_columns // TILE_COLUMNS, w.shape.numel() // num_columns // 16
    return (
        w.codes.view(torch.int32).view(row_tiles, chunks * TILE_CODE_BYTES // 4),
        w.scales.view(torch.int32).view(row_tiles, chunks * TILE_SCALE_BYTES // 4),
        w.tensor_scale.view(-1),
    )


def tile_experts(
    op: str,
    x: tuple[torch.Tensor, ...],
    route_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: Weights,
    shared_weights: Weights | None,
    swiglu_limit: float | None,
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] | None,
) -> torch.Tensor:
    """Return the output of every pair, [pairs, D] bf16, by token and slot; then the shared expert's by token.

    Args:
        op: for messages.
        x: (bf16 [T, D],), or codes [T, D/2], scales [T, D/16] as bytes and tensor scale [T]; all contiguous.
        route_weights: [T, A] fp32.
        expert_ids: [T, A] int64, contiguous.
        weights: w1, w3 and w2 in fragment order.
        shared_weights: the shared expert's, or None.
        swiglu_limit: the clamp or None.
        quantize: h [pairs, F] fp32 to what x is, for NVFP4 activations; None for h in bf16.
    """
    (w1, w3, w2), (v1, v3, v2) = weights, shared_weights or (None, None, None)
    num_experts, inner_size, width = w1.shape
    size = pass_tokens_for(expert_ids.numel(), num_experts)
    pairs = sort_pairs.sort_pairs(op, expert_ids, num_experts, size, shared_weights is not None)
    rows = gather_rows.gather_rows(x, pairs.order, route_weights.contiguous())
    num_pairs, device = pairs.order.shape[0], expert_ids.device
    hidden_dtype = torch.bfloat16 if quantize is None else torch.float32
    hidden = torch.empty(num_pairs, inner_size, dtype=hidden_dtype, device=device)
    gate_up(rows, (w1, w3), (v1, v3), pairs, size, swiglu_limit, hidden)
    outputs = torch.empty(num_pairs, width, dtype=torch.bfloat16, device=device)
    if quantize is None:
        down(hidden, None, w2, v2, pairs, size, outputs)
    else:
        codes, scales, tensor_scale = quantize(hidden)
        down(expand_nvfp4.expand_nvfp4(codes, scales), tensor_scale, w2, v2, pairs, size, outputs)
    return outputs


def gate_up(
    rows: gather_rows.GatheredRows,
    weights: tuple[NvFp4Tensor, NvFp4Tensor],
    shared: tuple[NvFp4Tensor | None, NvFp4Tensor | None],
    pairs: SortedPairs,
    pass_tokens: int,
    swiglu_limit: float | None,
    out: torch.Tensor,
) -> None:
    """Write h of every pair, by sorted position, to out [pairs, F].

    Args:
        rows: what is multiplied.
        weights: w1 and w3, [E, F, D] in fragment order.
        shared: the shared expert's, [F, D]; None if `pairs` have none.
        pairs: sort_pairs' result.
        pass_tokens: what it was sorted by.
        swiglu_limit: the clamp, or None.
        out: [pairs, F] bf16, or fp32 for NVFP4 tokens; overwritten.
    """
    num_rows, num_columns = weights[0].shape[-2:]
    config = Config(
        "gate_up", num_rows, num_columns, pass_tokens, rows.tensor_scale is not None, DTYPE_NAMES[out.dtype]
    )
    limit = float("inf") if swiglu_limit is None else swiglu_limit
    blocks = min(num_multiprocessors(out.device), config.row_blocks * pairs.passes.shape[0])
    scales = () if rows.tensor_scale is None else (rows.tensor_scale,)
    kernel(config, out.device)(
        rows.x,
        *scales,
        *(part for w in weights for part in _weight(w)),
        *(part for w, v in zip(weights, shared, strict=True) for part in _weight(w if v is None else v)),
        pairs.passes,
        pairs.num_passes,
        rows.route_weights,
        out,
        limit,
        blocks,
    )


def down(
    h: torch.Tensor,
    tensor_scale: torch.Tensor | None,
    w2: NvFp4Tensor,
    shared: NvFp4Tensor | None,
    pairs: SortedPairs,
    pass_tokens: int,
    out: torch.Tensor,
) -> None:
    """Write w2 h of every pair to out [pairs, D] bf16, at the pair's own place.

    Args:
        h: [pairs, F] bf16 by sorted position; of NVFP4 values, code * block scale * 2^-7.
        tensor_scale: [pairs] fp32 of NVFP4 values, or None.
        w2: [E, D, F] in fragment order.
        shared: the shared expert's, [D, F]; None if `pairs` have none.
        pairs, pass_tokens: as for gate_up.
        out: [pairs, D] bf16, overwritten.
    """
    num_rows, num_columns = w2.shape[-2:]
    scaled = tensor_scale is not None
    config = Config("down", num_rows, num_columns, pass_tokens, scaled, DTYPE_NAMES[out.dtype])
    blocks = min(num_multiprocessors(out.device), config.row_blocks * pairs.passes.shape[0])
    scales = () if tensor_scale is None else (tensor_scale,)
    kernel(config, out.device)(
        h,
        *scales,
        *_weight(w2),
        *_weight(w2 if shared is None else shared),
        pairs.passes,
        pairs.num_passes,
        pairs.order,
        out,
        blocks,
    )
