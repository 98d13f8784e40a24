# SPDX-License-Identifier: Apache-2.0
"""Indexer of a CSA layer: which compressed entries a token attends to."""

from __future__ import annotations

import torch

from megamoe.cache.pools import LayerPools
from megamoe.models.deepseek_v4.compressor import Compressor
from megamoe.models.deepseek_v4.config import LayerKind, ModelConfig
from megamoe.models.deepseek_v4.plan import StepPlan
from megamoe.models.deepseek_v4.weights import IndexerWeights
from megamoe.models.recipe import Recipe
from megamoe.ops.index_topk import index_topk
from megamoe.ops.rope import RopeTable
from megamoe.ops.round_index_query import round_index_query
from megamoe.ops.write_index_keys import write_index_keys


class Indexer:
    """Scores every visible entry for every token and keeps the best `index_topk`."""

    def __init__(
        self, weights: IndexerWeights, config: ModelConfig, recipe: Recipe, *, ratio: int, table: RopeTable
    ) -> None:
        """Bind weights; the recipe fixes how queries and keys are rounded."""
        self.weights = weights
        self.recipe = recipe
        self.table = table
        self.num_heads = config.index_n_heads
        self.head_dim = config.index_head_dim
        self.top_k = config.index_topk
        self.head_scale = config.index_head_dim**-0.5 * config.index_n_heads**-0.5
        self.compressor = Compressor(
            weights.compressor, ratio=ratio, overlap=True, table=table, eps=config.rms_norm_eps
        )

    def __call__(
        self, q: torch.Tensor, raw: torch.Tensor, head_weights: torch.Tensor, plan: StepPlan, pools: LayerPools
    ) -> torch.Tensor:
        """Write this step's index keys and return the selected entries.

        Args:
            q: [T, Hi, K] index queries as projected, not rotated; like the two below at any stride of tokens.
            raw: [T, 4 * K] fp32, raw rows of the index compressor.
            head_weights: [T, Hi] fp32 as projected, not scaled.
            plan: this step.
            pools: this layer's pools.

        Returns:
            [T, index_topk] int32 entry numbers in ascending order, -1 padded.
        """
        assert pools.index_state is not None and pools.index_keys is not None
        slots, tables, compressor = plan.entry_slots(LayerKind.CSA), plan.tables[LayerKind.CSA], self.compressor
        write_index_keys(
            raw,
            compressor.weights.ape,
            compressor.weights.norm,
            pools.index_state,
            None if plan.in_rings else pools.step.index_state,
            pools.index_keys,
            positions=plan.positions,
            requests=plan.slots.requests,
            first_idx=plan.slots.first_idx,
            state_tables=tables.state.block_tables,
            state_slots=slots.state_slots,
            key_slots=slots.entry_slots,
            table=self.table,
            ratio=compressor.ratio,
            rotate=self.recipe.index_hadamard,
            eps=compressor.eps,
            out_dtype=q.dtype,
        )
        query, scaled_weights = round_index_query(
            q,
            head_weights,
            plan.positions,
            self.table,
            key_format=self.recipe.index_key_format,
            hadamard=self.recipe.index_hadamard,
            head_scale=self.head_scale,
        )
        return index_topk(
            query,
            scaled_weights,
            pools.index_keys,
            block_tables=tables.entries.block_tables,
            requests=plan.slots.requests,
            num_visible=slots.num_visible,
            top_k=self.top_k,
        )
