# SPDX-License-Identifier: Apache-2.0
"""Classic multi-token-prediction stage: guesses token i + 2 from the streams at i and token i + 1."""

from __future__ import annotations

import torch

from megamoe.cache.pools import LayerPools
from megamoe.models.deepseek_v4.block import Block
from megamoe.models.deepseek_v4.config import LayerKind, ModelConfig
from megamoe.models.deepseek_v4.hyper_connection import head_input
from megamoe.models.deepseek_v4.linear import LinearInput
from megamoe.models.deepseek_v4.plan import StepPlan
from megamoe.models.deepseek_v4.weights import MtpWeights
from megamoe.models.recipe import Recipe
from megamoe.ops.linear import linear
from megamoe.ops.rms_norm import rms_norm
from megamoe.ops.rope import RopeTable
from megamoe.ops.streams import add_to_streams


class MtpStage:
    """A sliding-window block over projected streams; shares the embedding and the head with the backbone."""

    def __init__(self, weights: MtpWeights, config: ModelConfig, recipe: Recipe, table: RopeTable) -> None:
        """Build the block from its weights; `table` is the table of sliding-window layers."""
        self.weights = weights
        self.config = config
        self.recipe = recipe
        self.block = Block(weights.block, config, recipe, kind=LayerKind.SWA, ratio=0, table=table)

    def __call__(
        self, streams: torch.Tensor, next_embedding: torch.Tensor, plan: StepPlan, pools: LayerPools
    ) -> torch.Tensor:
        """Return the stage's streams [T, X, D]; feed them back for a further draft token.

        Args:
            streams: [T, X, D] of the last backbone block (or of the previous draft step) at position i.
            next_embedding: [T, D] embedding of the token at i + 1.
            plan: slots and positions i of this step.
            pools: the stage's own pools.
        """
        w, eps = self.weights, self.config.rms_norm_eps
        e = LinearInput(rms_norm(next_embedding, w.enorm, eps=eps), self.recipe).times(w.e_proj)  # [T, D]
        num_tokens, num_streams, hidden = streams.shape
        normed = rms_norm(streams, w.hnorm, eps=eps).reshape(num_tokens * num_streams, hidden)
        h = LinearInput(normed, self.recipe).times(w.h_proj).view(num_tokens, num_streams, hidden)
        return self.block(add_to_streams(h, e), plan, pools).mixed()

    def logits(self, streams: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits [T, V] from this stage's streams, by its own norm and hc_head."""
        w = self.weights
        return linear(head_input(streams, None, w.hc_head, w.norm, self.config), head, out_dtype=torch.float32)
