# SPDX-License-Identifier: Apache-2.0
"""One transformer block: attention and mixture of experts, each inside its hyper-connection."""

from __future__ import annotations

import torch

from megamoe.cache.pools import LayerPools
from megamoe.models.deepseek_v4.attention import Attention
from megamoe.models.deepseek_v4.config import LayerKind, ModelConfig
from megamoe.models.deepseek_v4.hyper_connection import Unmixed, wrap_sublayer
from megamoe.models.deepseek_v4.moe import Moe
from megamoe.models.deepseek_v4.plan import StepPlan
from megamoe.models.deepseek_v4.weights import BlockWeights
from megamoe.models.recipe import Recipe
from megamoe.ops.rope import RopeTable


class Block:
    """A backbone layer or the block of a draft stage."""

    def __init__(
        self,
        weights: BlockWeights,
        config: ModelConfig,
        recipe: Recipe,
        *,
        kind: LayerKind,
        ratio: int,
        table: RopeTable,
    ) -> None:
        """Build both sublayers from their weights."""
        self.weights = weights
        self.config = config
        self.attention = Attention(weights.attention, config, recipe, kind=kind, ratio=ratio, table=table)
        self.moe = Moe(weights.moe, config, recipe)

    def __call__(self, before: torch.Tensor | Unmixed, plan: StepPlan, pools: LayerPools) -> Unmixed:
        """Return the streams after this block, the last output not mixed in yet.

        Args:
            before: the streams [T, X, D], or what the block before returned.
            plan: this step.
            pools: this layer's pools.
        """
        w = self.weights
        after = wrap_sublayer(before, w.hc_attn, w.attn_norm, lambda x: self.attention(x, plan, pools), self.config)
        return wrap_sublayer(after, w.hc_ffn, w.ffn_norm, lambda x: self.moe(x, plan.token_ids), self.config)
