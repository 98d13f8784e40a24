# SPDX-License-Identifier: Apache-2.0
"""plan_slots: every slot of a step, from the position and the request of each token and from resident block tables.

Math       token t of request r at position p:
             window row    its place in the ring of r, or row t of the step area
             raw row       the same for the ring of raw compressor rows, for each kind of layer with entries
             entry         where p + 1 is a multiple of `ratio`, the slot of entry p // ratio; else -1
             visible       (p + 1) // ratio: the token that completes a block sees it
           A step that writes into the rings writes at most as many rows of a request as the ring has to spare. A longer
           one writes to the step area; `kept` then says which rows go to the rings at the end of the layer: the last
           ones of every request, as many as a ring holds.
Nobody     A token at position -1 belongs to nobody (padding of a bucket): its slots are -1, and it sees nothing.
Numerics   integers
Shapes     [T] everywhere, whatever the positions and however many requests: a captured graph replays it
Tolerance  none: exact
Kernels    one launch, a thread a token for the window and one more for each kind of layer; slots below 2^31
Source     docs/architecture.md, section "A step"; ops/row_slots.py
"""

from __future__ import annotations

import dataclasses

import torch

from megamoe.ops.check import INT64, check
from megamoe.ops.dispatch import pick
from megamoe.ops.row_slots import row_slots

INT32: tuple[torch.dtype, ...] = (torch.int32,)


@dataclasses.dataclass(frozen=True, eq=False)
class RowTables:
    """Where the rows of requests lie: row w of request r is row w % P of block block_tables[r, (w // P) % n].

    Attributes:
        block_tables: [R, n] int32.
        rows_per_block: P.
    """

    block_tables: torch.Tensor
    rows_per_block: int

    @property
    def capacity(self) -> int:
        """Rows of one request before the table wraps."""
        return self.block_tables.shape[1] * self.rows_per_block


@dataclasses.dataclass(frozen=True, eq=False)
class EntryTables:
    """What the layers of one kind keep beside the window.

    Attributes:
        ratio: tokens per entry.
        state: rings of raw compressor rows.
        entries: pages of entries.
    """

    ratio: int
    state: RowTables
    entries: RowTables


@dataclasses.dataclass(frozen=True, eq=False)
class EntrySlots:
    """The slots of one kind of layer with entries.

    Attributes:
        state_slots: [T] int64, where each token's raw row goes: in the ring, or in the step area.
        state_kept: [T] int64, where it goes in the ring at the end of the layer; -1 where it is not kept, and
            everywhere in a step that writes into the rings.
        entry_slots: [T] int64, where the entry goes that each token completes, or -1.
        num_visible: [T] int32, entries each token may use.
    """

    state_slots: torch.Tensor
    state_kept: torch.Tensor
    entry_slots: torch.Tensor
    num_visible: torch.Tensor

    @classmethod
    def empty(cls, num_tokens: int, device: torch.device) -> EntrySlots:
        """Return uninitialized tensors."""
        slots, kept, entries = torch.empty(3, num_tokens, dtype=torch.int64, device=device).unbind()
        return cls(slots, kept, entries, torch.empty(num_tokens, dtype=torch.int32, device=device))

    def first(self, num_tokens: int) -> EntrySlots:
        """Return views of the first tokens."""
        part = slice(num_tokens)
        return EntrySlots(self.state_slots[part], self.state_kept[part], self.entry_slots[part], self.num_visible[part])


