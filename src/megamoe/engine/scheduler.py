# SPDX-License-Identifier: Apache-2.0
"""Which sequences run in the next step, and with how many tokens. Pure Python, no model, no tensors.

A step gives, in this order and oldest first within each:

    1. every decoding sequence its next token, and its drafts;
    2. every sequence in the middle of its prompt a chunk of it;
    3. waiting requests a ring, pages for all tokens they have, and a first chunk, in order of arrival.

When a sequence needs a page and none is free, pages kept for reuse are given up, then its drafts are dropped, then the
youngest running sequence is preempted: it gives back everything and waits, in order of arrival, to be computed again.

What follows (tests/engine/test_scheduler.py):

    no stalls     a running sequence that decodes gets a token in every step
    no crowding   the oldest sequence in its prompt gets, in every step, min(prefill_chunk, max_step_tokens -
                  (max_sequences - 1) * (1 + drafts)) tokens or the rest of its prompt
    no overtaking a request never gets a ring before one that came earlier
    no starvation the oldest unfinished request is never preempted and moves on in every step, so a request is done
                  after at most as many steps as it and all before it need one after the other
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses

from megamoe.cache.pages import OutOfPagesError, PageAllocator
from megamoe.cache.prefix import PrefixCache, PrefixMatch
from megamoe.engine.containment import Contained
from megamoe.engine.request import Request


@dataclasses.dataclass(slots=True)
class Chunk:
    """What one sequence does in a step.

    Attributes:
        request: the sequence.
        start: position of its first token.
        num_tokens: its tokens, drafts excluded.
        num_drafts: drafts checked after them.
    """

    request: Request
    start: int
    num_tokens: int
    num_drafts: int


@dataclasses.dataclass(slots=True)
class Step:
    """What a step does.

    Attributes:
        chunks: per sequence.
        admitted: sequences that got a ring, each with the prefix it continues from, or None.
        grown: sequences that got one page or more.
        preempted: sequences that gave back ring and pages.
        failed: the request whose turn it was when an error ended the planning, with the error; what was decided before
            stands, and whoever had no turn yet has one in the next step.
    """

    chunks: list[Chunk]
    admitted: list[tuple[Request, PrefixMatch | None]]
    grown: list[Request]
    preempted: list[Request]
    failed: tuple[Request, Exception] | None = None


class Scheduler:
    """Owns who waits and who runs.

    Attributes:
        waiting: requests without a ring, in order of arrival.
        running: requests with one, in order of arrival.
    """

    def __init__(
        self,
        pages: PageAllocator,
        prefix: PrefixCache | None,
        *,
        max_sequences: int,
        max_step_tokens: int,
        prefill_chunk: int,
    ) -> None:
        """Start with nothing to do.

        Args:
            pages: allocator of the pages of all sequences.
            prefix: where reusable prefixes are found, or None.
            max_sequences: rings.
            max_step_tokens: most tokens in a step, at least max_sequences * (1 + drafts).
            prefill_chunk: most tokens of one sequence in a step.
        """
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: list[Request] = []
        self._pages = pages
        self._prefix = prefix
        self._max_step_tokens = max_step_tokens
        self._prefill_chunk = prefill_chunk
        self._free_rings = list(range(max_sequences - 1, -1, -1))
        self._turn: Request | None = None  # whom the planning is at, to whom an error in it belongs

    def add(self, request: Request) -> None:
        """Let a request wait; its number is higher than that of all before."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a request, waiting or running, and free what it holds."""
        if request.ring is None:
            self.waiting.remove(request)
        else:
            self._release(request)

    def next_step(self) -> Step:
        """Decide on a step. Its sequences are expected to have run when the next one is asked for."""
        step = Step([], [], [], [])
        self._turn = None
        with Contained() as fault:
            self._plan(step)
        if fault.error is not None:
            if self._turn is None:
                raise fault.error
            step.failed = self._turn, fault.error
        return step

    def _plan(self, step: Step) -> None:
        budget = self._max_step_tokens
        prefilling = []
        for request in list(self.running):
            self._turn = request
            if request.ring is None:  # preempted for an older one in this very step
                continue
            if len(request.ids) - request.num_computed > 1:
                prefilling.append(request)
            elif self._grow(request, step):
                num_drafts = len(request.drafts)
                step.chunks.append(Chunk(request, request.num_computed, 1, num_drafts))
                budget -= 1 + num_drafts
        for request in prefilling:
            self._turn = request
            if request.ring is not None:
                budget -= self._chunk(request, budget, step)
        while budget > 0 and self.waiting and self._free_rings and not step.preempted and self._admit(step):
            budget -= self._chunk(step.admitted[-1][0], budget, step)

    def _chunk(self, request: Request, budget: int, step: Step) -> int:
        """Give a sequence the next part of its prompt; return how many tokens."""
        left = len(request.ids) - request.num_computed
        num_tokens = min(left, self._prefill_chunk, budget)
        if num_tokens > 0:
            step.chunks.append(Chunk(request, request.num_computed, num_tokens, 0))
        return num_tokens

    def _grow(self, request: Request, step: Step) -> bool:
        """Give a decoding sequence room for its token and drafts; False if it had to be preempted itself."""
        while True:
            missing = len(request.ids) + len(request.drafts) - request.room
            if missing <= 0:
                return True
            num_pages = -(-missing // self._pages.tokens_per_page)
            try:
                self._pages.extend(request.number, num_pages * self._pages.tokens_per_page)
            except OutOfPagesError:
                if self._prefix is not None and self._prefix.evict(num_pages):
                    continue
                if request.drafts:
                    request.drafts = []
                    continue
                victim = self.running[-1]
                self._release(victim)
                victim.num_computed = 0
                victim.drafts = []
                bisect.insort(self.waiting, victim, key=lambda one: one.number)
                step.preempted.append(victim)
                if victim is request:
                    return False
                continue
            request.room += num_pages * self._pages.tokens_per_page
            step.grown.append(request)
            return True

    def _admit(self, step: Step) -> bool:
        """Give the first waiting request a ring and pages; False if there are not enough pages."""
        request = self._turn = self.waiting[0]
        match = self._prefix.match(request.ids) if self._prefix is not None else None
        shared = match.pages if match is not None else ()
        num_pages = -(-len(request.ids) // self._pages.tokens_per_page)
        with contextlib.ExitStack() as held:
            for page in shared:  # or the search for pages below could give up the very ones that were found
                self._pages.retain(page)
                held.callback(self._pages.release, page)
            # One page for every running sequence stays free: they grow, and would preempt the new one at once.
            needed = num_pages - len(shared) + len(self.running)
            fits = needed <= self._pages.num_free_pages or (self._prefix is not None and self._prefix.evict(needed))
            if fits:
                self._pages.alloc(request.number, num_pages * self._pages.tokens_per_page, shared=shared)
        if not fits:
            return False
        self.waiting.popleft()
        request.ring = self._free_rings.pop()
        request.room = num_pages * self._pages.tokens_per_page
        request.num_computed = 0 if match is None else match.num_tokens
        request.node = None if match is None else match.node
        if not request.was_admitted:
            request.was_admitted = True
            request.num_cached = request.num_computed
        bisect.insort(self.running, request, key=lambda one: one.number)
        step.admitted.append((request, match))
        return True

    def _release(self, request: Request) -> None:
        """Take ring and pages from a running sequence."""
        assert request.ring is not None
        self.running.remove(request)
        self._pages.free(request.number)
        self._free_rings.append(request.ring)
        request.ring = None
        request.room = 0
        request.node = None
