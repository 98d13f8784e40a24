# SPDX-License-Identifier: Apache-2.0
"""From a batch (who runs which tokens) to a plan (which slots the layers read and write).

All index arithmetic of a step happens here, once, on the host, over all sequences and kinds of layers at a time: some
thirty numpy calls of a microsecond, where small tensors would cost several times that. What the numbers mean is said,
one position at a time, by `cache.ring` and `cache.compressor_state`; the tests compare. Layers of one kind share it.
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
        # Row r: the ring positions r, r + 1, ... of a window, wrapped.
        twice = np.arange(2 * self._window_capacity) % self._window_capacity
        self._window_rows = np.lib.stride_tricks.sliding_window_view(twice, window)
        self._count = np.arange(size.num_sequences + 1)
        self._count_int32 = self._count.astype(np.int32)
        self._kinds = [_EntryPlanner(kind, ratio, size, device) for kind, ratio in ratios.items()]
        self._ratios = np.array([[kind.ratio] for kind in self._kinds]).reshape(-1, 1)
        self._capacities = np.array([[self._window_capacity], *([kind.capacity] for kind in self._kinds)])

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
            query_starts = self._count_int32[: num_sequences + 1]
            sequence_idx = self._count[:num_sequences]
            positions, rings = starts, batch.rings
        else:
            self._refuse_long_chunks(counts, with_entries)
            query_starts = np.zeros(num_sequences + 1, dtype=np.int32)
            counts.cumsum(out=query_starts[1:])
            sequence_idx = self._count[:num_sequences].repeat(counts)  # [T]
            positions = np.arange(num_tokens) + (starts - query_starts[:-1])[sequence_idx]
            rings = batch.rings[sequence_idx]
        capacities = self._capacities if with_entries else self._capacities[:1]
        ring_rows = rings * capacities  # [rings of a layer, T]
        window_slots, *state_slots = tensor(positions % capacities + ring_rows).unbind()
        oldest = positions - (self._window - 1)
        window_read_slots = self._window_rows[oldest % self._window_capacity]  # [T, window]
        window_read_slots += ring_rows[0, :, None]
        if num_tokens and int(oldest.min()) < 0:
            window_read_slots[np.arange(self._window) < -oldest[:, None]] = -1
        entries = {}
        if with_entries and self._kinds:
            if num_tokens:
                self._refuse_missing_pages(batch)
            lengths = positions + 1
            visible = lengths // self._ratios  # [kinds, T]
            completes = visible * self._ratios == lengths  # the tokens that complete a block
            none = not completes.any()
            tables, num_visible = tensor(batch.block_tables), tensor(visible.astype(np.int32)).unbind()
            for idx, kind in enumerate(self._kinds):
                at = None if none else completes[idx].nonzero()[0]
                done = kind.nothing if at is None or not len(at) else kind.completed(batch, positions, sequence_idx, at)
                row_slots, entry_pos, entry_slots = done
                all_slots = kind.all_slots(batch, visible[idx], sequence_idx) if kind.reads_all else None
                entries[kind.kind] = EntryPlan(
                    state_slots=state_slots[idx],
                    row_slots=row_slots,
                    entry_pos=entry_pos,
                    entry_slots=entry_slots,
                    block_tables=tables,
                    num_visible=num_visible[idx],
                    visible_slots=None if all_slots is None else tensor(all_slots),
                )
        return StepPlan(
            token_ids=tensor(batch.token_ids),
            positions=tensor(positions),
            query_starts=tensor(query_starts),
            window_slots=window_slots,
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

    def _refuse_missing_pages(self, batch: Batch) -> None:
        last_page = (batch.starts + batch.counts - 1) // self._size.tokens_per_page
        tables = batch.block_tables
        if int(last_page.max()) >= tables.shape[1] or int(tables[self._count[: len(tables)], last_page].min()) < 0:
            raise ValueError(
                f"plan: a sequence lacks pages: block tables have {tables.shape[1]} pages of "
                f"{self._size.tokens_per_page} tokens, and positions go up to "
                f"{int((batch.starts + batch.counts).max()) - 1}. Extend it first."
            )

    def _tensor(self, values: npt.NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self._on_cpu else tensor.to(self._device, non_blocking=True)


Completed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(row_slots, entry_pos, entry_slots) of an EntryPlan."""


class _EntryPlanner:
    """What concerns the entries of one kind of layer."""

    def __init__(self, kind: LayerKind, ratio: int, size: CacheSize, device: torch.device) -> None:
        overlap = kind is LayerKind.CSA
        self.kind = kind
        self.ratio = ratio
        self.capacity = state_capacity(ratio, overlap, size.max_chunk)
        self.reads_all = kind is LayerKind.HCA
        self._device = device
        self._rows_per_page = size.tokens_per_page // ratio
        self._page_rows = np.arange(self._rows_per_page)
        self._block_back = np.arange(-num_rows_pooled(ratio, overlap), 0)
        none = torch.empty(0, dtype=torch.int64, device=device)
        self.nothing: Completed = (none.view(0, 1).expand(0, len(self._block_back)), none, none)

    def completed(self, batch: Batch, positions: IntArray, sequence_idx: IntArray, at: IntArray) -> Completed:
        """Return what the tokens `at`, each the last of a block, complete."""
        sequences = sequence_idx[at]
        entry_idx = positions[at] // self.ratio
        reads = positions[at, None] + 1 + self._block_back  # [W, rows of a block]
        row_slots = reads % self.capacity + (batch.rings[sequences] * self.capacity)[:, None]
        row_slots[reads < 0] = -1
        pages = batch.block_tables[sequences, entry_idx // self._rows_per_page].astype(np.int64)
        entry_slots = pages * self._rows_per_page + entry_idx % self._rows_per_page
        found = (row_slots, entry_idx * self.ratio, entry_slots)
        return tuple(torch.from_numpy(one).to(self._device) for one in found)  # type: ignore[return-value]

    def all_slots(self, batch: Batch, visible: IntArray, sequence_idx: IntArray) -> IntArray:
        """Return the slots [T, J] of all entries a token may use."""
        most = int(visible.max()) if len(visible) else 0
        num_pages = -(-most // self._rows_per_page)
        pages = batch.block_tables[:, :num_pages, None].astype(np.int64)
        slots = (pages * self._rows_per_page + self._page_rows).reshape(len(pages), -1)[:, :most]
        slots = slots[sequence_idx]
        slots[np.arange(most) >= visible[:, None]] = -1
        return slots
