# SPDX-License-Identifier: Apache-2.0
"""plan_slots: a thread a token.

Meaning    ops/plan_slots.py
Launches   one for the window, one for each kind of layer with entries
Grid       128 threads a block
Limits     slots below 2^31
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.cache.plan_slots_config import Config
from megamoe.kernels.store import kernel
from megamoe.ops.plan_slots import EntryTables, RowTables, StepSlots


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config("window")
    yield Config("kind")


def run(
    tokens: torch.Tensor, window: RowTables, kinds: tuple[EntryTables, ...], out: StepSlots, in_rings: bool
) -> None:
    """Compute plan_slots."""
    if not tokens.shape[1]:
        return
    kernel(Config("window"), tokens.device)(
        tokens,
        window.block_tables,
        out.token_ids,
        out.positions,
        out.requests,
        out.first_idx,
        out.window_slots,
        out.window_kept,
        window.rows_per_block,
        int(in_rings),
    )
    for kind, slots in zip(kinds, out.entries, strict=True):
        kernel(Config("kind"), tokens.device)(
            tokens,
            kind.state.block_tables,
            kind.entries.block_tables,
            slots.state_slots,
            slots.state_kept,
            slots.entry_slots,
            slots.num_visible,
            kind.state.rows_per_block,
            kind.entries.rows_per_block,
            kind.ratio,
            int(in_rings),
        )
