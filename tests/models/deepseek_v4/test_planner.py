# SPDX-License-Identifier: Apache-2.0
"""The plan of a batch is, sequence by sequence, what its positions say; and it stays where it is."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import megamoe
from megamoe.cache.batch import Batch, Save
from megamoe.cache.buckets import bucket_of, buckets_up_to
from megamoe.cache.pools import PAGES, RINGS, CacheSize, LayerCacheSpec, LayerPools, StepArea, allocate_layer
from megamoe.engine.config import EngineConfig
from megamoe.engine.engine import Engine
from megamoe.engine.sampling_params import SamplingParams
from megamoe.formats.cache_rows import RowFormat
from megamoe.models.deepseek_v4.config import LayerKind
from megamoe.models.deepseek_v4.plan import StepPlan
from megamoe.models.deepseek_v4.planner import Planner
from megamoe.models.deepseek_v4.snapshots import finish_layer, restore
from megamoe.ops.dispatch import watch
from megamoe.verify.values import plain, whole_storage

from . import checkpoints

WINDOW, RING_TOKENS, PAGE = 6, 3, 24
RATIOS = {LayerKind.CSA: 4, LayerKind.HCA: 8}
POOLED = {LayerKind.CSA: 8, LayerKind.HCA: 8}
SIZE = CacheSize(num_sequences=5, num_pages=40, tokens_per_page=PAGE, ring_tokens=RING_TOKENS, step_tokens=80)
CPU = torch.device("cpu")


def planner(max_tokens: int = 200) -> Planner:
    return Planner(WINDOW, RATIOS, SIZE, max_tokens, CPU)


def give_pages(one: Planner, rows: list[tuple[int, int, int]], seed: int = 0) -> dict[int, list[int]]:
    """Give every (start, count, ring) its pages, in random order; return them by ring."""
    rng = random.Random(seed)
    free = list(range(SIZE.num_pages))
    rng.shuffle(free)
    pages = {ring: [free.pop() for _ in range(-(-(start + count) // PAGE))] for start, count, ring in rows}
    for ring, of_ring in pages.items():
        one.set_pages(ring, of_ring)
    return pages


def make_batch(rows: list[tuple[int, int, int]], saves: tuple[Save, ...] = ()) -> Batch:
    starts, counts, rings = (np.array([row[idx] for row in rows], dtype=np.int64) for idx in range(3))
    return Batch(np.arange(counts.sum()) + 100, starts, counts, rings, saves)


def expected(
    rows: list[tuple[int, int, int]], pages: dict[int, list[int]], size: int, in_rings: bool
) -> dict[str, list[int]]:
    """Return every field of the plan, worked out one token at a time."""
    found: dict[str, list[int]] = {}

    def add(**values: int) -> None:
        for name, value in values.items():
            found.setdefault(name, []).append(value)

    def ring_slot(position: int, ring: int, capacity: int) -> int:
        return ring * capacity + position % capacity

    token = 0
    for start, count, ring in rows:
        first = token
        for position in range(start, start + count):
            left = start + count - 1 - position  # tokens of the sequence after this one in the step
            add(token_ids=100 + token, positions=position, requests=ring, first_idx=first)
            for name, capacity in [("window", WINDOW + RING_TOKENS)] + [
                (f"{kind}.state", POOLED[kind] + RING_TOKENS) for kind in RATIOS
            ]:
                slot = ring_slot(position, ring, capacity)
                add(**{f"{name}_slots": slot if in_rings else token})
                add(**{f"{name}_kept": -1 if in_rings or left >= capacity else slot})
            for kind, ratio in RATIOS.items():
                entry, rest = divmod(position + 1, ratio)
                rows_per_page = PAGE // ratio
                done = (
                    pages[ring][(entry - 1) // rows_per_page] * rows_per_page + (entry - 1) % rows_per_page
                    if not rest
                    else -1
                )
                add(**{f"{kind}.entry_slots": done, f"{kind}.num_visible": entry})
            token += 1
    while token < size:
        add(**{name: token if name == "first_idx" else 0 if "visible" in name else -1 for name in found})
        token += 1
    return found


def flat(plan: StepPlan) -> dict[str, torch.Tensor]:
    """Return every tensor of the plan's tokens, by name."""
    fields = {
        one.name: getattr(plan.slots, one.name) for one in dataclasses.fields(plan.slots) if one.name != "entries"
    }
    for kind in plan.tables:
        slots = plan.entry_slots(kind)
        fields |= {f"{kind}.{one.name}": getattr(slots, one.name) for one in dataclasses.fields(slots)}
    return fields


