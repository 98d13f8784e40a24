# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts of one layer: route, routed experts, shared expert."""

from __future__ import annotations

import torch

from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.models.deepseek_v4.config import ModelConfig
from megamoe.models.deepseek_v4.linear import LinearInput, experts_op
from megamoe.models.deepseek_v4.weights import MoeWeights
from megamoe.models.recipe import Recipe
from megamoe.ops.route_experts import route_experts
from megamoe.ops.swiglu import clamped_swiglu


class Moe:
    """Top-k routed experts plus one shared expert, clamped SwiGLU in both."""

    def __init__(self, weights: MoeWeights, config: ModelConfig, recipe: Recipe) -> None:
        """Bind the weights; the experts operation follows from their format and the recipe."""
        self.weights = weights
        self.top_k = config.num_experts_per_tok
        self.routed_scaling = config.routed_scaling_factor
        self.swiglu_limit = config.swiglu_limit
        self.recipe = recipe
        self._experts = experts_op(weights, recipe)
        self._shared_weights = shared_weights(weights)

    def __call__(self, x: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Return [T, D] in the dtype of x.

        Args:
            x: [T, D] normed input of the layer.
            token_ids: [T] int64; hash-routed layers choose their experts by them. -1 is nobody: its output is 0.
        """
        w = self.weights
        route_weights, expert_ids = route_experts(
            x,
            w.gate,
            token_ids=token_ids,
            top_k=self.top_k,
            routed_scaling=self.routed_scaling,
            bias=w.bias,
            expert_table=w.expert_table,
        )
        fused = self._shared_weights is not None
        return self._experts(
            x,
            route_weights,
            expert_ids,
            w.w1,
            w.w3,
            w.w2,
            **({"shared_weights": self._shared_weights} if fused else {"shared_output": self.shared(x)}),
            swiglu_limit=self.swiglu_limit,
        )

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """Return the shared expert's output [T, D]; the same clamp as the routed experts, weight 1."""
        source = LinearInput(x, self.recipe)
        gate, up = source.times(self.weights.shared_w1), source.times(self.weights.shared_w3)  # [T, F]
        hidden = clamped_swiglu(gate, up, limit=self.swiglu_limit)
        return LinearInput(hidden, self.recipe).times(self.weights.shared_w2)


def shared_weights(weights: MoeWeights) -> tuple[NvFp4Tensor, NvFp4Tensor, NvFp4Tensor] | None:
    """Return the shared expert's w1, w3 and w2 if the routed-experts operation can take them, else None.

    It can where all of them are NVFP4 and of the sizes of a routed expert: one expert more in the same launches.
    """
    shared = (weights.shared_w1, weights.shared_w3, weights.shared_w2)
    routed = (weights.w1, weights.w3, weights.w2)
    for one, many in zip(shared, routed, strict=True):
        if not (isinstance(one, NvFp4Tensor) and isinstance(many, NvFp4Tensor) and one.shape == many.shape[1:]):
            return None
    return shared  # type: ignore[return-value]
