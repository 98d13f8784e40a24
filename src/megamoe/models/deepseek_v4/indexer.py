# SPDX-License-Identifier: Apache-2.0
"""Indexer of a CSA layer: which compressed entries a token attends to."""

from __future__ import annotations

import torch

from megamoe.cache.pools import LayerPools
from megamoe.formats.cache_rows import RowFormat
from megamoe.formats.fp8 import Fp8RowTensor
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.models.deepseek_v4.compressor import Compressor
from megamoe.models.deepseek_v4.config import LayerKind, ModelConfig
from megamoe.models.deepseek_v4.linear import LinearInput
from megamoe.models.deepseek_v4.plan import StepPlan
from megamoe.models.deepseek_v4.weights import IndexerWeights
from megamoe.models.recipe import Recipe
from megamoe.ops.hadamard import hadamard
from megamoe.ops.index_topk import index_topk
from megamoe.ops.linear import linear
from megamoe.ops.quantize import quantize_fp8_rows, quantize_mxfp4
from megamoe.ops.rope import RopeTable, rope
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

    def __call__(self, x: torch.Tensor, query_latent: LinearInput, plan: StepPlan, pools: LayerPools) -> torch.Tensor:
        """Write this step's index keys and return the selected entries.

        Args:
            x: [T, D] normed layer input.
            query_latent: [T, q_lora] the normed low-rank query shared with the main attention.
            plan: this step.
            pools: this layer's pools.

        Returns:
            [T, index_topk] int32 entry numbers in ascending order, -1 padded.
        """
        assert pools.index_state is not None and pools.index_keys is not None
        slots, tables, compressor = plan.entry_slots(LayerKind.CSA), plan.tables[LayerKind.CSA], self.compressor
        write_index_keys(
            compressor.project(x),
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
            out_dtype=x.dtype,
        )

        q = query_latent.times(self.weights.wq_b).unflatten(-1, (self.num_heads, self.head_dim))  # [T, Hi, 128]
        q = rope(q, plan.positions, self.table)
        head_weights = linear(x, self.weights.weights_proj, out_dtype=torch.float32) * self.head_scale  # [T, Hi]
        return index_topk(
            self.round_query(q),
            head_weights,
            pools.index_keys,
            block_tables=tables.entries.block_tables,
            requests=plan.slots.requests,
            num_visible=slots.num_visible,
            top_k=self.top_k,
        )

    def round_query(self, q: torch.Tensor) -> torch.Tensor | MxFp4Tensor | Fp8RowTensor:
        """Return the index query as the recipe's index-key format rounds it."""
        if self.recipe.index_hadamard:
            q = hadamard(q)
        if self.recipe.index_key_format is RowFormat.INDEX_FP4:
            return quantize_mxfp4(q)
        if self.recipe.index_key_format is RowFormat.INDEX_FP8:
            return quantize_fp8_rows(q, group=self.head_dim)
        return q