@pytest.mark.parametrize("trial", range(60))
def test_a_plan_is_its_sequences_one_by_one(trial: int, seed: int) -> None:
    rng = random.Random(seed)
    longest = rng.choice([1, RING_TOKENS, 16])
    rings = rng.sample(range(5), rng.randint(1, 5))
    rows = [(rng.randrange(rng.choice([3, 40, 150])), rng.randint(1, longest), ring) for ring in rings]
    one, batch = planner(), make_batch(rows)
    pages = give_pages(one, rows, seed)
    num_tokens, in_rings = len(batch.token_ids), max(count for _, count, _ in rows) <= RING_TOKENS
    plan = one.plan(batch)
    size = bucket_of(num_tokens) if in_rings else num_tokens
    want, got = expected(rows, pages, size, in_rings), flat(plan)
    assert plan.in_rings is in_rings and set(got) == set(want)
    for name, values in want.items():
        assert got[name].tolist() == values, name
    if in_rings:
        assert len(one.plan(batch, fill_up=False).positions) == num_tokens
    draft = one.draft_plan(batch)
    assert draft.tables == {} and len(draft.positions) == num_tokens
    assert draft.in_rings is (max(count for _, count, _ in rows) <= RING_TOKENS + 1)
    assert draft.slots.window_slots.tolist() == want["window_slots"][:num_tokens] or draft.in_rings is not in_rings


def test_pages_reach_the_tables_with_the_step(seed: int) -> None:
    """Growing, shrinking, and an admission with more pages than the step's block has room for."""
    rng, one = random.Random(seed), planner(max_tokens=PAGE * 30)
    want = np.full((5, 30), -1)
    for _ in range(40):
        ring, known = rng.randrange(5), 0
        known = int((want[ring] >= 0).sum())
        first = rng.randint(0, known)
        pages = [rng.randrange(40) for _ in range(rng.randint(0 if first else 1, 30 - first))]
        one.set_pages(ring, pages, first)
        want[ring, first : first + len(pages)], want[ring, first + len(pages) :] = pages, -1
        if want[ring, 0] >= 0:
            one.plan(make_batch([(0, 1, ring)]))
            assert one.page_tables.tolist() == want.tolist()


def test_the_last_change_before_a_step_counts() -> None:
    """A ring that changes hands before a step runs: more pages than the step's block has room for, then fewer."""
    one = planner(max_tokens=PAGE * 6)
    one.set_pages(1, [30, 31, 32, 33, 34, 35])
    one.set_pages(1, [7, 8])
    one.plan(make_batch([(0, 1, 1)]))
    assert one.page_tables[1].tolist() == [7, 8, -1, -1, -1, -1]


def test_an_empty_plan() -> None:
    none = np.empty(0, dtype=np.int64)
    plan = planner().plan(Batch(none, none, none, none))
    assert all(len(values) == 0 for values in flat(plan).values()) and plan.saves is None


def test_saves_say_where_the_step_has_the_rows() -> None:
    one, rows = planner(), [(3, 2, 4), (20, 10, 1)]
    give_pages(one, rows)
    saves = (Save(ring=1, length=24, snapshot_idx=7, row=5),)
    assert one.plan(make_batch(rows, saves)).saves.tolist() == [[1, 24, 20, 2, 7]]
    assert one.plan(make_batch(rows)).saves is None


def test_refusals() -> None:
    rows = [(0, 80, 1), (0, 1, 0)]
    one = planner()
    give_pages(one, rows)
    with pytest.raises(ValueError, match="at most 3 tokens of one sequence a step, or 80 tokens of all; got 80 of one"):
        one.plan(make_batch(rows))
    assert not one.plan(make_batch(rows[:1])).in_rings
    assert one.draft_plan(make_batch([(0, 4, 1)])).in_rings and not one.draft_plan(make_batch([(0, 5, 1)])).in_rings
    give_pages(one, [(PAGE - 1, 1, 0), (PAGE - 1, 1, 1)])
    with pytest.raises(
        ValueError, match="a sequence lacks pages: it has 1 pages of 24 tokens, and positions go up to 24"
    ):
        one.plan(make_batch([(PAGE - 1, 1, 0), (PAGE, 1, 1)]))
    with pytest.raises(ValueError, match="without a gap; got pages 3 to 3 for one that has 1"):
        one.set_pages(0, [5], 3)
    with pytest.raises(ValueError, match="pages 0 to at most 8 without a gap; got pages 0 to 9"):
        one.set_pages(0, range(10))


# -- buckets -----------------------------------------------------------------------------------------------------------


