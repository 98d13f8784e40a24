# SPDX-License-Identifier: Apache-2.0
"""What one step reads and writes in the caches, as slot numbers: built once a step, used by every layer.

A slot is the address of one row in a paged pool. Layers of one kind own separate pools but use the same slots, so the
numbers are worked out once. Everything follows from absolute positions; nothing is stateful.
"""

from __future__ import annotations

import dataclasses

import torch

from megamoe.models.deepseek_v4.config import LayerKind


@dataclasses.dataclass(frozen=True)
class EntryPlan:
    """The compressed entries of the layers of one kind during one step.

    Attributes:
        state_slots: [T] int64, where each token's raw compressor row goes.
        row_slots: [W, coff * ratio] int64, the rows each completed block pools, oldest first, -1 before the start.
        entry_pos: [W] int64, position of the first token of each completed block (its rotary position).
        entry_slots: [W] int64, where each completed entry goes.
        block_tables: [B, num_blocks] int32, pages of entries in entry order.
        num_visible: [T] int32, entries a token may use: (position + 1) // ratio.
        visible_slots: [T, J] int64, slots of all visible entries (-1 padded); only where every entry is read (HCA).
    """

    state_slots: torch.Tensor
    row_slots: torch.Tensor
    entry_pos: torch.Tensor
    entry_slots: torch.Tensor
    block_tables: torch.Tensor
    num_visible: torch.Tensor
    visible_slots: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One step over T tokens of B sequences.

    Attributes:
        token_ids: [T] int64.
        positions: [T] int64, absolute, 0-based.
        query_starts: [B + 1] int32, where each sequence's tokens start among the T.
        window_slots: [T] int64, where each token's latent row goes.
        window_read_slots: [T, window] int64, the rows a token attends to, -1 before the start.
        entries: by layer kind, CSA and HCA.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    query_starts: torch.Tensor
    window_slots: torch.Tensor
    window_read_slots: torch.Tensor
    entries: dict[LayerKind, EntryPlan]
