# SPDX-License-Identifier: Apache-2.0
"""route_experts: scores on the matrix unit, then a selection by warps.

Meaning    ops/route_experts.py; this file only makes it fast
Launches   two: route_scores.py, or route_tiles.py for more than 1,536 tokens, then route_select.py;
           the scores [T, E] fp32 are between them
Order      of the sums: one up to 1,536 tokens, another beyond; on either side a token does not depend on the others
Limits     x and gate bf16; D a multiple of 32; up to 1024 experts, top_k up to 32
Bound      the gate (E D bf16, from L2) for few tokens, the tokens for many
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.kernels.router import (
    route_scores,
    route_select,
    route_select_config,
    route_tiles,
    route_tiles_config,
)
from megamoe.kernels.router.route_scores_config import CHUNK


def configs(dims: Mapping[str, int]) -> Iterator[Any]:
    """Yield what a model needs for one entry of its shape table."""
    yield from route_scores.configs(dims["D"], dims["E"])
    if route_tiles.fits(dims["D"]):
        yield route_tiles_config.Config(dims["D"], dims["E"])
    for mode in ("table64", "table32") if "V" in dims else ("score", "biased"):
        yield route_select_config.Config(dims["E"], dims["A"], mode)


def run(
    x: torch.Tensor,
    gate: torch.Tensor,
    top_k: int,
    routed_scaling: float,
    bias: torch.Tensor | None,
    expert_table: torch.Tensor | None,
    token_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute route_experts."""
    num_experts, width = gate.shape
    if (x.dtype, gate.dtype) != (torch.bfloat16, torch.bfloat16) or width % CHUNK:
        raise NotImplementedError(
            f"route_experts: the kernel takes bf16 x and gate, D a multiple of {CHUNK}; got {x.dtype} "
            f'{list(x.shape)} and {gate.dtype}. Run the reference: with megamoe.ops.use("reference").'
        )
    if num_experts > route_select.MAX_EXPERTS or top_k > route_select.MAX_TOP_K:
        raise NotImplementedError(
            f"route_experts: the kernel takes up to {route_select.MAX_EXPERTS} experts and top_k up to "
            f"{route_select.MAX_TOP_K}; got {num_experts} and {top_k}. Run the reference: "
            f'with megamoe.ops.use("reference").'
        )
    if x.shape[0] == 0:
        weights = torch.empty((0, top_k), dtype=torch.float32, device=x.device)
        return weights, torch.empty((0, top_k), dtype=torch.int64, device=x.device)
    tiled = x.shape[0] > route_tiles.MANY_TOKENS and route_tiles.fits(width)
    scores = (route_tiles if tiled else route_scores).run(x, gate)
    return route_select.run(scores, top_k, routed_scaling, bias, expert_table, token_ids)
