# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer: window in all kinds, compressed entries in CSA and HCA."""

from __future__ import annotations

import torch

from megamoe.cache.pools import LayerPools
from megamoe.formats.cache_rows import CachePool
from megamoe.models.deepseek_v4.compressor import Compressor
from megamoe.models.deepseek_v4.config import LayerKind, ModelConfig
from megamoe.models.deepseek_v4.indexer import Indexer
from megamoe.models.deepseek_v4.linear import LinearInput, grouped
from megamoe.models.deepseek_v4.plan import StepPlan
from megamoe.models.deepseek_v4.snapshots import finish_layer
from megamoe.models.deepseek_v4.weights import AttentionWeights
from megamoe.models.recipe import Recipe
from megamoe.ops.linear import linear
from megamoe.ops.rope import RopeTable
from megamoe.ops.rotate_queries import rotate_queries
from megamoe.ops.sparse_attention import sparse_attention
from megamoe.ops.write_latent import write_latent


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
        self.compressed_sizes = _compressed_sizes(weights)

    def __call__(self, x: torch.Tensor, plan: StepPlan, pools: LayerPools) -> torch.Tensor:
        """Return the attention output [T, D] in the dtype of x; writes this step's rows into the pools.

        Args:
            x: [T, D] normed layer input.
            plan: slots and positions of this step.
            pools: this layer's pools.
        """
        window = pools.window if plan.in_rings else pools.step.window
        assert window is not None
        q, index_q = self.project(x, plan.positions, window, plan.slots.window_slots)
        entry_idx = self.select_entries(x, index_q, plan, pools)
        o = self.attend(q, plan, pools, entry_idx)
        finish_layer(plan, pools, self.kind)
        return self.project_output(o)

    def project(
        self, x: torch.Tensor, positions: torch.Tensor, window: CachePool, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Store the latent rows, key and value at once, and return the queries.

        Args:
            x: [T, D] normed layer input.
            positions: [T] int64.
            window: where the rows go.
            slots: [T] int64, where in it; -1 for nobody.

        Returns:
            Rotated queries [T, H, C]; index queries [T, Hi, K] as projected, or None in layers without an indexer.
        """
        w = self.weights
        source = LinearInput(x, self.recipe)
        if w.wq_a_wkv is None:
            latent, kv = source.times(w.wq_a), source.times(w.wkv)
        else:
            latent, kv = source.times(w.wq_a_wkv).split([w.wq_a.shape[0], w.wkv.shape[0]], dim=1)
        normed = write_latent(
            latent, kv, w.q_norm, w.kv_norm, window, slots, positions, self.table, eps=self.eps
        )  # [T, q_lora]
        assert normed is not None
        return self.queries(LinearInput(normed, self.recipe), positions)

    def queries(self, query_latent: LinearInput, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return rotated queries [T, H, C] and projected index queries [T, Hi, K] of the normed low-rank query."""
        w, index_q = self.weights, None
        if self.indexer is None or w.indexer is None:
            q = query_latent.times(w.wq_b)
        else:
            if w.wq_b_both is None:
                q, index_q = query_latent.times(w.wq_b), query_latent.times(w.indexer.wq_b)
            else:
                sizes = [w.wq_b.shape[0], w.indexer.wq_b.shape[0]]
                q, index_q = query_latent.times(w.wq_b_both).split(sizes, dim=1)
            index_q = index_q.unflatten(-1, (self.indexer.num_heads, self.indexer.head_dim))  # [T, Hi, K]
        q = q.unflatten(-1, (self.num_heads, self.head_dim))  # [T, H, C]
        return rotate_queries(q, positions, self.table, eps=self.eps), index_q

    def write_rows(self, source: LinearInput, positions: torch.Tensor, window: CachePool, slots: torch.Tensor) -> None:
        """Store the latent rows of tokens that no query is needed of; arguments as in `project`."""
        w = self.weights
        kv = source.times(w.wkv)
        write_latent(None, kv, None, w.kv_norm, window, slots, positions, self.table, eps=self.eps)

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
            operand_dtype=self.recipe.attention_operand_dtype,
        )

    def project_output(self, o: torch.Tensor) -> torch.Tensor:
        """Return [T, D] from [T, H, C]: one low-rank projection per group of heads, then `wo_b`."""
        w = self.weights
        z = grouped(o.reshape(o.shape[0], self.num_groups, -1), w.wo_a, self.recipe)  # [T, G, o_lora]
        return LinearInput(z.flatten(1), self.recipe).times(w.wo_b)

    def select_entries(
        self, x: torch.Tensor, index_q: torch.Tensor | None, plan: StepPlan, pools: LayerPools
    ) -> torch.Tensor | None:
        """Compress this step's tokens; return the entries [T, J] int32 that each token attends to, None for all."""
        if self.compressor is None:
            return None
        assert pools.state is not None and pools.entries is not None and self.weights.compressed is not None
        projected = linear(x, self.weights.compressed, out_dtype=torch.float32)  # [T, raw, index raw, Hi]
        raw, index_raw, head_weights = projected.split(self.compressed_sizes, dim=1)
        self.compressor(raw, plan, self.kind, pools.state, pools.step.state, pools.entries, x.dtype)
        if self.indexer is None:
            return None
        assert index_q is not None
        return self.indexer(index_q, index_raw, head_weights, plan, pools)


def _compressed_sizes(weights: AttentionWeights) -> list[int]:
    """Return the columns of the stacked fp32 linear: raw rows, raw rows of the index compressor, index heads."""
    if weights.compressor is None:
        return []
    if weights.indexer is None:
        return [2 * weights.compressor.wkv.shape[0], 0, 0]
    index = weights.indexer
    return [2 * weights.compressor.wkv.shape[0], 2 * index.compressor.wkv.shape[0], index.weights_proj.shape[0]]