def test_buckets() -> None:
    assert buckets_up_to(64) == [*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64]
    costs = [bucket_of(num_tokens) / num_tokens - 1 for num_tokens in range(1, 257)]
    assert min(costs) == 0.0 and max(costs) < 0.25 and sum(costs[:64]) / 64 < 0.07
    assert bucket_of(0) == 0 and all(bucket_of(bucket_of(n)) == bucket_of(n) for n in range(300))
    with pytest.raises(ValueError, match="must be >= 0; got -1"):
        bucket_of(-1)


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor in a plan."""
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, tuple | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(one)


class Replay:
    """Stands for captured graphs: the plans of a bucket must have one set of shapes, strides and addresses.

    It answers with random streams, so that hundreds of steps take seconds.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
        self.seen: dict[int, set[tuple[Any, ...]]] = {}
        self.positions: set[int] = set()
        self.num_steps = 0
        generator = torch.Generator().manual_seed(0)

        def forward(plan: StepPlan, *rest: Any) -> torch.Tensor:
            if plan.in_rings:
                self.num_steps += 1
                kept = dataclasses.replace(plan, saves=None)  # copies after the step
                shapes = tuple((one.shape, one.stride(), one.data_ptr()) for one in tensors_of(kept))
                self.seen.setdefault(len(plan.positions), set()).add(shapes)
                self.positions |= set(plan.positions.tolist())
            shape = (len(plan.positions), model.config.hc_mult, model.config.hidden_size)
            return torch.randn(shape, generator=generator)

        monkeypatch.setattr(model, "forward", forward)


