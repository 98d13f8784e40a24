# SPDX-License-Identifier: Apache-2.0
"""Host side of the routed experts for few tokens an expert: both matrix products stream every chosen expert once.

    sort_pairs     pairs by expert, passes
    gate_up        h = clamped_swiglu(w1 x, w3 x) * route weight; a thread owns the same row of w1 and of w3
    down           w2 h, stored at the pair's place
    sum_slots      slots added in ascending order, then the shared output

The shared expert, where its weights are given, is one more expert that every token visits with weight 1: its passes
come last, and its h is made of gate and up rounded to bf16, as if two linears had computed them.

A unit of work is one pass and a tile of 16 rows, or a few tiles; blocks get contiguous runs of units, so that most
blocks stay within one or two experts and load tokens once or twice, and the last units go to whichever block is free.
"""

from __future__ import annotations

from typing import Any

import torch

from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.kernels.experts import sort_pairs_config, sum_slots_config
from megamoe.kernels.experts.expert_stream_config import QUEUE_BYTES, Config, plan_of
from megamoe.kernels.experts.sort_pairs import SortedPairs
from megamoe.kernels.parts.launch import num_multiprocessors
from megamoe.kernels.parts.weight_stream import TOKENS_PER_TILE
from megamoe.kernels.parts.weight_stream_limits import is_possible
from megamoe.kernels.store import kernel

POOL_PERCENT = 10  # of the units, for blocks that are free before others
POOL_CHUNK = 4
MAX_TILES = 2  # three leave the rings too little shared memory
WIDEST_TWO_NVFP4 = 4096  # columns; two tiles of wider NVFP4 tokens do not fit the registers while they are arranged
STREAMED_PAIRS = 4
"""Pairs an expert, on average, up to which experts are streamed; more of them are multiplied in tiles."""
FEW_TOKENS = 12
"""Tokens up to which experts are streamed in any case: very small steps have one order of sums, however many experts a
GPU has."""
SHARED_TOKENS = 64
"""Up to how many tokens the shared expert is one of the experts: beyond it would be streamed more than four times."""


