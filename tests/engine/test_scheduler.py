# SPDX-License-Identifier: Apache-2.0
"""Who runs next: no model, no tensors. The promises in the scheduler's header are checked on random work."""

from __future__ import annotations

import math
import random

import pytest

from megamoe.cache.pages import PageAllocator
from megamoe.cache.prefix import PrefixCache
from megamoe.engine.request import Request
from megamoe.engine.sampling_params import SamplingParams
from megamoe.engine.scheduler import Scheduler, Step

SIZE = 4


class Simulation:
    """A scheduler with requests that end after a known number of tokens; plays the engine's part."""

    def __init__(
        self,
        *,
        num_pages: int = 100,
        max_sequences: int = 4,
        max_step_tokens: int = 32,
        prefill_chunk: int = 8,
        num_drafts: int = 0,
        num_snapshots: int = 0,
    ) -> None:
        self.pages = PageAllocator(num_pages, SIZE)
        self.prefix = PrefixCache(self.pages, num_snapshots) if num_snapshots else None
        self.num_drafts = num_drafts
        self.scheduler = Scheduler(
            self.pages,
            self.prefix,
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
            prefill_chunk=prefill_chunk,
        )
        self.requests: list[Request] = []
        self.done: list[int] = []
        self.num_steps = 0

    def add(self, num_prompt: int, num_new: int, first: int = 0) -> Request:
        number = len(self.requests)
        request = Request(
            str(number),
            number,
            list(range(first, first + num_prompt)),
            SamplingParams(max_tokens=num_new),
            max_length=num_prompt + num_new,
            stop_ids=frozenset(),
        )
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    def step(self) -> Step:
        """Schedule a step, pretend that it ran, and that every second draft was right."""
        step = self.scheduler.next_step()
        self.num_steps += 1
        for chunk in step.chunks:
            request = chunk.request
            assert chunk.start == request.num_computed and request.ring is not None
            assert request.room >= chunk.start + chunk.num_tokens + chunk.num_drafts
            assert len(self.pages.block_table(request.number)) * SIZE == request.room
            samples = chunk.start + chunk.num_tokens == len(request.ids)
            right = chunk.num_drafts // 2 if samples else 0
            request.num_computed += chunk.num_tokens + right
            if samples:
                request.ids += [1000 + len(request.ids) + idx for idx in range(1 + right)]
                del request.ids[request.max_length :]
                request.drafts = [0] * max(0, min(self.num_drafts, request.max_length - len(request.ids) - 1))
            if self.prefix is not None:
                table = self.pages.block_table(request.number)
                for num_pages in range(chunk.start // SIZE + 1, request.num_computed // SIZE + 1):
                    if num_pages * SIZE < len(request.ids):
                        self.prefix.insert(request.ids, table, num_pages)
            if len(request.ids) >= request.max_length:
                self.scheduler.remove(request)
                self.done.append(request.number)
        rings = [request.ring for request in self.scheduler.running]
        assert len(set(rings)) == len(rings) and None not in rings
        return step

    def run(self, limit: int = 10_000) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            self.step()
            assert self.num_steps < limit


def shape(step: Step) -> list[tuple[int, int]]:
    return [(chunk.request.number, chunk.num_tokens) for chunk in step.chunks]


# known answers


def test_a_prompt_runs_in_chunks_and_then_token_by_token() -> None:
    simulation = Simulation()
    simulation.add(20, 3)
    assert [shape(simulation.step()) for _ in range(5)] == [[(0, 8)], [(0, 8)], [(0, 4)], [(0, 1)], [(0, 1)]]
    assert simulation.done == [0] and simulation.step().chunks == []
    assert simulation.pages.num_free_pages == 100


def test_decoding_and_prompts_share_a_step() -> None:
    simulation = Simulation(max_step_tokens=10)
    simulation.add(3, 5)
    simulation.step()
    simulation.add(12, 2)
    simulation.add(6, 2)
    assert shape(simulation.step()) == [(0, 1), (1, 8), (2, 1)], "the decoding one first, then the older prompt"
    assert shape(simulation.step()) == [(0, 1), (1, 4), (2, 5)]


def test_rings_are_the_limit() -> None:
    simulation = Simulation(max_sequences=2)
    for _ in range(3):
        simulation.add(2, 2)
    assert shape(simulation.step()) == [(0, 2), (1, 2)]
    assert shape(simulation.step()) == [(0, 1), (1, 1)]
    assert shape(simulation.step()) == [(2, 2)]


def test_pages_are_the_limit_and_nobody_overtakes() -> None:
    simulation = Simulation(num_pages=5)
    simulation.add(8, 5)
    simulation.add(12, 2)  # three pages, and one for the growth of the first: too many
    simulation.add(1, 1)  # would fit, but came later
    assert shape(simulation.step()) == [(0, 8)]
    assert shape(simulation.step()) == [(0, 1)]
    simulation.run()
    assert simulation.done == [0, 2, 1] or simulation.done == [0, 1, 2]
    assert simulation.requests[1].was_admitted


def test_the_youngest_gives_way_and_comes_back() -> None:
    simulation = Simulation(num_pages=5)
    old, young = simulation.add(7, 12), simulation.add(7, 6)
    assert shape(simulation.step()) == [(0, 7), (1, 7)]
    preempted = []
    while not preempted:
        preempted = simulation.step().preempted
    assert preempted == [young] and young.ring is None and young.num_computed == 0
    kept = list(young.ids)
    simulation.run()
    assert simulation.done == [0, 1] and young.ids[: len(kept)] == kept
    assert len(old.ids) == 19 and simulation.pages.num_free_pages == 5


def test_drafts_are_dropped_before_anybody_is_preempted() -> None:
    simulation = Simulation(num_pages=5, num_drafts=4)
    simulation.add(7, 30)
    simulation.add(7, 30)
    simulation.step()
    step = simulation.step()  # each wants a page for its drafts; one is free, and the older one gets it
    assert not step.preempted and [chunk.num_drafts for chunk in step.chunks] == [4, 0]
    while not step.preempted:
        step = simulation.step()
        assert simulation.num_steps < 20
    assert [chunk.num_drafts for chunk in step.chunks] == [0], "its own drafts went first, then the youngest"


def test_a_prefix_is_continued() -> None:
    simulation = Simulation(num_snapshots=20)
    simulation.add(12, 2)
    simulation.run()
    simulation.add(15, 2)
    step = simulation.step()
    (request, match), (chunk,) = step.admitted[0], step.chunks
    assert match is not None and match.num_tokens == 12 and (chunk.start, chunk.num_tokens) == (12, 3)
    assert request.num_cached == 12


def test_kept_pages_give_way_to_running_sequences() -> None:
    simulation = Simulation(num_pages=6, num_snapshots=20)
    simulation.add(16, 2)
    simulation.run()
    assert simulation.pages.num_free_pages == 2
    simulation.add(20, 3, first=500)
    simulation.run()
    assert simulation.done == [0, 1]


def test_the_found_prefix_is_not_given_up_to_make_room_for_the_rest() -> None:
    simulation = Simulation(num_pages=6, num_snapshots=20)
    simulation.add(12, 2)
    simulation.run()
    simulation.add(8, 1, first=700)
    simulation.run()
    simulation.add(20, 2)
    step = simulation.step()
    assert step.admitted[0][1] is not None and step.admitted[0][1].num_tokens == 12
    simulation.run()


def test_removing_frees_everything_at_once() -> None:
    simulation = Simulation()
    running, waiting = simulation.add(20, 3), None
    simulation.step()
    waiting = simulation.add(5, 5)
    simulation.scheduler.remove(waiting)
    simulation.scheduler.remove(running)
    assert simulation.pages.num_free_pages == 100
    assert simulation.step().chunks == []


# properties: what the header promises


@pytest.mark.parametrize("trial", range(40))
def test_the_promises_hold_on_random_work(trial: int, seed: int) -> None:
    check_promises(seed)


@pytest.mark.parametrize("fault", ["oldest_victim", "newest_first", "greedy_prompts"])
def test_a_broken_promise_is_noticed(fault: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "oldest_victim":
        right = Scheduler._release

        def wrong(self: Scheduler, request: Request) -> None:
            is_preempted = len(request.ids) < request.max_length
            right(self, self.running[0] if is_preempted and request is self.running[-1] else request)

        monkeypatch.setattr(Scheduler, "_release", wrong)
    elif fault == "newest_first":
        monkeypatch.setattr(Scheduler, "add", lambda self, request: self.waiting.appendleft(request))
    else:
        monkeypatch.setattr(Scheduler, "_grow", lambda self, request, step: request.number % 2 == 0)
    with pytest.raises((AssertionError, ValueError)):
        for trial in range(40):
            check_promises(seed + trial)


def check_promises(seed: int) -> None:
    """Play random work and assert every promise of the scheduler's header."""
    rng = random.Random(seed)
    num_drafts = rng.choice([0, 0, 1, 3])
    max_sequences, prefill_chunk = rng.randint(1, 6), rng.randint(1 + num_drafts, 12)
    max_step_tokens = max_sequences * (1 + num_drafts) + rng.randint(0, 20)
    longest = 40
    simulation = Simulation(
        num_pages=rng.randint(longest // SIZE, 3 * longest // SIZE),
        max_sequences=max_sequences,
        max_step_tokens=max_step_tokens,
        prefill_chunk=prefill_chunk,
        num_drafts=num_drafts,
        num_snapshots=rng.choice([0, 3, 50]),
    )
    chunk_bound = min(prefill_chunk, max_step_tokens - (max_sequences - 1) * (1 + num_drafts))
    assert chunk_bound >= 1
    pending = [(rng.randint(1, 30), rng.randint(1, 10), rng.choice([0, 0, 100])) for _ in range(25)]
    arrived: dict[int, int] = {}
    finished: dict[int, int] = {}
    cost: dict[int, int] = {}
    first_ring: list[int] = []
    while pending or simulation.scheduler.running or simulation.scheduler.waiting:
        while pending and rng.random() < 0.4:
            num_prompt, num_new, first = pending.pop()
            request = simulation.add(num_prompt, num_new, first)
            arrived[request.number] = simulation.num_steps
            # Alone: its prompt in the smallest chunks, its tokens one by one, and one step more to be admitted.
            cost[request.number] = math.ceil(num_prompt / chunk_bound) + num_new + 1
        decoding = [r for r in simulation.scheduler.running if len(r.ids) - r.num_computed == 1]
        prefilling = [r for r in simulation.scheduler.running if len(r.ids) - r.num_computed > 1]
        left = {r.number: len(r.ids) - r.num_computed for r in prefilling}
        unfinished = [n for n in arrived if n not in finished]
        lengths = {n: (simulation.requests[n].num_computed, len(simulation.requests[n].ids)) for n in unfinished}
        step = simulation.step()
        ran = {chunk.request.number: chunk for chunk in step.chunks}
        gone = {request.number for request in step.preempted}
        assert sum(chunk.num_tokens + chunk.num_drafts for chunk in step.chunks) <= max_step_tokens
        assert all(chunk.num_tokens <= prefill_chunk for chunk in step.chunks)
        for request in decoding:  # no stalls
            assert request.number in ran or request.number in gone
        if prefilling and prefilling[0].number not in gone:  # no crowding
            oldest = prefilling[0].number
            assert ran[oldest].num_tokens >= min(chunk_bound, left[oldest])
        for request, _ in step.admitted:  # no overtaking
            if request.number not in first_ring:
                first_ring.append(request.number)
        assert first_ring == sorted(first_ring)
        if unfinished:  # the oldest is never preempted and moves on
            oldest = min(unfinished)
            assert oldest not in gone
            request = simulation.requests[oldest]
            assert (request.num_computed, len(request.ids)) > lengths[oldest] or oldest in ran
            assert oldest in ran
        for number in simulation.done:
            finished.setdefault(number, simulation.num_steps)
    for number, at in finished.items():  # no starvation
        bound = sum(cost[other] for other in cost if other <= number)
        assert at - arrived[number] <= bound, f"request {number} took {at - arrived[number]} steps, bound {bound}"
    assert len(finished) == 25
    kept = simulation.prefix.num_pages if simulation.prefix else 0
    assert simulation.pages.num_free_pages + kept == simulation.pages.num_pages
