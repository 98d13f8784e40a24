# SPDX-License-Identifier: Apache-2.0
"""Routed experts computed one token and one expert at a time in fp64, and inputs that reach every path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

Rounding = Callable[[torch.Tensor], torch.Tensor]
"""[n, K] fp64 -> [n, K] fp64, what a format makes of activations."""


@dataclasses.dataclass(frozen=True)
class ExpertCase:
    """Inputs of a routed-experts operation, weights not yet in any format.

    Expert 3 is never chosen. Gate and up reach beyond the clamp of 10 on both sides. w3 is far larger than w1, so the
    two have different tensor scales.
    """

    x: torch.Tensor
    route_weights: torch.Tensor
    expert_ids: torch.Tensor
    w1: torch.Tensor
    w3: torch.Tensor
    w2: torch.Tensor
    shared_output: torch.Tensor


def make_case(num_tokens: int, seed: int, dtype: torch.dtype = torch.bfloat16, width: int = 64) -> ExpertCase:
    """Return a case with 6 experts, 2 slots, D = width and F = width / 2."""
    generator = torch.Generator().manual_seed(seed)
    inner = width // 2
    ids = torch.tensor([0, 1, 2, 4, 5])[torch.rand(num_tokens, 5, generator=generator).argsort(1)[:, :2]]
    return ExpertCase(
        x=torch.randn(num_tokens, width, generator=generator).to(dtype),
        route_weights=torch.rand(num_tokens, 2, generator=generator) + 0.25,
        expert_ids=ids,
        w1=torch.randn(6, inner, width, generator=generator) * 0.8,
        w3=torch.randn(6, inner, width, generator=generator) * torch.linspace(0.8, 2.5, 6)[:, None, None],
        w2=torch.randn(6, width, inner, generator=generator) * 0.1,
        shared_output=torch.randn(num_tokens, width, generator=generator).to(dtype),
    )


def expected(
    case: ExpertCase,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    round_x: Rounding,
    round_h: Rounding,
    limit: float | None = 10.0,
    weight_after_w2: bool = False,
) -> torch.Tensor:
    """Compute [T, D] in fp64 from decoded fp64 weights w1, w3, w2; expert outputs are rounded to the dtype of x."""
    w1, w3, w2 = weights
    x = round_x(case.x.double())
    total = torch.zeros(case.x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for slot, expert in enumerate(case.expert_ids[token].tolist()):
            gate, up = w1[expert] @ x[token], w3[expert] @ x[token]
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            weight = case.route_weights[token, slot].double()
            hidden = gate * gate.sigmoid() * up * (1.0 if weight_after_w2 else weight)
            output = w2[expert] @ round_h(hidden[None])[0] * (weight if weight_after_w2 else 1.0)
            total[token] += output.to(case.x.dtype).double()
    return total + case.shared_output.double()


def same(values: torch.Tensor) -> torch.Tensor:
    """Round nothing."""
    return values
