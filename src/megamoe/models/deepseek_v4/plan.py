# SPDX-License-Identifier: Apache-2.0
"""What one step reads and writes in the caches: slots of its tokens, and tables that live on the device.

A slot is the address of one row in a pool. Layers of one kind own separate pools but use the same slots, so the numbers
are worked out once a step (`ops.plan_slots`). What lies further back is found by position through block tables. All
shapes follow from the number of tokens alone, and a bucket's tensors stay where they are: a graph replays them.

`planner.Planner` fills it for our own caches; another engine fills it from its own tables.
"""

from __future__ import annotations

import dataclasses

import torch

from megamoe.models.deepseek_v4.config import LayerKind
from megamoe.ops.plan_slots import EntrySlots, EntryTables, RowTables, StepSlots


@dataclasses.dataclass(frozen=True, eq=False)
class StepPlan:
    """One step over T tokens.

    Attributes:
        slots: the tokens, and where their rows go; [T] each.
        window: where window rows of earlier steps lie.
        tables: where entries and raw rows lie, by the kinds of layers that have them.
        in_rings: whether this step's rows go straight into the rings; else into the step area, and to the rings when a
            layer is done.
        tokens: [4, T] int32, what the host said of the tokens (see ops.plan_slots), or None where `slots` came filled.
        changes: [T, 3] int32, what it said of the block tables (see ops.write_block_tables), or None.
        saves: [S, 5] int32, page boundaries whose rows are kept when a layer is done (see ops.save_rows), or None.
    """

    slots: StepSlots
    window: RowTables
    tables: dict[LayerKind, EntryTables]
    in_rings: bool
    tokens: torch.Tensor | None = None
    changes: torch.Tensor | None = None
    saves: torch.Tensor | None = None

    @property
    def bucket(self) -> int | None:
        """T, if steps of T tokens always have these shapes and addresses: those that go straight into the rings."""
        return self.slots.positions.shape[0] if self.in_rings else None

    @property
    def token_ids(self) -> torch.Tensor:
        """[T] int64, -1 for nobody."""
        return self.slots.token_ids

    @property
    def positions(self) -> torch.Tensor:
        """[T] int64, absolute, 0-based; -1 for nobody."""
        return self.slots.positions

    def entry_slots(self, kind: LayerKind) -> EntrySlots:
        """Return the slots of a kind of layer that has entries."""
        return self.slots.entries[list(self.tables).index(kind)]
