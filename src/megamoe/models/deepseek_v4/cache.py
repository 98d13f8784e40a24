# SPDX-License-Identifier: Apache-2.0
"""The cache of one sequence: its pools, its length, and the plan of the next step.

The only mutable things are `length` and `draft_lengths`. Every slot follows from absolute positions, so moving a length
back forgets tokens (`rewind`), and nothing else has to be undone.
"""

from __future__ import annotations

import torch

from megamoe.cache.compressor_state import block_row_slots, completed_entries, num_visible_entries, state_capacity
from megamoe.cache.pools import (
    CacheSize,
    CapacityReport,
    LayerCacheSpec,
    LayerPools,
    allocate_layer,
    capacity_report,
    fit_tokens_per_page,
)
from megamoe.cache.ring import paged_slots, ring_slots, window_read_slots
from megamoe.models.deepseek_v4.config import LayerKind, ModelConfig
from megamoe.models.deepseek_v4.plan import EntryPlan, StepPlan
from megamoe.models.recipe import Recipe

MAX_CHUNK = 256  # most tokens of one forward pass; rings hold this many rows beyond what a token reads


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


class Cache:
    """Everything one sequence keeps between steps.

    Attributes:
        max_tokens: tokens the sequence may have.
        length: tokens it has.
        draft_lengths: positions each MTP stage has processed.
        layers: pools per backbone layer.
        draft_layers: pools per MTP stage.
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
        self._device = device
        self._window = config.sliding_window
        self._ratios: dict[LayerKind, int] = {
            k: r for k, r in zip(config.layer_kinds, config.ratios, strict=True) if k is not LayerKind.SWA
        }
        self._specs = [
            layer_cache_spec(config, recipe, kind, ratio)
            for kind, ratio in zip(config.layer_kinds, config.ratios, strict=True)
        ]
        self._size = CacheSize.for_one_sequence(
            max_tokens,
            tokens_per_page=fit_tokens_per_page(self._ratios.values()),
            max_chunk=MAX_CHUNK,
        )
        self._block_table = torch.arange(self._size.num_pages, dtype=torch.int32, device=device)
        self.layers: tuple[LayerPools, ...] = tuple(allocate_layer(spec, self._size, device) for spec in self._specs)
        draft_spec = layer_cache_spec(config, recipe, LayerKind.SWA, 0)
        self.draft_layers: tuple[LayerPools, ...] = tuple(
            allocate_layer(draft_spec, self._size, device) for _ in range(num_draft_stages)
        )
        self.draft_lengths = [0] * num_draft_stages

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
        return self._plan(ids, self.length, self._ratios)

    def draft_plan(self, ids: torch.Tensor, stage: int) -> StepPlan:
        """Return the plan of an MTP stage over its next T positions."""
        return self._plan(ids, self.draft_lengths[stage], {})

    def _plan(self, ids: torch.Tensor, start: int, ratios: dict[LayerKind, int]) -> StepPlan:
        num_tokens = ids.shape[0]
        if num_tokens > MAX_CHUNK:
            raise ValueError(f"plan: at most {MAX_CHUNK} tokens a step; got {num_tokens}. Split the step.")
        if start + num_tokens > self.max_tokens:
            raise ValueError(f"plan: position {start + num_tokens - 1} is beyond the cache's {self.max_tokens} tokens.")
        positions = torch.arange(start, start + num_tokens, device=self._device)
        capacity = self._window + MAX_CHUNK
        return StepPlan(
            token_ids=ids,
            positions=positions,
            query_starts=torch.tensor([0, num_tokens], dtype=torch.int32, device=self._device),
            window_slots=ring_slots(positions, capacity),
            window_read_slots=window_read_slots(positions, self._window, capacity),
            entries={kind: self._entry_plan(positions, start, ratio, kind) for kind, ratio in ratios.items()},
        )

    def _entry_plan(self, positions: torch.Tensor, start: int, ratio: int, kind: LayerKind) -> EntryPlan:
        overlap = kind is LayerKind.CSA
        rows_per_page = self._size.tokens_per_page // ratio
        capacity = state_capacity(ratio, overlap, MAX_CHUNK)
        done = completed_entries(start, positions.shape[0], ratio)
        entry_idx = torch.arange(done.start, done.stop, device=self._device)
        num_visible = num_visible_entries(positions, ratio)
        visible_slots = None
        if kind is LayerKind.HCA:
            all_idx = torch.arange((start + positions.shape[0]) // ratio, device=self._device)
            idx = torch.where(all_idx[None] < num_visible[:, None], all_idx[None], -1)  # [T, J]
            visible_slots = paged_slots(idx, self._block_table, rows_per_page)
        return EntryPlan(
            state_slots=ring_slots(positions, capacity),
            row_slots=block_row_slots(entry_idx, ratio, overlap, capacity),
            entry_pos=entry_idx * ratio,
            entry_slots=paged_slots(entry_idx, self._block_table, rows_per_page),
            block_tables=self._block_table[None],
            num_visible=num_visible,
            visible_slots=visible_slots,
        )
