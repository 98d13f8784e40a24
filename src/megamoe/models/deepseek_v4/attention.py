# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer: window in all kinds, compressed entries in CSA and HCA."""

from __future__ import annotations

import torch

from megamoe.cache.pools import LayerPools
from megamoe.models.deepseek_v4.compressor import Compressor
from megamoe.models.deepseek_v4.config import LayerKind, ModelConfig
from megamoe.models.deepseek_v4.indexer import Indexer
from megamoe.models.deepseek_v4.linear import LinearInput, grouped
from megamoe.models.deepseek_v4.plan import StepPlan
from megamoe.models.deepseek_v4.snapshots import finish_layer
from megamoe.models.deepseek_v4.weights import AttentionWeights
from megamoe.models.recipe import Recipe
from megamoe.ops.rms_norm import rms_norm
from megamoe.ops.rope import RopeTable, rope
from megamoe.ops.sparse_attention import sparse_attention
from megamoe.ops.write_cache import write_cache


class Attention:
    """Low-rank queries, one latent row per token as key and value, attention sink, grouped output projection."""

    def __init__(
        self,
        weights: AttentionWeights,
        config: ModelConfig,
        recipe: Recipe,
        *,
        kind: LayerKind,
        ratio: int,
        table: RopeTable,
    ) -> None:
        """Bind weights and the rotary table that everything in this layer uses."""
        self.weights = weights
        self.recipe = recipe
        self.kind = kind
        self.table = table
        self.eps = config.rms_norm_eps
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.num_groups = config.o_groups
        self.scale = config.head_dim**-0.5
        self.window_size = config.sliding_window
        self.compressor: Compressor | None = None
        self.indexer: Indexer | None = None
        if weights.compressor is not None:
            self.compressor = Compressor(
                weights.compressor, ratio=ratio, overlap=kind is LayerKind.CSA, table=table, eps=self.eps
            )
        if weights.indexer is not None:
            self.indexer = Indexer(weights.indexer, config, recipe, ratio=ratio, table=table)

    def __call__(self, x: torch.Tensor, plan: StepPlan, pools: LayerPools) -> torch.Tensor:
        """Return the attention output [T, D] in the dtype of x; writes this step's rows into the pools.

        Args:
            x: [T, D] normed layer input.
            plan: slots and positions of this step.
            pools: this layer's pools.
        """
        query_latent, q, kv = self.project(x, plan.positions)
        window = pools.window if plan.in_rings else pools.step.window
        assert window is not None
        write_cache(kv, window, plan.slots.window_slots)
        selected = self.select_entries(x, query_latent, plan, pools)
        o = self.attend(q, plan, pools, selected)
        finish_layer(plan, pools, self.kind)
        return self.project_output(o)

    def project(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[LinearInput, torch.Tensor, torch.Tensor]:
        """Return (normed low-rank query [T, q_lora], queries [T, H, C], latent rows [T, C]), the latter two rotated."""
        w = self.weights
        source = LinearInput(x, self.recipe)
        query_latent = LinearInput(rms_norm(source.times(w.wq_a), w.q_norm, eps=self.eps), self.recipe)
        q = query_latent.times(w.wq_b).unflatten(-1, (self.num_heads, self.head_dim))  # [T, H, C]
        q = rope(rms_norm(q, None, eps=self.eps), positions, self.table)
        return query_latent, q, self.latent_rows(source, positions)

    def latent_rows(self, source: LinearInput, positions: torch.Tensor) -> torch.Tensor:
        """Return the latent rows [T, C], key and value at once, rotated."""
        kv = source.times(self.weights.wkv)
        return rope(rms_norm(kv, self.weights.kv_norm, eps=self.eps), positions, self.table)

    def attend(
        self, q: torch.Tensor, plan: StepPlan, pools: LayerPools, entry_idx: torch.Tensor | None
    ) -> torch.Tensor:
        """Return [T, H, C]: softmax over window and entries with sink, rotated back to relative positions.

        Args:
            q: [T, H, C] rotated queries.
            plan: this step.
            pools: this layer's pools; entries are read if it has them.
            entry_idx: [T, J] int32, the entries each token attends to; None for all it may use.
        """
        has_entries = self.kind in plan.tables
        return sparse_attention(
            q,
            pools.window,
            pools.entries if has_entries else None,
            self.weights.sink,
            positions=plan.positions,
            requests=plan.slots.requests,
            first_idx=plan.slots.first_idx,
            window_size=self.window_size,
            window_tables=plan.window.block_tables,
            step=None if plan.in_rings else pools.step.window,
            entry_tables=plan.tables[self.kind].entries.block_tables if has_entries else None,
            entry_idx=entry_idx,
            num_visible=plan.entry_slots(self.kind).num_visible if has_entries else None,
            table=self.table,
            scale=self.scale,
        )

    def project_output(self, o: torch.Tensor) -> torch.Tensor:
        """Return [T, D] from [T, H, C]: one low-rank projection per group of heads, then `wo_b`."""
        w = self.weights
        z = grouped(o.reshape(o.shape[0], self.num_groups, -1), w.wo_a, self.recipe)  # [T, G, o_lora]
        return LinearInput(z.flatten(1), self.recipe).times(w.wo_b)

    def select_entries(
        self, x: torch.Tensor, query_latent: LinearInput, plan: StepPlan, pools: LayerPools
    ) -> torch.Tensor | None:
        """Compress this step's tokens; return the entries [T, J] int32 that each token attends to, None for all."""
        if self.compressor is None:
            return None
        assert pools.state is not None and pools.entries is not None
        self.compressor(x, plan, self.kind, pools.state, pools.step.state, pools.entries)
        return None if self.indexer is None else self.indexer(x, query_latent, plan, pools)
