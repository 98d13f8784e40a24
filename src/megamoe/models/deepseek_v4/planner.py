# SPDX-License-Identifier: Apache-2.0
"""From a batch (who runs which tokens) to a plan (what the layers read and write).

The host says four numbers a token, and which pages were added to which sequence. They travel in one block; the slots
are worked out where the caches are, by `ops.plan_slots`. Block tables and plans stay at their addresses: a decode step
of a bucket always fills the same tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from megamoe.cache.batch import Batch
from megamoe.cache.buckets import bucket_of
from megamoe.cache.compressor_state import state_capacity
from megamoe.cache.pools import CacheSize
from megamoe.models.deepseek_v4.config import LayerKind
from megamoe.models.deepseek_v4.plan import StepPlan
from megamoe.ops.plan_slots import EntryTables, RowTables, StepSlots, plan_slots
from megamoe.ops.write_block_tables import write_block_tables

NOBODY = -1

Change = tuple[int, int, int]
"""(ring, column, page) of a block table."""


class Planner:
    """Makes the plan of a step; owns the block tables.

    Attributes:
        page_tables: [rings, pages of the longest sequence] int32, the pages of each ring's sequence; on the device.
        ring_tables: [rings, 1] int32, each ring's own block of a pool of rings.
    """

    def __init__(
        self, window: int, ratios: Mapping[LayerKind, int], size: CacheSize, max_tokens: int, device: torch.device
    ) -> None:
        """Allocate the tables.

        Args:
            window: positions a token sees in the window, itself included.
            ratios: tokens per entry, by the kind of layer that has entries.
            size: the shared cache.
            max_tokens: tokens of the longest sequence, drafts included.
            device: where the plans go.
        """
        self._size = size
        self._device = device
        num_rings, width = size.num_sequences, max(1, -(-max_tokens // size.tokens_per_page))
        self.page_tables = torch.full((num_rings, width), NOBODY, dtype=torch.int32, device=device)
        self.ring_tables = torch.arange(num_rings, dtype=torch.int32, device=device)[:, None]
        self._num_pages = np.zeros(num_rings, dtype=np.int64)  # of each ring's sequence
        self._changes: dict[tuple[int, int], int] = {}  # (ring, column) -> page that the device has not been told of
        self.window = RowTables(self.ring_tables, window + size.ring_tokens)
        self.tables = {
            kind: EntryTables(
                ratio,
                RowTables(self.ring_tables, state_capacity(ratio, kind is LayerKind.CSA, size.ring_tokens)),
                RowTables(self.page_tables, size.tokens_per_page // ratio),
            )
            for kind, ratio in ratios.items()
        }
        decode = bucket_of(num_rings * size.ring_tokens)
        self._steps = _Steps(max(decode, size.step_tokens), self.window, self.tables, device)
        self._drafts = _Steps(max(decode, size.step_tokens) + num_rings, self.window, {}, device)

    def set_pages(self, ring: int, pages: Sequence[int], first: int = 0) -> None:
        """Say which pages the sequence of a ring has, from its page `first` on; it has no more than these.

        Raises:
            ValueError: the sequence has fewer pages before `first`, or more pages than the longest sequence.
        """
        known, num_pages, width = int(self._num_pages[ring]), first + len(pages), self.page_tables.shape[1]
        if first > known or num_pages > width:
            raise ValueError(
                f"set_pages: a sequence has pages 0 to at most {width - 1} without a gap; got pages {first} to "
                f"{num_pages - 1} for one that has {known}."
            )
        # By place: of several changes before a step, the last one counts, in whatever order they are made.
        self._changes |= {(ring, column): page for column, page in enumerate(pages, first)}
        self._changes |= {(ring, column): NOBODY for column in range(num_pages, known)}
        self._num_pages[ring] = num_pages

    def plan(self, batch: Batch, *, fill_up: bool = True) -> StepPlan:
        """Return the plan of a step of the backbone; arguments and errors are those of `describe`."""
        plan = self.describe(batch, fill_up=fill_up)
        self.derive(plan)
        return plan

    def describe(self, batch: Batch, *, fill_up: bool = True) -> StepPlan:
        """Say what a step of the backbone is, and send it; `derive` fills its slots. The next call overwrites both.

        Args:
            batch: the step.
            fill_up: whether a step that goes into the rings is filled up to its bucket.

        Raises:
            ValueError: a sequence has more tokens than there is room for, or lacks a page.
        """
        in_rings = self._in_rings(batch, self._size.ring_tokens)
        num_tokens = len(batch.token_ids)
        if len(batch.counts):
            last_page = (batch.starts + batch.counts - 1) // self._size.tokens_per_page
            if self.tables and (last_page >= self._num_pages[batch.rings]).any():
                raise ValueError(
                    f"plan: a sequence lacks pages: it has {int(self._num_pages[batch.rings].min())} pages of "
                    f"{self._size.tokens_per_page} tokens, and positions go up to "
                    f"{int((batch.starts + batch.counts).max()) - 1}. Extend it first."
                )
        changes = self._take_changes(num_tokens)
        size = bucket_of(num_tokens) if in_rings and fill_up else num_tokens
        return self._steps.fill(batch, size, in_rings, changes)

    def derive(self, plan: StepPlan) -> None:
        """Bring the block tables up to date and fill the slots of a step, where the caches are."""
        assert plan.tokens is not None and plan.changes is not None
        write_block_tables(self.page_tables, plan.changes)
        _plan_slots(plan)

    def draft_plan(self, batch: Batch) -> StepPlan:
        """Return the plan of a step of layers that keep a window and nothing else (draft stages).

        Raises:
            ValueError: a sequence has more tokens than there is room for.
        """
        # A window alone has room for one token more: a token reads window - 1 rows before it.
        in_rings = self._in_rings(batch, self._size.ring_tokens + 1)
        plan = self._drafts.fill(batch, len(batch.token_ids), in_rings, [])
        _plan_slots(plan)
        return plan

    def _take_changes(self, room: int) -> list[Change]:
        """Return the changes of the block tables that fit this step's block, and make the others now."""
        changes: list[Change] = [(*place, page) for place, page in self._changes.items()]
        self._changes = {}
        if len(changes) > room:  # a long sequence was admitted
            early = torch.tensor(changes[room:], dtype=torch.int32)
            write_block_tables(self.page_tables, early.to(self._device))
        return changes[:room]

    def _in_rings(self, batch: Batch, most: int) -> bool:
        longest = int(batch.counts.max()) if len(batch.counts) else 0
        room = self._size.step_tokens
        if longest > most and len(batch.token_ids) > room:
            raise ValueError(
                f"plan: at most {most} tokens of one sequence a step, or {room} tokens of all; got {longest} of one "
                f"and {len(batch.token_ids)} of all. Split the step."
            )
        return longest <= most


