# SPDX-License-Identifier: Apache-2.0
"""The plan of a batch is, sequence by sequence, what cache.ring and cache.compressor_state say of its positions."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from megamoe.cache.batch import Batch
from megamoe.cache.compressor_state import block_row_slots, completed_entries, num_visible_entries, state_capacity
from megamoe.cache.pools import CacheSize
from megamoe.cache.ring import paged_slots, ring_slots, window_read_slots
from megamoe.models.deepseek_v4.config import LayerKind
from megamoe.models.deepseek_v4.planner import Planner

WINDOW, CHUNK, PAGE = 6, 9, 24
RATIOS = {LayerKind.CSA: 4, LayerKind.HCA: 8}
SIZE = CacheSize(num_sequences=5, num_pages=40, tokens_per_page=PAGE, max_chunk=CHUNK)
CPU = torch.device("cpu")


def planner() -> Planner:
    return Planner(WINDOW, RATIOS, SIZE, CPU)


def make_batch(rows: list[tuple[int, int, int]], seed: int = 0) -> Batch:
    """Return a batch of (start, count, ring), with pages in random order."""
    rng = random.Random(seed)
    pages = list(range(SIZE.num_pages))
    rng.shuffle(pages)
    needed = [-(-(start + count) // PAGE) for start, count, _ in rows]
    tables = np.full((len(rows), max(needed, default=0)), -1, dtype=np.int32)
    for row, num_pages in enumerate(needed):
        tables[row, :num_pages] = [pages.pop() for _ in range(num_pages)]
    starts, counts, rings = (np.array([row[idx] for row in rows], dtype=np.int64) for idx in range(3))
    return Batch(np.arange(counts.sum()) + 100, starts, counts, rings, tables)


def expected(batch: Batch) -> dict[str, object]:
    """Return every field of the plan, worked out one sequence at a time."""
    found: dict[str, list[torch.Tensor]] = {}
    widths = [
        int((start + count) // RATIOS[LayerKind.HCA]) for start, count in zip(batch.starts, batch.counts, strict=True)
    ]
    for row, (start, count, ring) in enumerate(
        zip(*map(np.ndarray.tolist, (batch.starts, batch.counts, batch.rings)), strict=True)
    ):
        positions = torch.arange(start, start + count)
        parts = {
            "positions": positions,
            "window_slots": ring_slots(positions, WINDOW + CHUNK, ring_idx=ring),
            "window_read_slots": window_read_slots(positions, WINDOW, WINDOW + CHUNK, ring_idx=ring),
        }
        table = torch.from_numpy(batch.block_tables[row])
        for kind, ratio in RATIOS.items():
            overlap = kind is LayerKind.CSA
            capacity = state_capacity(ratio, overlap, CHUNK)
            done = completed_entries(start, count, ratio)
            entries = torch.arange(done.start, done.stop)
            visible = num_visible_entries(positions, ratio)
            parts |= {
                f"{kind}.state_slots": ring_slots(positions, capacity, ring_idx=ring),
                f"{kind}.row_slots": block_row_slots(entries, ratio, overlap, capacity, ring_idx=ring),
                f"{kind}.entry_pos": entries * ratio,
                f"{kind}.entry_slots": paged_slots(entries, table, PAGE // ratio),
                f"{kind}.num_visible": visible,
            }
            if kind is LayerKind.HCA:
                columns = torch.arange(max(widths))
                idx = torch.where(columns < visible[:, None], columns, -1)
                parts[f"{kind}.visible_slots"] = paged_slots(idx, table, PAGE // ratio)
        for name, part in parts.items():
            found.setdefault(name, []).append(part)
    return {name: torch.cat(parts) for name, parts in found.items()}


def flat(plan) -> dict[str, torch.Tensor]:
    fields = {name: getattr(plan, name) for name in ("positions", "window_slots", "window_read_slots")}
    for kind, entry in plan.entries.items():
        for name in ("state_slots", "row_slots", "entry_pos", "entry_slots", "num_visible", "visible_slots"):
            if getattr(entry, name) is not None:
                fields[f"{kind}.{name}"] = getattr(entry, name)
    return fields


@pytest.mark.parametrize("trial", range(60))
def test_a_plan_is_its_sequences_one_by_one(trial: int, seed: int) -> None:
    rng = random.Random(seed)
    rings = rng.sample(range(5), rng.randint(1, 5))
    longest = rng.choice([1, 1, CHUNK])
    rows = [(rng.randrange(rng.choice([3, 40, 150])), rng.randint(1, longest), ring) for ring in rings]
    batch = make_batch(rows, seed)
    plan, want = planner().plan(batch), expected(batch)
    got = flat(plan)
    assert set(got) == set(want)
    for name, values in want.items():
        assert got[name].dtype == values.dtype and torch.equal(got[name], values), name
    assert plan.token_ids.tolist() == batch.token_ids.tolist()
    assert plan.query_starts.tolist() == [0, *batch.counts.cumsum().tolist()] and plan.query_starts.dtype is torch.int32
    for entry in plan.entries.values():
        assert torch.equal(entry.block_tables, torch.from_numpy(batch.block_tables))
    draft = planner().plan(batch, with_entries=False)
    assert draft.entries == {} and torch.equal(draft.window_read_slots, want["window_read_slots"])


def test_an_empty_plan() -> None:
    none = np.empty(0, dtype=np.int64)
    plan = planner().plan(Batch(none, np.array([5]), np.array([0]), np.array([0]), np.empty((1, 0), dtype=np.int32)))
    assert plan.query_starts.tolist() == [0, 0] and plan.window_read_slots.shape == (0, WINDOW)
    assert plan.entries[LayerKind.CSA].row_slots.shape == (0, 8)
    assert plan.entries[LayerKind.HCA].visible_slots.shape == (0, 0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at most 9 tokens of one sequence a step; got 10"):
        planner().plan(make_batch([(0, 2, 0), (0, 10, 1)]))
    assert planner().plan(make_batch([(0, 10, 1)]), with_entries=False).positions.shape == (10,)
    with pytest.raises(ValueError, match="at most 10 tokens"):
        planner().plan(make_batch([(0, 11, 1)]), with_entries=False)
    short = make_batch([(PAGE - 1, 1, 0), (PAGE - 1, 1, 1)])
    short.starts[1] += 1
    with pytest.raises(ValueError, match="block tables have 1 pages of 24 tokens, and positions go up to 24"):
        planner().plan(short)
    short = make_batch([(PAGE, 1, 0), (3, 1, 1)])
    short.starts[1] = PAGE
    with pytest.raises(ValueError, match="lacks pages"):
        planner().plan(short)
