# SPDX-License-Identifier: Apache-2.0
"""DSpark: a block of tokens drafted at once from three layers' outputs, and a small table that chains them.

    taps    m_t = rms_norm(main_proj [mean over streams of each target layer's output at t], main_norm)
    rows    every stage keeps a window of latent rows made from m_t, one per certain position t
    block   the newest token, whose own position t + 1 the model has not run yet, and block_size - 1 noise tokens, at
            positions t + 1, t + 2, ...; each of them attends to the window that ends at t and to all rows of the block,
            later ones too. The block's rows are in nobody's cache
    chain   logits_k = head(norm(h_k)) + markov_w2 markov_w1[token before], for k = 0, 1, ...: the token after row k

Numerics   as the backbone's: the block's rows are rounded like rows of the cache
Source     the inference code of DeepSeek-V4-Flash-0731, as docs/numerics.md describes it
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from megamoe.cache.pools import LayerPools
from megamoe.formats.cache_rows import CachePool
from megamoe.models.deepseek_v4.block import Block
from megamoe.models.deepseek_v4.config import DSparkConfig, LayerKind, ModelConfig
from megamoe.models.deepseek_v4.hyper_connection import Unmixed, collapse_streams, wrap_sublayer
from megamoe.models.deepseek_v4.linear import LinearInput
from megamoe.models.deepseek_v4.plan import StepPlan
from megamoe.models.deepseek_v4.snapshots import finish_layer, save
from megamoe.models.deepseek_v4.weights import DSparkWeights
from megamoe.models.recipe import Recipe
from megamoe.ops.embed_streams import embed_streams
from megamoe.ops.linear import linear
from megamoe.ops.rms_norm import rms_norm
from megamoe.ops.rope import RopeTable
from megamoe.ops.sparse_attention import sparse_attention


class DSpark:
    """All stages of a DSpark draft; shares the embedding and the head with the backbone.

    Attributes:
        shape: block size, noise token, target layers, rank.
        stages: sliding-window blocks.
    """

    def __init__(
        self, weights: DSparkWeights, shape: DSparkConfig, config: ModelConfig, recipe: Recipe, table: RopeTable
    ) -> None:
        """Build the blocks from their weights; `table` is the table of sliding-window layers."""
        self.weights = weights
        self.shape = shape
        self.config = config
        self.recipe = recipe
        self.stages = tuple(
            Block(stage, config, recipe, kind=LayerKind.SWA, ratio=0, table=table) for stage in weights.stages
        )

    def main(self, taps: torch.Tensor) -> torch.Tensor:
        """Return what the stages' rows are made of, [T, D].

        Args:
            taps: [T, N * D], the stream means of the target layers side by side, in the order of their numbers in
                the configuration.
        """
        projected = LinearInput(taps, self.recipe).times(self.weights.main_proj)
        return rms_norm(projected, self.weights.main_norm, eps=self.config.rms_norm_eps)

    def fill(self, main: torch.Tensor, plan: StepPlan, pools: Sequence[LayerPools]) -> None:
        """Write every stage's rows of certain positions, and keep those at page boundaries.

        Args:
            main: [T, D] from `main`.
            plan: positions and slots of these tokens.
            pools: the stages' own pools.
        """
        source = LinearInput(main, self.recipe)
        for stage, stage_pools in zip(self.stages, pools, strict=True):
            window = stage_pools.window if plan.in_rings else stage_pools.step.window
            assert window is not None
            stage.attention.write_rows(source, plan.positions, window, plan.slots.window_slots)
            finish_layer(plan, stage_pools, LayerKind.SWA)
        if plan.in_rings and plan.saves is not None:
            save(plan.saves, pools, plan.window.block_tables, in_step=False)

    def block(
        self, table: torch.Tensor, ids: torch.Tensor, last: StepPlan, pools: Sequence[LayerPools]
    ) -> torch.Tensor:
        """Run the stages over one block per sequence.

        Args:
            table: [V, D], the embedding.
            ids: [N, K] int64, the newest token and noise; K is the block size.
            last: plan of the last certain position of each of the N sequences.
            pools: the stages' own pools; not changed.

        Returns:
            [N, K, D], the collapsed streams of the last stage.
        """
        num_sequences, size = ids.shape
        num_rings = last.window.block_tables.shape[0]
        rows = CachePool.allocate(num_rings, size, self.recipe.kv_row_format, self.config.head_dim, device=ids.device)
        plan = _BlockPlan.after(last, ids)
        dtype = self.recipe.activation_dtype
        streams: torch.Tensor | Unmixed
        streams = embed_streams(
            table, plan.token_ids, num_streams=self.config.hc_mult, out_dtype=dtype
        )  # [N * K, X, D]
        for stage, stage_pools in zip(self.stages, pools, strict=True):
            streams = _run(stage, streams, plan, stage_pools.window, rows, self.config)
        mixed = streams.mixed() if isinstance(streams, Unmixed) else streams
        return collapse_streams(mixed, self.weights.hc_head, self.config).view(num_sequences, size, -1)

    def base_logits(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits [N, K, V] of a block before the chain.

        Args:
            hidden: [N, K, D] from `block`.
            head: [V, D].
        """
        normed = rms_norm(hidden.flatten(0, 1), self.weights.norm, eps=self.config.rms_norm_eps)
        return linear(normed, head, out_dtype=torch.float32).view(*hidden.shape[:2], -1)

    def chain(
        self,
        base: torch.Tensor,
        newest: torch.Tensor,
        num_tokens: int,
        choose: Callable[[torch.Tensor, int], torch.Tensor],
    ) -> torch.Tensor:
        """Choose the drafted tokens one after the other.

        Args:
            base: [N, K, V] fp32 from `base_logits`.
            newest: [N] int64, each sequence's newest token.
            num_tokens: how many to draft, at most K.
            choose: (logits [N, V], how many were drafted before) -> ids [N] int64.

        Returns:
            [N, num_tokens] int64.
        """
        before, drafted = newest, []
        for ahead in range(num_tokens):
            bias = linear(self._table_row(before), self.weights.markov_w2, out_dtype=torch.float32)  # [N, V]
            before = choose(base[:, ahead] + bias, ahead)
            drafted.append(before)
        return torch.stack(drafted, dim=1)

    def confidence(self, hidden: torch.Tensor, newest: torch.Tensor, drafted: torch.Tensor) -> torch.Tensor:
        """Return how likely each drafted token is to be accepted, as the draft itself sees it: [N, num_tokens] fp32.

        Args:
            hidden: [N, K, D] from `block`.
            newest: [N] int64.
            drafted: [N, num_tokens] int64 from `chain`.
        """
        before = torch.cat((newest[:, None], drafted[:, :-1]), dim=1)  # [N, num_tokens]
        table = self._table_row(before.flatten())
        features = torch.cat((hidden[:, : drafted.shape[1]].flatten(0, 1), table), dim=1)
        return linear(features, self.weights.confidence, out_dtype=torch.float32).view(drafted.shape).sigmoid()

    def _table_row(self, ids: torch.Tensor) -> torch.Tensor:
        dtype = self.recipe.activation_dtype
        return embed_streams(self.weights.markov_w1, ids, num_streams=1, out_dtype=dtype).squeeze(1)


