# SPDX-License-Identifier: Apache-2.0
"""From a batch (who runs which tokens) to a plan (which slots the layers read and write).

All index arithmetic of a step happens here, once, on the host, over the whole batch at a time: some forty numpy calls
of a microsecond, where small tensors would cost several times that. What the numbers mean is said, one position at a
time, by `cache.ring` and `cache.compressor_state`; the tests compare. Layers of one kind share the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megamoe.cache.batch import Batch, IntArray
from megamoe.cache.compressor_state import num_rows_pooled, state_capacity
from megamoe.cache.pools import CacheSize
from megamoe.models.deepseek_v4.config import LayerKind
from megamoe.models.deepseek_v4.plan import EntryPlan, StepPlan


class Planner:
    """Makes the plan of a step."""

    def __init__(self, window: int, ratios: Mapping[LayerKind, int], size: CacheSize, device: torch.device) -> None:
        """Keep the geometry.

        Args:
            window: positions a token sees in the window, itself included.
            ratios: tokens per entry, by the kind of layer that has entries.
            size: the shared cache.
            device: where the plan's tensors go.
        """
        self._size = size
        self._device = device
        self._on_cpu = device.type == "cpu"
        self._window = window
        self._window_capacity = window + size.max_chunk
        self._window_back = np.arange(1 - window, 1)
        self._kinds = [_EntryPlanner(kind, ratio, size) for kind, ratio in ratios.items()]

    def plan(self, batch: Batch, *, with_entries: bool = True) -> StepPlan:
        """Return the plan of a step.

        Args:
            batch: the step.
            with_entries: False for layers that keep a window and nothing else (draft stages).

        Raises:
            ValueError: a sequence has more tokens than rings have room for, or lacks a page.
        """
        starts, counts, tensor = batch.starts, batch.counts, self._tensor
        num_sequences, num_tokens = len(counts), len(batch.token_ids)
        if num_tokens == num_sequences:  # decoding: one token each
            query_starts = np.arange(num_sequences + 1, dtype=np.int32)
            sequence_idx = np.arange(num_sequences)
            positions, rings = starts, batch.rings
        else:
            self._refuse_long_chunks(counts, with_entries)
            query_starts = np.zeros(num_sequences + 1, dtype=np.int32)
            counts.cumsum(out=query_starts[1:])
            sequence_idx = np.arange(num_sequences).repeat(counts)  # [T]
            positions = np.arange(num_tokens) + (starts - query_starts[:-1])[sequence_idx]
            rings = batch.rings[sequence_idx]
        capacity = self._window_capacity
        ring_rows = rings * capacity
        reads = positions[:, None] + self._window_back  # [T, window]
        window_read_slots = reads % capacity + ring_rows[:, None]
        window_read_slots[reads < 0] = -1
        starts_tensor = tensor(query_starts)
        entries = {}
        if with_entries and num_tokens:
            tables = tensor(batch.block_tables)
            for kind in self._kinds:
                kind.refuse_missing_pages(batch)
                entries[kind.kind] = kind.plan(batch, tables, positions, rings, sequence_idx, tensor)
        elif with_entries:
            entries = {kind.kind: kind.nothing(batch, tensor) for kind in self._kinds}
        return StepPlan(
            token_ids=tensor(batch.token_ids),
            positions=tensor(positions),
            query_starts=starts_tensor,
            window_slots=tensor(positions % capacity + ring_rows),
            window_read_slots=tensor(window_read_slots),
            entries=entries,
        )

    def _refuse_long_chunks(self, counts: IntArray, with_entries: bool) -> None:
        # A window alone has room for one token more: a token reads window - 1 rows before it.
        most = self._size.max_chunk if with_entries else self._size.max_chunk + 1
        if len(counts) and int(counts.max()) > most:
            raise ValueError(
                f"plan: at most {most} tokens of one sequence a step; got {int(counts.max())}. Split the step."
            )

    def _tensor(self, values: npt.NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self._on_cpu else tensor.to(self._device, non_blocking=True)


class _EntryPlanner:
    """The part of a plan that the layers of one kind share."""

    def __init__(self, kind: LayerKind, ratio: int, size: CacheSize) -> None:
        self.kind = kind
        self.ratio = ratio
        self.rows_per_page = size.tokens_per_page // ratio
        self.tokens_per_page = size.tokens_per_page
        overlap = kind is LayerKind.CSA
        self.capacity = state_capacity(ratio, overlap, size.max_chunk)
        self.block_back = np.arange(-num_rows_pooled(ratio, overlap), 0)
        self.reads_all = kind is LayerKind.HCA
        self.page_rows = np.arange(self.rows_per_page)

    def refuse_missing_pages(self, batch: Batch) -> None:
        last_page = (batch.starts + batch.counts - 1) // self.tokens_per_page
        tables = batch.block_tables
        if int(last_page.max()) >= tables.shape[1] or int(tables[np.arange(len(tables)), last_page].min()) < 0:
            raise ValueError(
                f"plan: a sequence lacks pages: block tables have {tables.shape[1]} pages of {self.tokens_per_page} "
                f"tokens, and positions go up to {int((batch.starts + batch.counts).max()) - 1}. Extend it first."
            )

    def plan(
        self,
        batch: Batch,
        tables: torch.Tensor,
        positions: IntArray,
        rings: IntArray,
        sequence_idx: IntArray,
        tensor: Any,
    ) -> EntryPlan:
        ratio, rows_per_page = self.ratio, self.rows_per_page
        ring_rows = rings * self.capacity
        visible = (positions + 1) // ratio  # [T]
        completes = (visible * ratio == positions + 1).nonzero()[0]  # the tokens that complete a block
        entry_idx = visible[completes] - 1
        if len(completes):
            ends = positions[completes] + 1
            reads = ends[:, None] + self.block_back  # [W, rows of a block]
            row_slots = reads % self.capacity + ring_rows[completes][:, None]
            row_slots[reads < 0] = -1
            pages = batch.block_tables[sequence_idx[completes], entry_idx // rows_per_page].astype(np.int64)
            entry_slots = pages * rows_per_page + entry_idx % rows_per_page
        else:
            row_slots = np.empty((0, len(self.block_back)), dtype=np.int64)
            entry_slots = entry_idx
        return EntryPlan(
            state_slots=tensor(positions % self.capacity + ring_rows),
            row_slots=tensor(row_slots),
            entry_pos=tensor(entry_idx * ratio),
            entry_slots=tensor(entry_slots),
            block_tables=tables,
            num_visible=tensor(visible.astype(np.int32)),
            visible_slots=tensor(self._all_slots(batch, visible, sequence_idx)) if self.reads_all else None,
        )

    def _all_slots(self, batch: Batch, visible: IntArray, sequence_idx: IntArray) -> IntArray:
        """Return the slots [T, J] of all entries a token may use."""
        most = int(visible.max())
        num_pages = -(-most // self.rows_per_page)
        pages = batch.block_tables[:, :num_pages, None].astype(np.int64)
        slots = (pages * self.rows_per_page + self.page_rows).reshape(len(pages), -1)[:, :most]
        slots = slots[sequence_idx]
        slots[np.arange(most) >= visible[:, None]] = -1
        return slots

    def nothing(self, batch: Batch, tensor: Any) -> EntryPlan:
        """Return the plan of a step without tokens."""
        none = np.empty(0, dtype=np.int64)
        return EntryPlan(
            state_slots=tensor(none),
            row_slots=tensor(np.empty((0, len(self.block_back)), dtype=np.int64)),
            entry_pos=tensor(none),
            entry_slots=tensor(none),
            block_tables=tensor(batch.block_tables),
            num_visible=tensor(none.astype(np.int32)),
            visible_slots=tensor(np.empty((0, 0), dtype=np.int64)) if self.reads_all else None,
        )
