# SPDX-License-Identifier: Apache-2.0
"""Indexer of a CSA layer: which compressed entries a token attends to."""

from __future__ import annotations

import torch

from megamoe.formats.cache_rows import CachePool, RowFormat
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
from megamoe.ops.write_cache import write_cache


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
        self, x: torch.Tensor, query_latent: LinearInput, plan: StepPlan, state: CachePool, keys: CachePool
    ) -> torch.Tensor:
        """Write this step's index keys and return the selected entries.

        Args:
            x: [T, D] normed layer input.
            query_latent: [T, q_lora] the normed low-rank query shared with the main attention.
            plan: this step's slots.
            state: fp32 pool of the index compressor's raw rows.
            keys: pool of index keys.

        Returns:
            [T, index_topk] int64 entry numbers in ascending order, -1 padded.
        """
        entry_plan = plan.entries[LayerKind.CSA]
        new_keys = self.compressor(x, plan.positions, entry_plan, state)
        if self.recipe.index_hadamard:
            new_keys = hadamard(new_keys)
        write_cache(new_keys, keys, entry_plan.entry_slots)

        q = query_latent.times(self.weights.wq_b).unflatten(-1, (self.num_heads, self.head_dim))  # [T, Hi, 128]
        q = rope(q, plan.positions, self.table)
        head_weights = linear(x, self.weights.weights_proj, out_dtype=torch.float32) * self.head_scale  # [T, Hi]
        return index_topk(
            self.round_query(q),
            head_weights,
            keys,
            block_tables=entry_plan.block_tables,
            query_starts=plan.query_starts,
            num_visible=entry_plan.num_visible,
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
