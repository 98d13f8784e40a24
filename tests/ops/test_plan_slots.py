# SPDX-License-Identifier: Apache-2.0
"""plan_slots: every slot of a step, against the same worked out one position at a time on plain integers."""

from __future__ import annotations

import dataclasses
import random
import sys

import pytest
import torch

from megamoe.ops.plan_slots import EntryTables, RowTables, StepSlots, plan_slots

from .steps import NOBODY, Run, slot_of, step_of, tables_of

MODULE = sys.modules[plan_slots.__module__]
CPU = torch.device("cpu")


def planned(runs: list[Run], window: RowTables, kinds: tuple[EntryTables, ...], *, in_rings: bool) -> StepSlots:
    """The slots of a step; whatever is not filled is a number that no slot has."""
    step = step_of(*runs)
    out = StepSlots.empty(step.positions.shape[0], len(kinds), CPU)
    for slots in (*fields(out).values(), *(one for kind in out.entries for one in fields(kind).values())):
        slots.fill_(-77)
    plan_slots(step.tokens, window, kinds, out, in_rings=in_rings)
    return out


def fields(slots) -> dict[str, torch.Tensor]:
    return {
        field.name: getattr(slots, field.name)
        for field in dataclasses.fields(slots)
        if isinstance(getattr(slots, field.name), torch.Tensor)
    }


def by_hand(runs: list[Run], window: RowTables, kinds: tuple[EntryTables, ...], *, in_rings: bool):
    """The same, token by token: {name: numbers} of the step and of each kind."""
    step: dict[str, list[int]] = {name: [] for name in fields(StepSlots.empty(0, 0, CPU))}
    of_kinds: list[dict[str, list[int]]] = [{name: [] for name in fields(EntrySlots)} for EntrySlots in _empty(kinds)]
    token = 0
    for request, start, count in runs:
        first = token
        for position in range(start, start + count):
            is_nobody = request == NOBODY
            last = start + count - 1
            step["token_ids"].append(-1 if is_nobody else position + 100)
            step["positions"].append(-1 if is_nobody else position)
            step["requests"].append(request)
            step["first_idx"].append(token if is_nobody else first)
            for tables, to, kept in [
                (window, step["window_slots"], step["window_kept"]),
                *((kind.state, of["state_slots"], of["state_kept"]) for kind, of in zip(kinds, of_kinds, strict=True)),
            ]:
                in_ring = slot_of(tables, request, position)
                capacity = tables.block_tables.shape[1] * tables.rows_per_block
                to.append(-1 if is_nobody else in_ring if in_rings else token)
                # After the step a ring holds the last positions, as many as it has rows.
                survives = not is_nobody and position > last - capacity
                kept.append(in_ring if survives and not in_rings else -1)
            for kind, of in zip(kinds, of_kinds, strict=True):
                complete = 0 if is_nobody else len([one for one in range(position + 1) if one % kind.ratio == 0])
                if not is_nobody and (position + 1) % kind.ratio:
                    complete -= 1  # the block that the token is in
                of["num_visible"].append(complete)
                completes = not is_nobody and position == complete * kind.ratio - 1
                of["entry_slots"].append(slot_of(kind.entries, request, complete - 1) if completes else -1)
            token += 1
    return step, of_kinds


def _empty(kinds):
    return StepSlots.empty(0, len(kinds), CPU).entries


def check_step(runs: list[Run], window: RowTables, kinds: tuple[EntryTables, ...] = (), *, in_rings: bool) -> None:
    out = planned(runs, window, kinds, in_rings=in_rings)
    wanted, of_kinds = by_hand(runs, window, kinds, in_rings=in_rings)
    assert {name: slots.tolist() for name, slots in fields(out).items()} == wanted
    for kind, of in zip(out.entries, of_kinds, strict=True):
        assert {name: slots.tolist() for name, slots in fields(kind).items()} == of


def ring(num_requests: int, capacity: int) -> RowTables:
    return RowTables(torch.arange(num_requests, dtype=torch.int32)[:, None], capacity)


# --- known answers ---


def test_a_decode_step_by_hand():
    """Request 2 at position 7 completes its second block of 4; request 0 at position 4 does not; one is nobody's."""
    pages = RowTables(torch.tensor([[5, -1], [-1, -1], [3, 1]], dtype=torch.int32), 1)
    out = planned([(2, 7, 1), (0, 4, 1), (-1, 0, 1)], ring(3, 6), (EntryTables(4, ring(3, 9), pages),), in_rings=True)
    assert out.token_ids.tolist() == [107, 104, -1] and out.positions.tolist() == [7, 4, -1]
    assert out.requests.tolist() == [2, 0, -1] and out.first_idx.tolist() == [0, 1, 2]
    assert out.window_slots.tolist() == [13, 4, -1] and out.window_kept.tolist() == [-1, -1, -1]
    (kind,) = out.entries
    assert kind.state_slots.tolist() == [25, 4, -1] and kind.state_kept.tolist() == [-1, -1, -1]
    assert kind.entry_slots.tolist() == [1, -1, -1] and kind.num_visible.tolist() == [2, 1, 0]