def stream_limit(num_slots: int, num_experts: int) -> int:
    """Return up to how many tokens experts are streamed; more of them are multiplied in tiles.

    From the measured crossover (docs/experiments.md, experts for many pairs). Both paths have the operation's meaning,
    with sums in another order, so this number is where the last bits may change: a function of A and E alone.
    """
    return max(FEW_TOKENS, STREAMED_PAIRS * num_experts // num_slots)


def _config(
    step: str, num_rows: int, num_columns: int, num_slots: int, num_tiles: int, x_name: str, out_name: str
) -> Config:
    return Config(step, num_rows, num_columns, num_slots, num_tiles, x_name, out_name, POOL_PERCENT, POOL_CHUNK)


def tiles_for(num_columns: int, inner_size: int, num_pairs: int, num_experts: int, x_name: str) -> int:
    """Return the token tiles of a pass: enough for most experts of an even routing, where memory allows.

    An expert with more pairs is streamed again for the rest. The number decides no result, only how often.
    """
    mean = num_pairs / num_experts
    likely = mean + 3.0 * mean**0.5
    most = 1 if x_name == "nvfp4" and max(num_columns, inner_size) > WIDEST_TWO_NVFP4 else MAX_TILES
    wanted = min(most, max(1, -(-int(likely) // TOKENS_PER_TILE)))
    for num_tiles in range(wanted, 0, -1):
        plans = (plan_of("gate_up", num_columns, num_tiles), plan_of("down", inner_size, num_tiles))
        if all(is_possible(plan, QUEUE_BYTES) for plan in plans):
            return num_tiles
    raise NotImplementedError(
        f"experts: the kernel takes hidden and inner sizes that are multiples of 64 up to 8192; got {num_columns} and "
        f'{inner_size}. Run the reference: with megamoe.ops.use("reference").'
    )


def expert_keys(
    num_experts: int, width: int, inner_size: int, num_slots: int, x_name: str, hidden_name: str
) -> list[Any]:
    """Return the compile keys for every number of tokens, without a shared output.

    Args:
        num_experts, width, inner_size, num_slots: E, D, F, A.
        x_name: "bf16" or "nvfp4", what both products multiply.
        hidden_name: dtype that gate_up stores.
    """
    keys: list[Any] = []
    many_pairs = MAX_TILES * TOKENS_PER_TILE * num_experts
    for num_tiles in range(1, tiles_for(width, inner_size, many_pairs, num_experts, x_name) + 1):
        keys += [
            sort_pairs_config.Config(num_experts, num_tiles * TOKENS_PER_TILE),
            _config("gate_up", inner_size, width, num_slots, num_tiles, x_name, hidden_name),
            _config("down", width, inner_size, num_slots, num_tiles, x_name, "bf16"),
        ]
    return [
        *keys,
        sum_slots_config.Config(width, num_slots, None, "bf16"),
        sum_slots_config.Config(width, num_slots, "bf16", "bf16"),
    ]


def _weight(w: NvFp4Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, num_columns = w.shape[-2:]
    return (
        w.codes.view(-1, num_columns // 2),
        w.scales.view(torch.uint8).view(-1, num_columns // 16),
        w.tensor_scale.view(-1),
    )


def gate_up(
    x: tuple[torch.Tensor, ...],
    x_name: str,
    route_weights: torch.Tensor,
    weights: tuple[NvFp4Tensor, NvFp4Tensor],
    shared: tuple[NvFp4Tensor | None, NvFp4Tensor | None],
    pairs: SortedPairs,
    num_tiles: int,
    swiglu_limit: float | None,
    out: torch.Tensor,
    out_name: str,
) -> None:
    """Write h of every pair, by sorted position, to out [pairs, F].

    Args:
        x: what both products multiply, [T, D]: (bf16,) or codes, scales and tensor scales.
        x_name: "bf16" or "nvfp4".
        route_weights: [T, A] fp32, contiguous.
        weights: w1 and w3, [E, F, D] in fragment order.
        shared: the shared expert's, [F, D]; None if `pairs` have none.
        pairs: sort_pairs' result.
        num_tiles: token tiles of a pass.
        swiglu_limit: the clamp, or None.
        out: [pairs, F], overwritten.
        out_name: its dtype, "bf16" or "f32".
    """
    num_rows, num_columns = weights[0].shape[-2:]
    config = _config("gate_up", num_rows, num_columns, route_weights.shape[1], num_tiles, x_name, out_name)
    limit = float("inf") if swiglu_limit is None else swiglu_limit
    blocks = min(num_multiprocessors(out.device), num_rows // 16 * pairs.passes.shape[0])
    kernel(config, out.device)(
        *x,
        *(part for w in weights for part in _weight(w)),
        *(part for w, v in zip(weights, shared, strict=True) for part in _weight(w if v is None else v)),
        pairs.order,
        pairs.passes,
        pairs.num_passes,
        route_weights.reshape(-1),
        out,
        limit,
        blocks,
    )


def down(
    h: tuple[torch.Tensor, ...],
    h_name: str,
    w2: NvFp4Tensor,
    shared: NvFp4Tensor | None,
    pairs: SortedPairs,
    num_slots: int,
    num_tiles: int,
    out: torch.Tensor,
) -> None:
    """Write w2 h of every pair to out [pairs, D] bf16, at the pair's own place.

    Args:
        h: what is multiplied, [pairs, F] by sorted position: (bf16,) or codes, scales and tensor scales.
        h_name: "bf16" or "nvfp4".
        w2: [E, D, F] in fragment order.
        shared: the shared expert's, [D, F]; None if `pairs` have none.
        pairs, num_tiles: as for gate_up.
        num_slots: A.
        out: [pairs, D] bf16, overwritten.
    """
    num_rows, num_columns = w2.shape[-2:]
    config = _config("down", num_rows, num_columns, num_slots, num_tiles, h_name, "bf16")
    blocks = min(num_multiprocessors(out.device), num_rows // 16 * pairs.passes.shape[0])
    weights = (*_weight(w2), *_weight(w2 if shared is None else shared))
    kernel(config, out.device)(*h, *weights, pairs.order, pairs.passes, pairs.num_passes, out, blocks)
