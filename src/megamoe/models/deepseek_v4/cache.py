# SPDX-License-Identifier: Apache-2.0
"""The caches of many sequences (`SharedCache`) and of one (`Cache`).

Every slot follows from absolute positions, so a sequence is a ring number, a list of pages and a length. Moving the
length back forgets tokens, and nothing else has to be undone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megamoe.cache.batch import Batch
from megamoe.cache.pools import (
    CacheSize,
    CapacityReport,
    LayerCacheSpec,
    LayerPools,
    StepArea,
    allocate_layer,
    capacity_report,
    fit_tokens_per_page,
)
from megamoe.models.deepseek_v4.config import LayerKind, ModelConfig
from megamoe.models.deepseek_v4.plan import StepPlan
from megamoe.models.deepseek_v4.planner import Planner
from megamoe.models.deepseek_v4.snapshots import restore, save
from megamoe.models.recipe import Recipe

MAX_CHUNK = (
    256  # most tokens of one forward pass over a Cache, which has no step area: its rings hold as many more rows
)


def layer_cache_spec(config: ModelConfig, recipe: Recipe, kind: LayerKind, ratio: int) -> LayerCacheSpec:
    """Return what a layer of `kind` keeps under `recipe`."""
    if kind is LayerKind.SWA:
        return LayerCacheSpec(config.head_dim, recipe.kv_row_format, config.sliding_window)
    has_index = kind is LayerKind.CSA
    return LayerCacheSpec(
        config.head_dim,
        recipe.kv_row_format,
        config.sliding_window,
        ratio=ratio,
        overlap=has_index,
        index_width=config.index_head_dim if has_index else None,
        index_format=recipe.index_key_format if has_index else None,
    )


def backbone_specs(config: ModelConfig, recipe: Recipe) -> list[LayerCacheSpec]:
    """Return what every backbone layer keeps."""
    return [
        layer_cache_spec(config, recipe, kind, ratio)
        for kind, ratio in zip(config.layer_kinds, config.ratios, strict=True)
    ]


def entry_ratios(config: ModelConfig) -> dict[LayerKind, int]:
    """Return tokens per entry, by the kind of layer that has entries."""
    return {k: r for k, r in zip(config.layer_kinds, config.ratios, strict=True) if k is not LayerKind.SWA}


def tokens_per_page(config: ModelConfig, at_least: int = 256) -> int:
    """Return the smallest page of at least `at_least` tokens that is whole in every layer."""
    return fit_tokens_per_page(entry_ratios(config).values(), at_least)


class SharedCache:
    """The pools that all sequences of a model share.

    Attributes:
        size: rings, pages and the longest steps.
        num_snapshots: page boundaries for which there is room.
        device: where the pools are.
        layers: pools per backbone layer.
        draft_layers: pools per draft stage.
        ring_tables: [rings, 1] int32, the block of each ring.
    """

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        size: CacheSize,
        *,
        max_tokens: int,
        num_draft_stages: int = 0,
        num_snapshots: int = 0,
        device: torch.device,
    ) -> None:
        """Allocate all pools for sequences of at most `max_tokens` tokens, drafts included.

        Raises:
            ValueError: a page is not a whole number of entries of every layer.
        """
        self.size = size
        self.num_snapshots = num_snapshots
        self.device = device
        specs = backbone_specs(config, recipe)
        specs += [layer_cache_spec(config, recipe, LayerKind.SWA, 0)] * num_draft_stages
        area = StepArea(specs, size, device)
        pools = tuple(allocate_layer(spec, size, device, area=area, num_snapshots=num_snapshots) for spec in specs)
        num_layers = len(specs) - num_draft_stages
        self.layers: tuple[LayerPools, ...] = pools[:num_layers]
        self.draft_layers: tuple[LayerPools, ...] = pools[num_layers:]
        self._planner = Planner(config.sliding_window, entry_ratios(config), size, max_tokens, device)
        self.ring_tables = self._planner.ring_tables

    def set_pages(self, ring_idx: int, pages: Sequence[int], first: int = 0) -> None:
        """Say which pages the sequence of a ring has, from its page `first` on; it has no more than these."""
        self._planner.set_pages(ring_idx, pages, first)

    def plan(self, batch: Batch, *, fill_up: bool = True) -> StepPlan:
        """Send what a step of the backbone is, filled up to its bucket or not; `derive` fills its slots.

        The next call overwrites the plan.
        """
        return self._planner.describe(batch, fill_up=fill_up)

    def derive(self, plan: StepPlan) -> None:
        """Fill the slots of a plan where the pools are: the first work of a step on the device."""
        self._planner.derive(plan)

    def draft_plan(self, batch: Batch) -> StepPlan:
        """Return the plan of a step of a draft stage, which keeps a window only; the next call overwrites it."""
        return self._planner.draft_plan(batch)

    def save(self, ring_idx: int, length: int, snapshot_idx: int) -> None:
        """Copy the rows that continue a sequence of `length` tokens (whole pages) from its ring to a snapshot."""
        one = torch.tensor([[ring_idx, length, 0, 0, snapshot_idx]], dtype=torch.int32).to(self.device)
        save(one, self.layers, self.ring_tables, in_step=False)

    def finish(self, plan: StepPlan) -> None:
        """Copy the rows at the page boundaries of a step that wrote into the rings; a longer one has done it."""
        if plan.in_rings and plan.saves is not None:
            save(plan.saves, self.layers, self.ring_tables, in_step=False)

    def restore(self, snapshot_idx: int, ring_idx: int, length: int) -> None:
        """Copy the rows of a snapshot into the ring of a new sequence, which then has `length` tokens."""
        restore(self.layers, snapshot_idx, ring_idx, length)


class Cache:
    """Everything one sequence keeps between steps.

    Attributes:
        max_tokens: tokens the sequence may have.
        length: tokens it has.
        draft_lengths: positions each MTP stage has processed.
    """

    def __init__(
        self, config: ModelConfig, recipe: Recipe, *, max_tokens: int, num_draft_stages: int, device: torch.device
    ) -> None:
        """Allocate the pools of an empty sequence.

        Raises:
            ValueError: max_tokens is not in 1 .. config.max_position_embeddings.
        """
        if not 1 <= max_tokens <= config.max_position_embeddings:
            raise ValueError(
                f"cache: max_tokens must be in 1 to {config.max_position_embeddings} (this model's context); "
                f"got {max_tokens}."
            )
        self.max_tokens = max_tokens
        self.length = 0
        self._longest = 0  # rows of positions below this may have overwritten older ones in the rings
        self._specs = backbone_specs(config, recipe)
        self._size = CacheSize.for_one_sequence(
            max_tokens, tokens_per_page=tokens_per_page(config), ring_tokens=MAX_CHUNK
        )
        self._shared = SharedCache(
            config, recipe, self._size, max_tokens=max_tokens, num_draft_stages=num_draft_stages, device=device
        )
        self._shared.set_pages(0, range(self._size.num_pages))
        self.draft_lengths = [0] * num_draft_stages

    @property
    def layers(self) -> Sequence[LayerPools]:
        """Pools per backbone layer."""
        return self._shared.layers

    @property
    def draft_layers(self) -> Sequence[LayerPools]:
        """Pools per MTP stage."""
        return self._shared.draft_layers

    def capacity_report(self) -> CapacityReport:
        """Return what this cache costs, bytes per token and bytes per sequence apart (backbone layers)."""
        return capacity_report(self._specs, self._size)

    def check_room(self, num_tokens: int) -> None:
        """Refuse a step that would overflow the cache.

        Raises:
            ValueError: fewer than num_tokens tokens are left.
        """
        if self.length + num_tokens > self.max_tokens:
            raise ValueError(
                f"step: the cache holds {self.max_tokens} tokens and has {self.length}; got {num_tokens} more. "
                "Make a larger one with new_cache(max_tokens=...)."
            )

    def advance(self, num_tokens: int) -> None:
        """Count tokens whose rows are written."""
        self.length += num_tokens
        self._longest = max(self._longest, self.length)

    def rewind(self, length: int) -> None:
        """Forget every token from position `length` on.

        Raises:
            ValueError: the rows before `length` that the next token needs were overwritten by later ones (more than
                MAX_CHUNK tokens below the longest the sequence has been), or length is not in 0 .. self.length.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"rewind: length must be in 0 to {self.length}; got {length}.")
        if length and self._longest - length > MAX_CHUNK:
            raise ValueError(
                f"rewind: at most {MAX_CHUNK} tokens below the longest the sequence has been ({self._longest}), "
                f"or to 0; got {length}. Recompute the sequence."
            )
        if not length:
            self._longest = 0
        self.length = length
        self.draft_lengths = [min(length, draft) for draft in self.draft_lengths]

    def plan(self, ids: torch.Tensor) -> StepPlan:
        """Return the plan that appends `ids` ([T] int64, T <= MAX_CHUNK) at the current length."""
        plan = self._shared.plan(self._batch(ids, self.length), fill_up=False)
        self._shared.derive(plan)
        return plan

    def draft_plan(self, ids: torch.Tensor, stage: int) -> StepPlan:
        """Return the plan of an MTP stage over its next T positions."""
        return self._shared.draft_plan(self._batch(ids, self.draft_lengths[stage]))

    def _batch(self, ids: torch.Tensor, start: int) -> Batch:
        num_tokens = ids.shape[0]
        if start + num_tokens > self.max_tokens:
            raise ValueError(f"plan: position {start + num_tokens - 1} is beyond the cache's {self.max_tokens} tokens.")
        one = np.array([num_tokens, start, 0])
        return Batch(ids.cpu().numpy(), starts=one[1:2], counts=one[:1], rings=one[2:])
