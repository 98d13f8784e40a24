# SPDX-License-Identifier: Apache-2.0
"""Records that operations hand to host halves: these know the fields that they look at, and not ops/."""

from __future__ import annotations

from typing import Protocol

import torch


class RopeTable(Protocol):
    """ops/rope.py: the frequencies of one kind of layer."""

    @property
    def inv_freq(self) -> torch.Tensor:
        """fp32 [R / 2]."""

    @property
    def rope_dim(self) -> int:
        """R."""


class RowTables(Protocol):
    """ops/plan_slots.py: where the rows of requests lie."""

    @property
    def block_tables(self) -> torch.Tensor:
        """int32 [R, n]."""

    @property
    def rows_per_block(self) -> int:
        """P."""


class EntryTables(Protocol):
    """ops/plan_slots.py: what the layers of one kind keep beside the window."""

    @property
    def ratio(self) -> int:
        """Tokens per entry."""

    @property
    def state(self) -> RowTables:
        """Rings of raw rows."""

    @property
    def entries(self) -> RowTables:
        """Pages of entries."""


class EntrySlots(Protocol):
    """ops/plan_slots.py: the slots of one kind of layer."""

    @property
    def state_slots(self) -> torch.Tensor:
        """int64 [T]."""

    @property
    def state_kept(self) -> torch.Tensor:
        """int64 [T]."""

    @property
    def entry_slots(self) -> torch.Tensor:
        """int64 [T]."""

    @property
    def num_visible(self) -> torch.Tensor:
        """int32 [T]."""


class StepSlots(Protocol):
    """ops/plan_slots.py: the tokens of a step and their slots."""

    @property
    def token_ids(self) -> torch.Tensor:
        """int64 [T]."""

    @property
    def positions(self) -> torch.Tensor:
        """int64 [T]."""

    @property
    def requests(self) -> torch.Tensor:
        """int32 [T]."""

    @property
    def first_idx(self) -> torch.Tensor:
        """int32 [T]."""

    @property
    def window_slots(self) -> torch.Tensor:
        """int64 [T]."""

    @property
    def window_kept(self) -> torch.Tensor:
        """int64 [T]."""

    @property
    def entries(self) -> tuple[EntrySlots, ...]:
        """By kind of layer."""
