# SPDX-License-Identifier: Apache-2.0
"""plan_slots: a thread a token for the window, and one more for each kind of layer with entries.

Meaning    ops/plan_slots.py
Launches   one for up to two kinds, which is what a model has; one more for every two after them
Grid       128 tokens a block, by the window and the kinds
Limits     slots below 2^31
Bound      the launch
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.kernels.cache.plan_slots_config import KINDS, Config
from megamoe.kernels.parts.records import EntrySlots, EntryTables, RowTables, StepSlots
from megamoe.kernels.store import kernel


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config("slots")


def run(
    tokens: torch.Tensor, window: RowTables, kinds: tuple[EntryTables, ...], out: StepSlots, in_rings: bool
) -> None:
    """Compute plan_slots."""
    if not tokens.shape[1]:
        return
    launch = kernel(Config("slots"), tokens.device)
    absent = (
        (window.block_tables, window.block_tables),
        (out.window_slots, out.window_kept, out.window_slots, out.requests),
        (1, 1, 1),
    )
    given = [_arguments(kind, slots) for kind, slots in zip(kinds, out.entries, strict=True)]
    for first in range(0, max(1, len(given)), KINDS):
        some = given[first : first + KINDS]
        tables, slots, numbers = zip(*some, *[absent] * (KINDS - len(some)), strict=True)
        launch(
            tokens,
            window.block_tables,
            out.token_ids,
            out.positions,
            out.requests,
            out.first_idx,
            out.window_slots,
            out.window_kept,
            *(one for group in tables for one in group),
            *(one for group in slots for one in group),
            window.rows_per_block,
            *(one for group in numbers for one in group),
            len(some),
            int(in_rings),
        )


def _arguments(kind: EntryTables, slots: EntrySlots) -> tuple[Any, ...]:
    """Return the tables of a kind, what is filled, and the numbers that go with them."""
    return (
        (kind.state.block_tables, kind.entries.block_tables),
        (slots.state_slots, slots.state_kept, slots.entry_slots, slots.num_visible),
        (kind.state.rows_per_block, kind.entries.rows_per_block, kind.ratio),
    )