@dataclasses.dataclass(frozen=True, eq=False)
class _BlockPlan:
    """One block of K tokens per sequence, N of them; its rows lie in a pool with a block for every ring.

    Attributes:
        token_ids: [N * K] int64.
        positions: [N * K] int64.
        requests: [N * K] int32, the ring of each token's sequence.
        window_ends: [N * K] int64, the last certain position of the sequence: the window of all K ends there.
        slots: [N * K] int64, where each token's row goes.
        num_visible: [N * K] int32, K everywhere: each token sees all rows of its block.
        tables: [rings, 1] int32, the block of each ring, in the pool of windows and in the pool of these rows.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    requests: torch.Tensor
    window_ends: torch.Tensor
    slots: torch.Tensor
    num_visible: torch.Tensor
    tables: torch.Tensor

    @classmethod
    def after(cls, last: StepPlan, ids: torch.Tensor) -> _BlockPlan:
        """Plan blocks of `ids` [N, K] behind the last certain position of N sequences."""
        size = ids.shape[1]
        within = torch.arange(size, device=ids.device)
        requests = last.slots.requests
        return cls(
            token_ids=ids.flatten(),
            positions=(last.positions[:, None] + 1 + within).flatten(),
            requests=requests.repeat_interleave(size),
            window_ends=last.positions.repeat_interleave(size),
            slots=(requests.to(torch.int64)[:, None] * size + within).flatten(),
            num_visible=torch.full((ids.numel(),), size, dtype=torch.int32, device=ids.device),
            tables=last.window.block_tables,
        )


def _run(
    stage: Block,
    before: torch.Tensor | Unmixed,
    plan: _BlockPlan,
    window: CachePool,
    rows: CachePool,
    config: ModelConfig,
) -> Unmixed:
    """Run one stage over blocks whose own rows go to `rows`; returns the streams of N * K tokens."""
    attention, w = stage.attention, stage.weights

    def attend(x: torch.Tensor) -> torch.Tensor:
        q, _ = attention.project(x, plan.positions, rows, plan.slots)
        o = sparse_attention(
            q,
            window,
            rows,
            attention.weights.sink,
            positions=plan.positions,
            requests=plan.requests,
            first_idx=plan.requests,  # not read: no row of this step is in a step area
            window_size=attention.window_size,
            window_tables=plan.tables,
            step=None,
            entry_tables=plan.tables,
            entry_idx=None,
            num_visible=plan.num_visible,
            table=attention.table,
            scale=attention.scale,
            window_ends=plan.window_ends,
            operand_dtype=attention.recipe.attention_operand_dtype,
        )
        return attention.project_output(o)

    after = wrap_sublayer(before, w.hc_attn, w.attn_norm, attend, config)
    return wrap_sublayer(after, w.hc_ffn, w.ffn_norm, lambda x: stage.moe(x, plan.token_ids), config)