def test_600_decode_steps_have_one_set_of_addresses_a_bucket(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over page boundaries, admissions, ends and preemptions; drafts would change the number of tokens as well."""
    directory = checkpoints.save(tmp_path, checkpoints.make_master(3), checkpoints.CONFIG)
    model = megamoe.load(directory, "exact")
    replay = Replay(monkeypatch, model)
    engine = Engine(model, EngineConfig(max_sequences=11, prefill_chunk=8, max_step_tokens=32, num_pages=60))
    rng, added = random.Random(1), 0
    while replay.num_steps < 600:
        if rng.random() < 0.1 and len(engine._requests) < 14:
            ids = [rng.randrange(40) for _ in range(rng.choice([1, 5, 250]))]
            engine.add(str(added), ids, SamplingParams(max_tokens=rng.choice([3, 40, 120]), ignore_eos=True))
            added += 1
        engine.step()
    assert len(replay.seen) >= 8 and max(replay.positions) > model.tokens_per_page > 0
    assert -1 in replay.positions, "no step was filled up"
    assert {size: len(found) for size, found in replay.seen.items()} == dict.fromkeys(replay.seen, 1)


def test_a_plan_that_moves_is_noticed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = checkpoints.save(tmp_path, checkpoints.make_master(3), checkpoints.CONFIG)
    model = megamoe.load(directory, "exact")
    right = Planner.describe

    def moving(self: Planner, batch: Batch, *, fill_up: bool = True) -> StepPlan:
        plan = right(self, batch, fill_up=fill_up)
        return dataclasses.replace(plan, slots=dataclasses.replace(plan.slots, positions=plan.positions.clone()))

    monkeypatch.setattr(Planner, "describe", moving)
    replay, kept = Replay(monkeypatch, model), []
    engine = Engine(model, EngineConfig(max_sequences=1))
    engine.add("one", [1], SamplingParams(max_tokens=9, ignore_eos=True))
    while engine.has_work():
        engine.step()
        kept.append(torch.empty(1, dtype=torch.int64))  # so that an address is not used again by accident
    assert len(replay.seen[1]) > 1


# -- what a step costs the host ----------------------------------------------------------------------------------------


def host_cost(one: Planner, batches: list[Batch]) -> tuple[float, int]:
    """Return (seconds, bytes sent to the device) of the cheapest plan; operations are left out."""

    def nothing(op: str, run: Any, reference: Any) -> Any:
        return lambda *arguments: None

    seconds = []
    with watch(nothing):
        for batch in batches:
            start = time.perf_counter()
            plan = one.plan(batch)
            seconds.append(time.perf_counter() - start)
    return min(seconds), 4 * (plan.tokens.numel() + plan.changes.numel())


MILLION = 2**20


def at_a_million(num_sequences: int, step_tokens: int) -> Planner:
    """Return a planner without pools, whose sequences all have the pages of a million tokens."""
    size = CacheSize(num_sequences, num_sequences * 4096, 256, 2, step_tokens)
    one = Planner(128, {LayerKind.CSA: 4, LayerKind.HCA: 128}, size, MILLION, CPU)
    for ring in range(num_sequences):
        one.set_pages(ring, range(ring * 4096, (ring + 1) * 4096))
    return one


def test_a_decode_step_of_64_sequences_at_a_million_tokens_costs_the_host_little() -> None:
    """Once 2.6 ms and 6 MB."""
    one, rings = at_a_million(64, 4096), np.arange(64)
    batches = [Batch(rings, rings + MILLION - 100 - step, np.ones(64, dtype=np.int64), rings) for step in range(30)]
    seconds, num_bytes = host_cost(one, batches)
    assert num_bytes <= 16 * 1024 and seconds <= 150e-6, f"{seconds * 1e6:.0f} us, {num_bytes} bytes"


def test_a_chunk_of_4096_tokens_near_a_million_costs_the_host_little() -> None:
    """Once 503 ms and 260 MB."""
    one, ids = at_a_million(2, 4096), np.arange(4096)
    batch = Batch(ids, np.array([MILLION - 4096]), np.array([4096]), np.array([1]))
    seconds, num_bytes = host_cost(one, [batch] * 20)
    assert num_bytes <= 256 * 1024 and seconds <= 2e-3, f"{seconds * 1e6:.0f} us, {num_bytes} bytes"


# -- on a GPU ----------------------------------------------------------------------------------------------------------

LAYERS = {
    LayerKind.SWA: LayerCacheSpec(512, RowFormat.FP8_ROPE_BF16, WINDOW),
    LayerKind.CSA: LayerCacheSpec(512, RowFormat.FP8_ROPE_BF16, WINDOW, 4, True, 128, RowFormat.INDEX_FP4),
    LayerKind.HCA: LayerCacheSpec(512, RowFormat.FP8_ROPE_BF16, WINDOW, 8),
}


def storages(pools: Iterable[LayerPools]) -> list[torch.Tensor]:
    """Return the whole memory of every pool of some layers, padding included."""
    groups = [group for one in pools for group in (one, one.step, one.saved)]
    found = [getattr(group, name, None) for group in groups for name in (*RINGS, *PAGES)]
    return [whole_storage(pool.storage) for pool in found if pool is not None]


@pytest.mark.gpu
def test_steps_of_a_gpu_plan_and_copy_what_the_cpu_does(seed: int) -> None:
    """Decode steps, drafts and chunks: block tables, slots, and the bytes of rings and snapshots after each of them."""
    devices = CPU, torch.device("cuda")
    planners = [Planner(WINDOW, RATIOS, SIZE, 200, device) for device in devices]
    layers = [
        [allocate_layer(spec, SIZE, device, area=area, num_snapshots=3) for spec in LAYERS.values()]
        for device in devices
        for area in [StepArea(LAYERS.values(), SIZE, device)]
    ]
    random_bytes = torch.Generator().manual_seed(seed)
    for ours, theirs in zip(*map(storages, layers), strict=True):
        ours.copy_(torch.randint(256, ours.shape, generator=random_bytes, dtype=torch.uint8))
        theirs.copy_(ours)
    rows = [
        [(0, 50, 0), (0, 1, 1)],  # longer than the rings
        [(50, 1, 0), (1, 1, 1)],
        [(51, 3, 0), (2, 2, 1), (0, 1, 3)],
        [(54, 70, 0)],
        [(124, 3, 0), (4, 40, 1), (0, 7, 4)],
    ]
    saves = [(Save(0, 48, 2, 47),), (), (), (Save(0, 72, 0, 17), Save(0, 120, 1, 65)), (Save(1, 24, 2, 22),)]
    free = list(range(SIZE.num_pages))
    random.Random(seed).shuffle(free)
    pages: dict[int, list[int]] = {}
    for step, (of_step, kept) in enumerate(zip(rows, saves, strict=True)):
        for start, count, ring in of_step:
            own = pages.setdefault(ring, [])
            first = len(own)
            own += [free.pop() for _ in range(-(-(start + count) // PAGE) - first)]
            for one in planners:
                one.set_pages(ring, own[first:], first)
        plans = [one.plan(make_batch(of_step, kept)) for one in planners]
        assert torch.equal(planners[0].page_tables, planners[1].page_tables.cpu())
        wanted, got = (plain(plan.slots) for plan in plans)
        for name, part in got.items():
            assert torch.equal(part.cpu(), wanted[name]), (step, name)
        for plan, pools in zip(plans, layers, strict=True):
            for kind, one_layer in zip(LAYERS, pools, strict=True):
                finish_layer(plan, one_layer, kind)
            if step == 3:
                restore(pools, 1, 2, 120)
        for ours, theirs in zip(*map(storages, layers), strict=True):
            assert torch.equal(ours, theirs.cpu()), step