def test_a_chunk_by_hand():
    """Five tokens through rings of three rows: the last three are kept."""
    out = planned([(1, 2, 5), (0, 0, 1)], ring(2, 3), (), in_rings=False)
    assert out.window_slots.tolist() == [0, 1, 2, 3, 4, 5]
    assert out.window_kept.tolist() == [-1, -1, 4, 5, 3, 0]


def test_the_token_that_completes_a_block_sees_it():
    pages = RowTables(torch.zeros(1, 1, dtype=torch.int32), 2)
    (kind,) = planned([(0, 0, 8)], ring(1, 8), (EntryTables(4, ring(1, 8), pages),), in_rings=True).entries
    assert kind.num_visible.tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert kind.entry_slots.tolist() == [-1, -1, -1, 0, -1, -1, -1, 1]


def test_sizes_of_what_is_filled():
    out = StepSlots.empty(5, 2, CPU)
    part = out.first(3)
    assert part.positions.shape == (3,) and len(part.entries) == 2
    for whole, first in zip(
        [*fields(out).values(), *fields(out.entries[1]).values()],
        [*fields(part).values(), *fields(part.entries[1]).values()],
        strict=True,
    ):
        assert first.data_ptr() == whole.data_ptr() and first.shape == (3,) and first.dtype == whole.dtype
    assert RowTables(torch.zeros(2, 3, dtype=torch.int32), 5).capacity == 15


# --- properties ---


def random_runs(rng: random.Random, num_requests: int, longest: int) -> list[Run]:
    """Some of the requests, in any order, with nobody's tokens before, between and after."""
    runs: list[Run] = []
    for request in rng.sample(range(num_requests), rng.randint(0, num_requests)):
        if rng.random() < 0.3:
            runs.append((NOBODY, 0, rng.randint(1, 3)))
        runs.append((request, rng.choice([0, 0, 1, rng.randint(0, 40)]), rng.randint(1, longest)))
    if rng.random() < 0.6:
        runs.append((NOBODY, 0, rng.randint(1, 4)))
    return runs