@dataclasses.dataclass(frozen=True, eq=False)
class StepSlots:
    """The tokens of a step and their slots, at fixed addresses.

    Attributes:
        token_ids: [T] int64, -1 for nobody.
        positions: [T] int64, -1 for nobody.
        requests: [T] int32, rows of the block tables, -1 for nobody.
        first_idx: [T] int32, the first token of the same request in this step.
        window_slots: [T] int64, where each token's latent row goes: in the ring, or in the step area.
        window_kept: [T] int64, where it goes in the ring at the end of the layer, or -1; see EntrySlots.
        entries: by kind of layer, in the order of the tables.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    requests: torch.Tensor
    first_idx: torch.Tensor
    window_slots: torch.Tensor
    window_kept: torch.Tensor
    entries: tuple[EntrySlots, ...]

    @classmethod
    def empty(cls, num_tokens: int, num_kinds: int, device: torch.device) -> StepSlots:
        """Return uninitialized tensors."""
        ids, positions, slots, kept = torch.empty(4, num_tokens, dtype=torch.int64, device=device).unbind()
        requests, first_idx = torch.empty(2, num_tokens, dtype=torch.int32, device=device).unbind()
        kinds = tuple(EntrySlots.empty(num_tokens, device) for _ in range(num_kinds))
        return cls(ids, positions, requests, first_idx, slots, kept, kinds)

    def first(self, num_tokens: int) -> StepSlots:
        """Return views of the first tokens."""
        part = slice(num_tokens)
        return StepSlots(
            self.token_ids[part],
            self.positions[part],
            self.requests[part],
            self.first_idx[part],
            self.window_slots[part],
            self.window_kept[part],
            tuple(kind.first(num_tokens) for kind in self.entries),
        )


def plan_slots(
    tokens: torch.Tensor, window: RowTables, kinds: tuple[EntryTables, ...], out: StepSlots, *, in_rings: bool
) -> None:
    """Fill the slots of a step in place.

    Args:
        tokens: [4, T] int32: id, position, request and first_idx of each token; the tokens of a request stand together
            in the order of their positions. Nobody's tokens have id, position and request -1, and first_idx their own
            number.
        window: where window rows lie.
        kinds: what each kind of layer with entries keeps; may be empty.
        out: what is filled; as many kinds.
        in_rings: whether rows go straight into the rings; else into the step area.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape does not fit, a request is not in the tables, or a token lies on a page that its sequence
            does not have.
    """
    check(
        "plan_slots",
        tokens=(tokens, "4 T", INT32),
        window=(window.block_tables, "R n", INT32),
        token_ids=(out.token_ids, "T", INT64),
        positions=(out.positions, "T", INT64),
        requests=(out.requests, "T", INT32),
        first_idx=(out.first_idx, "T", INT32),
        window_slots=(out.window_slots, "T", INT64),
        window_kept=(out.window_kept, "T", INT64),
    )
    if len(kinds) != len(out.entries):
        raise ValueError(
            f"plan_slots: kinds and out.entries go together; got {len(kinds)} and {len(out.entries)}. Make `out` with "
            f"StepSlots.empty(num_tokens, num_kinds)."
        )
    for kind, slots in zip(kinds, out.entries, strict=True):
        check(
            "plan_slots",
            tokens=(tokens, "4 T", INT32),
            state=(kind.state.block_tables, "R n", INT32),
            entries=(kind.entries.block_tables, "R m", INT32),
            state_slots=(slots.state_slots, "T", INT64),
            state_kept=(slots.state_kept, "T", INT64),
            entry_slots=(slots.entry_slots, "T", INT64),
            num_visible=(slots.num_visible, "T", INT32),
        )
        if kind.ratio < 1:
            raise ValueError(f"plan_slots: ratio must be >= 1; got {kind.ratio}. It is the tokens per entry.")
    pick("plan_slots", tokens.device, reference)(tokens, window, kinds, out, in_rings)


def reference(
    tokens: torch.Tensor, window: RowTables, kinds: tuple[EntryTables, ...], out: StepSlots, in_rings: bool
) -> None:
    """Compute the operation's meaning in plain torch."""
    token_ids, positions, requests, first_idx = tokens.unbind()
    out.token_ids.copy_(token_ids)
    out.positions.copy_(positions)
    out.requests.copy_(requests)
    out.first_idx.copy_(first_idx)
    positions = out.positions
    _ring_slots(out.window_slots, out.window_kept, window, out, in_rings)
    for kind, slots in zip(kinds, out.entries, strict=True):
        _ring_slots(slots.state_slots, slots.state_kept, kind.state, out, in_rings)
        lengths = positions + 1
        visible = lengths // kind.ratio
        slots.num_visible.copy_(visible)
        entry_idx = torch.where(visible * kind.ratio == lengths, visible - 1, -1)  # nobody's length is 0: entry -1
        if entry_idx.numel() and int(entry_idx.max()) >= kind.entries.capacity:
            raise ValueError(
                f"plan_slots: entry {int(entry_idx.max())} lies beyond the block table of "
                f"{kind.entries.block_tables.shape[1]} pages of {kind.entries.rows_per_block} rows. Extend the "
                f"sequence first."
            )
        slots.entry_slots.copy_(row_slots(entry_idx, requests, kind.entries.block_tables, kind.entries.rows_per_block))


def _ring_slots(slots: torch.Tensor, kept: torch.Tensor, tables: RowTables, out: StepSlots, in_rings: bool) -> None:
    """Fill where the rows of a step go in one kind of ring."""
    in_ring = row_slots(out.positions, out.requests, tables.block_tables, tables.rows_per_block)
    if in_rings:
        slots.copy_(in_ring)
        kept.fill_(-1)
        return
    tokens = torch.arange(slots.shape[0], dtype=torch.int64, device=slots.device)
    slots.copy_(torch.where(out.positions >= 0, tokens, -1))
    kept.copy_(in_ring)
    later = out.first_idx[tables.capacity :]  # token t + capacity overwrites token t where both are of one request
    num_later = later.shape[0]
    if num_later:
        kept[:num_later].masked_fill_(later <= tokens[:num_later], -1)
