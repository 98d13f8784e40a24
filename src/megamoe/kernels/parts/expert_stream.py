# SPDX-License-Identifier: Apache-2.0
"""Host side of the routed experts for few tokens an expert: both matrix products stream every chosen expert once.

    sort_pairs     pairs by expert, passes
    gate_up        h = clamped_swiglu(w1 x, w3 x) * route weight; a thread owns the same row of w1 and of w3
    down           w2 h, stored at the pair's place
    sum_slots      slots added in ascending order, then the shared output

The shared expert, where its weights are given, is one more expert that every token visits with weight 1: its passes come
last, and its h is made of gate and up rounded to bf16, as if two linears had computed them.

A unit of work is one pass and one tile of 16 rows; blocks get contiguous runs of units, so that most blocks stay within
one or two experts and load tokens once or twice.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.kernels.parts import sort_pairs, sum_slots
from megamoe.kernels.parts.linear_stream import num_multiprocessors
from megamoe.kernels.parts.sort_pairs import SortedPairs
from megamoe.kernels.parts.weight_stream import TOKENS_PER_TILE, StreamPlan
from megamoe.kernels.store import kernel

POOL_CHUNK = 4
QUEUE_TURNS = 16
QUEUE_OFFSET = 16
SHARED_TOKENS = 64
"""Up to how many tokens the shared expert is one of the experts: beyond it would be streamed more than four times."""
VARIANT: dict = {}
MAX_TILES = 2  # three leave the rings too little shared memory


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        step: "gate_up" or "down".
        num_rows: rows of an expert's weight.
        num_columns: its columns.
        num_slots: A, for the token of a pair.
        num_tiles: token tiles of 8 in a pass.
        x: "bf16" or "nvfp4".
        out: "bf16" or "f32".
        skips: passes with few tokens leave out token tiles.
        grouped: try
        pool: percent
        slots: most
    """

    step: str
    num_rows: int
    num_columns: int
    num_slots: int
    num_tiles: int
    x: str
    out: str
    skips: bool = False
    grouped: bool = True
    pool: int = 25
    slots: int = 8

    @property
    def plan(self) -> StreamPlan:
        """How a product is shared out."""
        return _plan(self.step, self.num_columns, self.num_tiles, self.grouped, self.slots)

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a block asks for at launch."""
        return self.plan.shared_bytes + QUEUE_OFFSET + 4 * QUEUE_TURNS


def _plan(step: str, num_columns: int, num_tiles: int, grouped: bool = True, slots: int = 8) -> StreamPlan:
    if step == "gate_up":
        return StreamPlan(num_columns, 2, num_tiles, 1, slots)
    return StreamPlan(num_columns, 1, num_tiles, 2 if grouped and num_columns <= 2048 else 1, slots)


def tiles_for(num_columns: int, inner_size: int, num_pairs: int, num_experts: int) -> int:
    """Return the token tiles of a pass: enough for most experts of an even routing, where shared memory allows.

    An expert with more pairs is streamed again for the rest. The number decides no result, only how often.
    """
    mean = num_pairs / num_experts
    likely = mean + 3.0 * mean**0.5
    wanted = min(MAX_TILES, max(1, -(-int(likely) // TOKENS_PER_TILE)))
    for num_tiles in range(wanted, 0, -1):
        if _plan("gate_up", num_columns, num_tiles).is_possible() and _plan("down", inner_size, num_tiles).is_possible():
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
    for num_tiles in range(1, tiles_for(width, inner_size, MAX_TILES * TOKENS_PER_TILE * num_experts, num_experts) + 1):
        keys += [
            sort_pairs.Config(num_experts, num_tiles * TOKENS_PER_TILE),
            Config("gate_up", inner_size, width, num_slots, num_tiles, x_name, hidden_name),
            Config("down", width, inner_size, num_slots, num_tiles, x_name, "bf16"),
        ]
    return [*keys, sum_slots.Config(width, num_slots, None, "bf16"), sum_slots.Config(width, num_slots, "bf16", "bf16")]


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
    config = Config("gate_up", num_rows, num_columns, route_weights.shape[1], num_tiles, x_name, out_name, **VARIANT)
    limit = float("inf") if swiglu_limit is None else swiglu_limit
    blocks = min(num_multiprocessors(out.device), num_rows // 16 * pairs.passes.shape[0])
    kernel(__name__, config, out.device)(
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
    config = Config("down", num_rows, num_columns, num_slots, num_tiles, h_name, "bf16", **VARIANT)
    blocks = min(num_multiprocessors(out.device), num_rows // 16 * pairs.passes.shape[0])
    weights = (*_weight(w2), *_weight(w2 if shared is None else shared))
    kernel(__name__, config, out.device)(*h, *weights, pairs.order, pairs.passes, pairs.num_passes, out, blocks)