@pytest.mark.parametrize("in_rings", [True, False])
@pytest.mark.parametrize("layout", ["one block", "two blocks", "blocks of one row", "pages"])
def test_equals_integers_one_position_at_a_time(layout, in_rings, seed):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    blocks, rows = {"one block": (1, 11), "two blocks": (2, 4), "blocks of one row": (9, 1), "pages": (20, 3)}[layout]
    for _ in range(40):
        window = tables_of(5, blocks, rows, spare=2)
        kinds = tuple(
            EntryTables(ratio, tables_of(5, blocks, rows + 1), tables_of(5, -(-60 // (ratio * page)), page))
            for ratio, page in ((4, 2), (1, 7), (8, 1))
        )
        check_step(random_runs(rng, 5, 8 if in_rings else 19), window, kinds, in_rings=in_rings)


@pytest.mark.parametrize("count", [1, 5, 6, 7, 11, 12, 13, 25])
@pytest.mark.parametrize("blocks, rows", [(1, 6), (2, 3), (6, 1)])
def test_what_is_kept_at_the_borders_of_a_ring(blocks, rows, count, seed):
    """A ring of 6 rows: steps one below, at and above its capacity, twice its capacity, beside other requests."""
    torch.manual_seed(seed)
    window = tables_of(3, blocks, rows)
    kinds = (EntryTables(3, tables_of(3, blocks, rows + 1), tables_of(3, 12, 1)),)
    for start in (0, 1, 5, 6, 7):
        check_step([(1, start, count)], window, kinds, in_rings=False)
        check_step([(2, 4, 7), (1, start, count), (0, 0, 6)], window, kinds, in_rings=False)
        check_step(
            [(-1, 0, 2), (2, 0, 1), (-1, 0, 1), (1, start, count), (-1, 0, 6), (0, 3, 2)], window, kinds, in_rings=False
        )
        kept = planned([(1, start, count)], window, (), in_rings=False).window_kept
        assert int((kept >= 0).sum()) == min(count, 6)


@pytest.mark.parametrize("in_rings", [True, False])
def test_nobody_changes_nobodys_slots(in_rings, seed):
    """Slots of a request are the same whoever else is in the step; in the step area they move with the token."""
    torch.manual_seed(seed)
    window, kinds = tables_of(3, 2, 4), (EntryTables(4, tables_of(3, 1, 12), tables_of(3, 9, 2)),)
    alone = planned([(2, 3, 6)], window, kinds, in_rings=in_rings)
    runs = [(0, 30, 1), (-1, 0, 3), (2, 3, 6), (-1, 0, 5), (1, 0, 4)]
    among = planned(runs, window, kinds, in_rings=in_rings)
    own, moved = slice(4, 10), 0 if in_rings else 4
    assert torch.equal(among.window_slots[own], alone.window_slots + moved)
    assert torch.equal(among.window_kept[own], alone.window_kept)
    one, other = among.entries[0], alone.entries[0]
    assert torch.equal(one.state_slots[own], other.state_slots + moved)
    for name in ("state_kept", "entry_slots", "num_visible"):
        assert torch.equal(getattr(one, name)[own], getattr(other, name))
    for slots in (among.window_slots, among.window_kept, one.state_slots, one.state_kept, one.entry_slots):
        assert slots[1:4].tolist() == [-1] * 3 and slots[10:15].tolist() == [-1] * 5
    assert one.num_visible[1:4].tolist() == [0] * 3


@pytest.mark.parametrize("in_rings", [True, False])
def test_empty(in_rings):
    no_entry = RowTables(torch.empty(2, 0, dtype=torch.int32), 4)
    check_step([], ring(2, 3), (EntryTables(4, ring(2, 8), no_entry),), in_rings=in_rings)
    check_step([(1, 0, 1)], ring(2, 3), (), in_rings=in_rings)
    check_step([(1, 0, 3)], ring(2, 3), (EntryTables(4, ring(2, 8), no_entry),), in_rings=in_rings)  # none completed
    check_step([(-1, 0, 4)], ring(2, 3), (EntryTables(1, ring(2, 8), no_entry),), in_rings=in_rings)


# --- faults ---


@pytest.mark.parametrize("fault", ["kept one too few", "kept one too many", "first_idx ignored"])
def test_faults_in_what_is_kept_are_caught(fault, monkeypatch):
    right = MODULE._ring_slots

    def wrong(slots, kept, tables, out, in_rings):
        if fault == "first_idx ignored":  # the last rows of the step are kept, whoever they belong to
            out = dataclasses.replace(out, first_idx=torch.zeros_like(out.first_idx))
        else:
            by = 1 if fault == "kept one too many" else -1
            tables = _Wider(tables.block_tables, tables.rows_per_block, by)
        right(slots, kept, tables, out, in_rings)

    monkeypatch.setattr(MODULE, "_ring_slots", wrong)
    test_a_decode_step_by_hand()  # a step that goes into the rings keeps nothing
    with pytest.raises(AssertionError):
        check_step([(2, 4, 7), (1, 0, 9)], ring(3, 6), in_rings=False)


@dataclasses.dataclass(frozen=True, eq=False)
class _Wider(RowTables):
    by: int = 0

    @property
    def capacity(self) -> int:
        return super().capacity + self.by


@pytest.mark.parametrize("fault", ["modulo dropped", "nobody's rows go somewhere", "blocks of request 0"])
def test_faults_in_slots_are_caught(fault, monkeypatch):
    right = MODULE.row_slots

    def wrong(row_idx, requests, block_tables, rows_per_block):
        if fault == "modulo dropped":
            block_tables = torch.nn.functional.pad(block_tables, (0, 99), value=0)
        elif fault == "nobody's rows go somewhere":
            row_idx, requests = row_idx.clamp(min=0), requests.clamp(min=0)
        else:
            requests = torch.where(requests > 0, 0, requests)
        return right(row_idx, requests, block_tables, rows_per_block)

    monkeypatch.setattr(MODULE, "row_slots", wrong)
    with pytest.raises(AssertionError):
        check_step([(2, 13, 2), (-1, 0, 1)], ring(3, 6), in_rings=True)


# --- refusals ---


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"tokens": torch.zeros(4, 2, dtype=torch.int64)}, TypeError, "tokens must be int32"),
        ({"tokens": torch.zeros(3, 2, dtype=torch.int32)}, ValueError, "tokens must be"),
        ({"tokens": torch.zeros(4, 3, dtype=torch.int32)}, ValueError, "token_ids must be"),
        ({"window": RowTables(torch.zeros(2, 1, dtype=torch.int64), 4)}, TypeError, "window must be int32"),
        ({"kinds": ()}, ValueError, r"kinds and out.entries go together; got 0 and 1\. Make `out` with"),
        ({"out": StepSlots.empty(2, 0, CPU)}, ValueError, "go together; got 1 and 0"),
        ({"ratio": 0}, ValueError, "ratio must be >= 1; got 0"),
        ({"requests": 5}, ValueError, r"requests must be -1 or in 0 .. 1, .*; got 5"),
        ({"positions": 7}, ValueError, "row lies on a block that is negative in the block table"),
        (
            {"positions": 11},
            ValueError,
            "entry 2 lies beyond the block table of 2 pages of 1 rows. Extend the sequence",
        ),
    ],
)
def test_refusals(change, error, message):
    tokens = torch.tensor([[5, -1], [3, -1], [0, -1], [0, 1]], dtype=torch.int32)
    for row, name in enumerate(("positions", "requests"), 1):
        if name in change:
            tokens[row, 0] = change[name]
    pages = RowTables(torch.tensor([[1, -1], [0, -1]], dtype=torch.int32), 1)
    given = {
        "tokens": tokens,
        "window": ring(2, 4),
        "kinds": (EntryTables(change.get("ratio", 4), ring(2, 8), pages),),
        "out": StepSlots.empty(2, 1, CPU),
    }
    if set(change) <= set(given):
        plan_slots(**given, in_rings=True)
        given |= change
    with pytest.raises(error, match=message):
        plan_slots(**given, in_rings=True)
