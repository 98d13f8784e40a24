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
    allocate_layer,
    capacity_report,
    fit_tokens_per_page,
)
from megamoe.models.deepseek_v4.config import LayerKind, ModelConfig
from megamoe.models.deepseek_v4.plan import StepPlan
from megamoe.models.deepseek_v4.planner import Planner
from megamoe.models.deepseek_v4.snapshots import Snapshots
from megamoe.models.recipe import Recipe

MAX_CHUNK = 256  # most tokens of one forward pass over a Cache; its rings hold this many rows beyond what a token reads


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
        size: rings, pages and the longest chunk.
        num_snapshots: page boundaries for which there is room.
        device: where the pools are.
        specs: what every backbone layer keeps.
        draft_spec: what a draft stage keeps.
        layers: pools per backbone layer.
        draft_layers: pools per draft stage.
        snapshots: the backbone's rings at page boundaries, for sequences that share a prefix.
    """

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        size: CacheSize,
        *,
        num_draft_stages: int = 0,
        num_snapshots: int = 0,
        device: torch.device,
    ) -> None:
        """Allocate all pools.

        Raises:
            ValueError: a page is not a whole number of entries of every layer.
        """
        self.size = size
        self.num_snapshots = num_snapshots
        self.device = device
        self.specs = backbone_specs(config, recipe)
        self.draft_spec = layer_cache_spec(config, recipe, LayerKind.SWA, 0)
        self.layers: tuple[LayerPools, ...] = tuple(allocate_layer(spec, size, device) for spec in self.specs)
        self.draft_layers: tuple[LayerPools, ...] = tuple(
            allocate_layer(self.draft_spec, size, device) for _ in range(num_draft_stages)
        )
        self.snapshots = Snapshots(self.specs, self.layers, size, num_snapshots, device)
        self._planner = Planner(config.sliding_window, entry_ratios(config), size, device)

    def plan(self, batch: Batch) -> StepPlan:
        """Return the plan of a step of the backbone."""
        return self._planner.plan(batch)

    def draft_plan(self, batch: Batch) -> StepPlan:
        """Return the plan of a step of a draft stage, which keeps a window only."""
        return self._planner.plan(batch, with_entries=False)

    def save(self, ring_idx: int, length: int, snapshot_idx: int) -> None:
        """Copy the rows that continue a sequence of `length` tokens (whole pages) from its ring to a snapshot."""
        self.snapshots.save(ring_idx, length, snapshot_idx)

    def restore(self, snapshot_idx: int, ring_idx: int, length: int) -> None:
        """Copy the rows of a snapshot into the ring of a new sequence, which then has `length` tokens."""
        self.snapshots.restore(snapshot_idx, ring_idx, length)


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
            max_tokens, tokens_per_page=tokens_per_page(config), max_chunk=MAX_CHUNK
        )
        self._block_tables = np.arange(self._size.num_pages, dtype=np.int32)[None]
        self._shared = SharedCache(config, recipe, self._size, num_draft_stages=num_draft_stages, device=device)
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
        return self._shared.plan(self._batch(ids, self.length))

    def draft_plan(self, ids: torch.Tensor, stage: int) -> StepPlan:
        """Return the plan of an MTP stage over its next T positions."""
        return self._shared.draft_plan(self._batch(ids, self.draft_lengths[stage]))

    def _batch(self, ids: torch.Tensor, start: int) -> Batch:
        num_tokens = ids.shape[0]
        if start + num_tokens > self.max_tokens:
            raise ValueError(f"plan: position {start + num_tokens - 1} is beyond the cache's {self.max_tokens} tokens.")
        one = np.array([num_tokens, start, 0])
        return Batch(ids.cpu().numpy(), starts=one[1:2], counts=one[:1], rings=one[2:], block_tables=self._block_tables)
