# SPDX-License-Identifier: Apache-2.0
"""From a batch (who runs which tokens) to a plan (which slots the layers read and write).

All index arithmetic of a step happens here, once, on the host, in numpy: a step of eight sequences takes some sixty
array operations of a microsecond each, where small tensors would take ten. Layers of one kind share the result.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from megamoe.cache.batch import Batch
from megamoe.cache.compressor_state import block_row_slots, num_visible_entries, state_capacity
from megamoe.cache.pools import CacheSize
from megamoe.cache.ring import IntArray, batch_paged_slots, ring_slots, window_read_slots
from megamoe.models.deepseek_v4.config import LayerKind
from megamoe.models.deepseek_v4.plan import EntryPlan, StepPlan


@dataclasses.dataclass(frozen=True)
class Planner:
    """Makes the plan of a step.

    Attributes:
        window: positions a token sees in the window, itself included.
        ratios: tokens per entry, by the kind of layer that has entries.
        size: the shared cache.
        device: where the plan's tensors go.
    """

    window: int
    ratios: dict[LayerKind, int]
    size: CacheSize
    device: torch.device

    def plan(self, batch: Batch, *, with_entries: bool = True) -> StepPlan:
        """Return the plan of a step.

        Args:
            batch: the step.
            with_entries: False for layers that keep a window and nothing else (draft stages).

        Raises:
            ValueError: a sequence has more tokens than rings have room for, or lacks a page.
        """
        starts, counts = batch.starts, batch.counts
        # A window alone has room for one token more: a token reads window - 1 rows before it.
        most = self.size.max_chunk if with_entries else self.size.max_chunk + 1
        if int(counts.max(initial=0)) > most:
            raise ValueError(
                f"plan: at most {most} tokens of one sequence a step; got {int(counts.max())}. Split the step."
            )
        query_starts = np.zeros(len(counts) + 1, dtype=np.int64)
        counts.cumsum(out=query_starts[1:])
        sequence_idx = np.arange(len(counts)).repeat(counts)  # [T]
        positions = np.arange(len(batch.token_ids)) + (starts - query_starts[:-1])[sequence_idx]
        rings = batch.rings[sequence_idx]
        capacity = self.window + self.size.max_chunk
        entries = (
            {kind: self._entries(batch, kind, positions, rings, sequence_idx) for kind in self.ratios}
            if with_entries
            else {}
        )
        return StepPlan(
            token_ids=self._tensor(batch.token_ids),
            positions=self._tensor(positions),
            query_starts=self._tensor(query_starts.astype(np.int32)),
            window_slots=self._tensor(ring_slots(positions, capacity, ring_idx=rings)),
            window_read_slots=self._tensor(window_read_slots(positions, self.window, capacity, ring_idx=rings)),
            entries=entries,
        )

    def _entries(
        self, batch: Batch, kind: LayerKind, positions: IntArray, rings: IntArray, sequence_idx: IntArray
    ) -> EntryPlan:
        ratio, overlap = self.ratios[kind], kind is LayerKind.CSA
        rows_per_page = self.size.tokens_per_page // ratio
        capacity = state_capacity(ratio, overlap, self.size.max_chunk)
        num_visible = num_visible_entries(positions, ratio)
        completes = ((positions + 1) % ratio == 0).nonzero()[0]  # the tokens that complete a block
        entry_idx = positions[completes] // ratio
        visible_slots = None
        if kind is LayerKind.HCA:  # reads every entry
            columns = np.arange(int(num_visible.max(initial=0)))
            row_idx = np.where(columns < num_visible[:, None], columns, -1)  # [T, J]
            visible_slots = batch_paged_slots(row_idx, sequence_idx[:, None], batch.block_tables, rows_per_page)
        entry_slots = batch_paged_slots(entry_idx, sequence_idx[completes], batch.block_tables, rows_per_page)
        row_slots = block_row_slots(entry_idx, ratio, overlap, capacity, ring_idx=rings[completes])
        return EntryPlan(
            state_slots=self._tensor(ring_slots(positions, capacity, ring_idx=rings)),
            row_slots=self._tensor(row_slots),
            entry_pos=self._tensor(entry_idx * ratio),
            entry_slots=self._tensor(entry_slots),
            block_tables=self._tensor(batch.block_tables),
            num_visible=self._tensor(num_visible),
            visible_slots=None if visible_slots is None else self._tensor(visible_slots),
        )

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)