def _plan_slots(plan: StepPlan) -> None:
    assert plan.tokens is not None
    plan_slots(plan.tokens, plan.window, tuple(plan.tables.values()), plan.slots, in_rings=plan.in_rings)


class _Steps:
    """The block in which the host describes a step, and the tensors of its plan; a step uses the front of each."""

    def __init__(
        self, max_tokens: int, window: RowTables, tables: dict[LayerKind, EntryTables], device: torch.device
    ) -> None:
        self._device = device
        self._window, self._tables = window, tables
        self._host = torch.empty(7 * max_tokens, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._block = self._host if device.type == "cpu" else torch.empty_like(self._host, device=device)
        self._numbers = np.arange(max_tokens, dtype=np.int32)
        self._slots = StepSlots.empty(max_tokens, len(tables), device)
        self._views: dict[tuple[int, bool], _View] = {}  # of decode steps, by bucket
        self._sent = torch.cuda.Event() if device.type == "cuda" else None

    def fill(self, batch: Batch, size: int, in_rings: bool, changes: list[Change]) -> StepPlan:
        """Describe a step of `size` tokens, nobody's after those of the batch, and send it to the device."""
        if self._sent is not None:
            self._sent.synchronize()  # the block may still be on its way with the step before
        view = self._views.get((size, in_rings))
        if view is None:
            view = self._view(size, in_rings)
            if in_rings:
                self._views[size, in_rings] = view
        num_tokens = len(batch.token_ids)
        token_ids, positions, rings, first_idx = view.host_tokens
        token_ids[:num_tokens] = batch.token_ids
        if num_tokens == len(batch.counts):  # one token each
            positions[:num_tokens] = batch.starts
            rings[:num_tokens] = batch.rings
            first_idx[:] = self._numbers[:size]
        else:
            first = (batch.counts.cumsum() - batch.counts).repeat(batch.counts)
            positions[:num_tokens] = self._numbers[:num_tokens] - first + batch.starts.repeat(batch.counts)
            rings[:num_tokens] = batch.rings.repeat(batch.counts)
            first_idx[:num_tokens] = first
            first_idx[num_tokens:] = self._numbers[num_tokens:size]
        view.host_tokens[:3, num_tokens:] = NOBODY
        view.host_changes[len(changes) :] = NOBODY
        if changes:
            view.host_changes[: len(changes)] = changes
        if self._sent is not None:
            view.block.copy_(view.host_block, non_blocking=True)
            self._sent.record()
        saves = _saves(batch, self._device)
        return view.plan if saves is None else dataclasses.replace(view.plan, saves=saves)

    def _view(self, size: int, in_rings: bool) -> _View:
        host, block = self._host[: 7 * size], self._block[: 7 * size]
        return _View(
            host_block=host,
            host_tokens=host[: 4 * size].view(4, size).numpy(),
            host_changes=host[4 * size :].view(size, 3).numpy(),
            block=block,
            plan=StepPlan(
                self._slots.first(size),
                self._window,
                self._tables,
                in_rings,
                tokens=block[: 4 * size].view(4, size),
                changes=block[4 * size :].view(size, 3),
            ),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _View:
    """The front of a `_Steps`, for steps of one number of tokens."""

    host_block: torch.Tensor
    host_tokens: npt.NDArray[np.int32]
    host_changes: npt.NDArray[np.int32]
    block: torch.Tensor
    plan: StepPlan


def _saves(batch: Batch, device: torch.device) -> torch.Tensor | None:
    """Return the page boundaries of a step as ops.save_rows takes them."""
    if not batch.saves:
        return None
    first = batch.counts.cumsum() - batch.counts
    at = {int(ring): idx for idx, ring in enumerate(batch.rings)}
    rows = [
        (save.ring, save.length, int(batch.starts[at[save.ring]]), int(first[at[save.ring]]), save.snapshot_idx)
        for save in batch.saves
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device)
