# SPDX-License-Identifier: Apache-2.0
"""Engine: many requests at once. One step = schedule, run, sample, return.

    engine = Engine(model, EngineConfig(max_sequences=8))
    engine.add("a", prompt_ids, SamplingParams(max_tokens=32))
    while engine.has_work():
        for output in engine.step():
            print(output.request_id, output.token_ids, output.finish_reason)

A request's tokens and log-probabilities depend on its prompt, its parameters and its seed, and on nothing else: not on
the other requests, on chunk sizes, on what was reused or preempted, or on speculation.

The engine is not thread-safe: one thread calls it. Nothing runs between calls.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
import torch

from megamoe.cache.batch import Batch, Commit, Save
from megamoe.cache.pages import PageAllocator
from megamoe.cache.prefix import PrefixCache, PrefixMatch
from megamoe.engine.config import EngineConfig, EnginePlan, resolve
from megamoe.engine.containment import Contained
from megamoe.engine.drafter import Drafter
from megamoe.engine.logits_filter import LogitsFilter
from megamoe.engine.model import BatchModel
from megamoe.engine.outputs import EngineStats, FinishReason, QueueFull, RequestOutput, TokenLogprobs
from megamoe.engine.request import NewRequest, Request
from megamoe.engine.runner import Calls, Runner, runner_for
from megamoe.engine.sampler import NO_TOKEN, Sampled, choose_drafts, sample_rows
from megamoe.engine.sampling_params import SamplingParams
from megamoe.engine.scheduler import Chunk, Scheduler, Step


class Engine:
    """Runs requests against one model.

    Attributes:
        model: the model.
        config: what the user set.
        plan: page, ring and snapshot counts, and what the caches cost.
        runner: does the work of decode steps.
    """

    def __init__(self, model: BatchModel, config: EngineConfig | None = None, *, runner: Runner | None = None) -> None:
        """Allocate the caches.

        Args:
            model: the model.
            config: what the user sets.
            runner: does the work of decode steps; None for graphs where the device has them and `config` wants them.

        Raises:
            ValueError: the configuration does not fit the model; see `resolve`.
        """
        self.model = model
        self.config = config or EngineConfig()
        self.plan: EnginePlan = resolve(self.config, model)
        size, num_snapshots = self.plan.size, self.plan.num_snapshots
        num_drafts = self.config.speculative_tokens
        longest = self.plan.max_sequence_tokens + num_drafts
        self._cache = model.new_shared_cache(size, num_snapshots, max_tokens=longest, with_drafts=num_drafts > 0)
        self._drafter: Drafter | None = model.new_drafter(self._cache, num_drafts) if num_drafts else None
        if runner is None:
            runner = runner_for(model.device) if self.config.decode_graphs else Calls()
        self.runner = runner
        self._pages = PageAllocator(size.num_pages, size.tokens_per_page)
        self._prefix = PrefixCache(self._pages, num_snapshots) if num_snapshots else None
        self._scheduler = Scheduler(
            self._pages,
            self._prefix,
            max_sequences=size.num_sequences,
            max_step_tokens=self.config.max_step_tokens,
            prefill_chunk=self.config.prefill_chunk,
        )
        self._requests: dict[str, Request] = {}
        self._empty: list[Request] = []  # max_tokens 0: done without a step
        self._next_number = 0
        self._counts = dict.fromkeys(_COUNTERS, 0)
        self._finish_interval_s = 1.0
        self._last_finish_s: float | None = None

    def add(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        logits_filter: LogitsFilter | None = None,
    ) -> None:
        """Queue a request; arguments are those of `NewRequest`, errors those of `add_all`."""
        self.add_all([NewRequest(request_id, prompt_ids, params, logits_filter)])

    def add_all(self, requests: Sequence[NewRequest]) -> None:
        """Queue requests that belong together: all of them or, with an error, none.

        Raises:
            ValueError: an id is taken, a prompt is empty, too long or holds an id outside the vocabulary, a parameter
                names such an id, a request could never fit the pages, or so many could never wait together.
            QueueFull: too many requests wait; nothing was changed.
        """
        names = [one.request_id for one in requests]
        taken = next((name for name in names if name in self._requests or names.count(name) > 1), None)
        if taken is not None:
            raise ValueError(f"request: {taken!r} is not finished; use another id, or abort it first.")
        for one in requests:
            self._check(one.prompt_ids, one.params)
        most = self.config.max_waiting + self.config.max_sequences
        if len(requests) > most:
            raise ValueError(
                f"request: {len(requests)} sequences must be taken together; the engine has room for {most}. Ask for "
                "fewer, or raise max_waiting."
            )
        if len(self._scheduler.waiting) + len(requests) > self.config.max_waiting + self._free_rings():
            retry_after_s = min(max(1.0, self._finish_interval_s * len(requests)), 60.0)
            raise QueueFull(
                f"engine: {len(self._scheduler.waiting)} requests wait, and with {len(requests)} more it would be more "
                f"than may; try again in about {retry_after_s:.0f} s.",
                retry_after_s,
            )
        for one in requests:
            self._add(one)

    def _add(self, new: NewRequest) -> None:
        prompt_ids, params = new.prompt_ids, new.params
        request = Request(
            new.request_id,
            self._next_number,
            prompt_ids,
            params,
            max_length=min(len(prompt_ids) + params.max_tokens, self.plan.max_sequence_tokens + 1),
            stop_ids=self._stop_ids(params),
            logits_filter=new.logits_filter,
        )
        self._next_number += 1
        self._requests[new.request_id] = request
        if params.max_tokens == 0:
            self._empty.append(request)
        else:
            self._scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its pages at once; no output names it after that.

        Returns:
            Whether there was such a request; False for one that has finished.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        if request in self._empty:
            self._empty.remove(request)
        else:
            self._scheduler.remove(request)
        self._counts["aborted"] += 1
        return True

    def has_work(self) -> bool:
        """Return whether `step` would do anything."""
        return bool(self._requests)

    def stats(self) -> EngineStats:
        """Return counters and gauges."""
        cached = self._prefix.pages() if self._prefix is not None else []
        spare = sum(self._pages.num_owners(page) == 1 for page in cached)
        return EngineStats(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            pages_used=self._pages.num_pages - self._pages.num_free_pages - spare,
            pages_cached=len(cached),
            pages_total=self._pages.num_pages,
            **self._counts,
        )

    def reset_prefix_cache(self) -> None:
        """Forget every page that is kept for reuse; running requests go on."""
        if self._prefix is not None:
            self._prefix.clear()

    def reset_counters(self) -> None:
        """Count from zero again; what is counted while an engine gets ready says nothing about requests."""
        self._counts = dict.fromkeys(_COUNTERS, 0)
        self._finish_interval_s, self._last_finish_s = 1.0, None

    @torch.inference_mode()
    def rehearse(self, position: int, token_ids: Sequence[int], each: int = 1) -> None:
        """Run `each` tokens of several sequences that are all at `position`, for nobody, while there is no request.

        What was in rings and pages is read as if it belonged to them, and overwritten where it is nobody's. Sequences
        without a ring or pages are left out.
        """
        assert not self._requests and not (self._prefix and self._prefix.pages()), "somebody's pages would be written"
        size = self.plan.size
        width = (position + each - 1) // size.tokens_per_page + 1
        count = min(-(-len(token_ids) // each), size.num_sequences, size.num_pages // width)
        ids = np.array(token_ids[: count * each])
        for ring in range(count):
            self._cache.set_pages(ring, range(ring * width, (ring + 1) * width))
        counts = np.full(count, each)
        counts[-1:] = len(ids) - each * (count - 1)
        batch = Batch(ids, np.full(count, position), counts, np.arange(count))
        self._forward(batch)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Run one step and return what is new, in order of arrival; requests without a new token are not named.

        An error while something is done for one request ends that request (`RequestOutput.error`). One in a call that
        is made for all of them is traced to whom it belongs by making the call again for each alone.
        """
        outputs = [self._finish_empty(request) for request in self._empty]
        self._empty.clear()
        step = self._scheduler.next_step()
        if step.failed is not None:
            outputs.append(self._fail(*step.failed))
        outputs += self._prepare(step)
        chunks = [chunk for chunk in step.chunks if chunk.request.ring is not None]  # without who has just failed
        if not chunks:
            return outputs
        parts, failed = self._run(chunks)
        outputs += failed
        for part in parts:
            outputs += self._conclude(part)
        self._counts["steps"] += 1
        return outputs

    def _run(self, chunks: list[Chunk]) -> tuple[list[_Part], list[RequestOutput]]:
        """Run the model and sample: all chunks at once, or after an error each alone, without those that fail then.

        Entries and pages have to be undone nowhere: the same rows are written again at the same positions. A ring is:
        layers that were done before the error have overwritten what a long chunk reads behind its first token.
        """
        with Contained() as fault:
            return [self._compute(chunks)], []
        assert fault.error is not None
        if self._prefix is not None:
            self._prefix.clear()  # pages may be kept whose snapshots were not taken
        if len(chunks) == 1:
            return [], [self._fail(chunks[0].request, fault.error)]
        parts: list[_Part] = []
        outputs: list[RequestOutput] = []
        for chunk in chunks:
            with Contained() as lost:
                self._rebuild(chunk)
            if lost.error is not None:
                outputs.append(self._fail(chunk.request, lost.error))
                continue
            alone, failed = self._run([chunk])
            parts += alone
            outputs += failed
        return parts, outputs

    def _rebuild(self, chunk: Chunk) -> None:
        """Compute a sequence anew up to a chunk that was longer than its rings and broke off."""
        if chunk.num_tokens + chunk.num_drafts <= self.plan.size.ring_tokens:
            return
        for start in range(0, chunk.start, self.config.prefill_chunk):
            count = min(self.config.prefill_chunk, chunk.start - start)
            batch, _ = self._batch([Chunk(chunk.request, start, count, 0)], ())
            self._forward(batch)

    def _forward(self, batch: Batch) -> tuple[object, torch.Tensor | None]:
        """Run a step on the device; return what the model did, and for one with a bucket the logits of all rows."""
        plan = self._cache.plan(batch)
        if plan.bucket is None:
            return self.model.run(plan, self._cache), None
        hidden, logits = self.runner(plan.bucket, lambda: self.model.decode(plan, self._cache))
        self._cache.finish(plan)
        return hidden, logits

    def _compute(self, chunks: list[Chunk]) -> _Part:
        saves = {} if self._prefix is None else self._reserve(self._prefix, chunks)
        batch, row_starts = self._batch(chunks, tuple(saves.values()))
        hidden, logits = self._forward(batch)
        sampling, sampled = self._sample(chunks, row_starts, hidden, logits)
        ran = [_Ran(*one) for one in zip(chunks, row_starts, sampling, strict=True)]
        return _Part(ran, hidden, sampled, saves)

    def _conclude(self, part: _Part) -> list[RequestOutput]:
        """Take in what a part brought: tokens, guesses, pages to keep; return what is new."""
        outputs: dict[Request, RequestOutput] = {}
        row = 0
        for one in part.ran:
            chunk, request = one.chunk, one.chunk.request
            num_accepted = 0
            if one.samples:
                with Contained() as fault:
                    outputs[request], num_accepted = self._take(chunk, part.sampled, row)
                row += 1 + chunk.num_drafts
                if fault.error is not None:
                    outputs[request] = self._fail(request, fault.error)
                    continue
            one.committed = chunk.num_tokens + num_accepted
            self._counts["prompt_tokens"] += max(0, min(chunk.num_tokens, request.num_prompt - chunk.start))
            request.num_computed += one.committed
        ran = [one for one in part.ran if one.chunk.request.ring is not None]
        if self._prefix is not None:
            for one in ran:
                with Contained() as fault:
                    self._keep_drafted(self._prefix, one, part.saves)
                if fault.error is not None:
                    outputs[one.chunk.request] = self._fail(one.chunk.request, fault.error)
        ran = [one for one in ran if one.chunk.request.ring is not None]
        if self._drafter is not None and ran:
            outputs |= self._draft_for(self._drafter, ran, part)
        if self._prefix is not None and any(output.error is not None for output in outputs.values()):
            self._prefix.clear()  # a page may be kept whose snapshot is not whole
        for request, output in outputs.items():
            if output.finish_reason is not None and output.error is None:
                self._finish(request)
        return list(outputs.values())

    def _fail(self, request: Request, error: Exception) -> RequestOutput:
        """End a request with an error; ring and pages are free at once."""
        self._scheduler.remove(request)
        del self._requests[request.request_id]
        self._counts["failed"] += 1
        return RequestOutput(request.request_id, (), None, "error", request.num_prompt, request.num_cached, error)

    def _check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse a request that can never run."""
        longest, vocab_size = self.plan.max_sequence_tokens, self.model.config.vocab_size
        if not len(prompt_ids):
            raise ValueError("prompt: got no token ids; a sequence needs at least one, the BOS id.")
        if len(prompt_ids) > longest:
            context = self.model.config.max_position_embeddings
            limit = f"the context of model {self.model.name!r}" if longest == context else "the longest sequence"
            raise ValueError(f"prompt: got {len(prompt_ids)} tokens; {limit} is {longest} tokens. Shorten the prompt.")
        low, high = min(prompt_ids), max(prompt_ids)
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"prompt: token ids must be 0 to {vocab_size - 1}; got {low if low < 0 else high}. "
                "Encode it with this model's tokenizer."
            )
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise ValueError(f"sampling: {name} must name ids 0 to {vocab_size - 1}; got {token_id}.")
        if params.min_tokens and len(self._stop_ids(params)) >= vocab_size:
            raise ValueError(
                f"sampling: min_tokens {params.min_tokens} leaves no token to choose: every id of the vocabulary ends "
                "the sequence. Name fewer stop_token_ids, or leave min_tokens out."
            )
        num_tokens = min(len(prompt_ids) + max(params.max_tokens - 1, 0), longest)
        per_page = self._pages.tokens_per_page
        if -(-num_tokens // per_page) > self._pages.num_pages:
            raise ValueError(
                f"request: {num_tokens} tokens need {-(-num_tokens // per_page)} pages of {per_page}; the engine has "
                f"{self._pages.num_pages}. Lower max_tokens, or give the engine more memory."
            )

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        own = () if params.ignore_eos else self.model.config.eos_token_ids
        return frozenset((*own, *params.stop_token_ids))

    def _free_rings(self) -> int:
        return self.config.max_sequences - len(self._scheduler.running)

    def _finish_empty(self, request: Request) -> RequestOutput:
        del self._requests[request.request_id]
        self._counts["finished"] += 1
        return RequestOutput(request.request_id, (), None, "length", request.num_prompt, 0)

    def _prepare(self, step: Step) -> list[RequestOutput]:
        """Bring rings and tables in line with what the scheduler decided; return who failed."""
        failed = []
        for request, match in step.admitted:
            if request.ring is None:
                continue
            with Contained() as fault:
                self._welcome(request, match)
            if fault.error is not None:
                failed.append(self._fail(request, fault.error))
        for request in step.grown:
            if request.ring is not None:
                pages = self._pages.block_table(request.number)
                first = -(-request.num_computed // self._pages.tokens_per_page)  # the pages before are known
                self._cache.set_pages(request.ring, pages[first:], first)
        self._counts["preemptions"] += len(step.preempted)
        return failed

    def _welcome(self, request: Request, match: PrefixMatch | None) -> None:
        """Fill the ring that a request was given."""
        assert request.ring is not None
        self._cache.set_pages(request.ring, self._pages.block_table(request.number))
        if request.num_generated == 0:
            self._counts["prefix_query_tokens"] += request.num_prompt
            self._counts["prefix_hit_tokens"] += request.num_computed
        if match is not None:
            self._cache.restore(match.snapshot_idx, request.ring, match.num_tokens)
            if self._drafter is not None:
                self._drafter.restore(match.snapshot_idx, request.ring, match.num_tokens)
        elif self._drafter is not None:
            self._drafter.start(request.ring)

    def _batch(self, chunks: list[Chunk], saves: tuple[Save, ...]) -> tuple[Batch, list[int]]:
        """Return the batch of a step, and the row of each chunk's first token in it."""
        token_ids: list[int] = []
        row_starts, starts, counts, rings = [], [], [], []
        for chunk in chunks:
            request, start = chunk.request, chunk.start
            count = chunk.num_tokens + chunk.num_drafts
            row_starts.append(len(token_ids))
            token_ids += request.ids[start : start + chunk.num_tokens]
            if chunk.num_drafts:
                token_ids += request.drafts
            starts.append(start)
            counts.append(count)
            rings.append(request.ring)
        batch = Batch(np.array(token_ids), np.array(starts), np.array(counts), np.array(rings), saves)
        return batch, row_starts

    def _sample(
        self, chunks: list[Chunk], row_starts: list[int], hidden: object, logits: torch.Tensor | None
    ) -> tuple[list[bool], Sampled]:
        """Draw a token after the last known token of each sequence, and after each of its drafts."""
        sampling: list[bool] = []
        rows: list[int] = []
        requests: list[Request] = []
        ahead: list[int] = []
        num_rows = 0
        for chunk, row in zip(chunks, row_starts, strict=True):
            last = row + chunk.num_tokens - 1
            num_rows = last + 1 + chunk.num_drafts
            samples = chunk.start + chunk.num_tokens == len(chunk.request.ids)
            sampling.append(samples)
            if not samples:
                continue
            rows.append(last)
            requests.append(chunk.request)
            ahead.append(0)
            for offset in range(1, 1 + chunk.num_drafts):
                rows.append(last + offset)
                requests.append(chunk.request)
                ahead.append(offset)
        if not rows:
            return sampling, Sampled([], None)
        is_all = len(rows) == num_rows
        at = None if is_all else torch.from_numpy(np.array(rows)).to(self.model.device)
        if logits is None:
            logits = self.model.logits_of(hidden, at)
        elif at is not None:
            logits = logits[at]
        return sampling, sample_rows(logits[: len(rows)], requests, ahead)  # nobody's rows stand after the others

    def _take(self, chunk: Chunk, sampled: Sampled, row: int) -> tuple[RequestOutput, int]:
        """Append a chunk's tokens to its request: the first, and one more for every draft that was right."""
        request = chunk.request
        drafts, params = request.drafts, request.params
        token_ids: list[int] = []
        reason: FinishReason | None = None
        num_accepted = 0
        while True:
            token_id = sampled.token_ids[row + num_accepted]
            if token_id == NO_TOKEN:
                reason = "stop"
                break
            request.ids.append(token_id)
            token_ids.append(token_id)
            if request.logits_filter is not None:
                request.logits_filter.accept(token_id)
            if token_id in request.stop_ids:
                reason = "stop"
            elif len(request.ids) >= request.max_length:
                reason = "length"
            if reason is not None or num_accepted == chunk.num_drafts or drafts[num_accepted] != token_id:
                break
            num_accepted += 1
        self._counts["draft_tokens"] += chunk.num_drafts
        self._counts["accepted_tokens"] += num_accepted
        self._counts["generated_tokens"] += len(token_ids)
        request.drafts = []
        logprobs: tuple[TokenLogprobs, ...] | None = None
        if params.logprobs is not None and sampled.logprobs is not None:
            logprobs = tuple(one for one in sampled.logprobs[row : row + len(token_ids)] if one is not None)
        output = RequestOutput(
            request.request_id, tuple(token_ids), logprobs, reason, request.num_prompt, request.num_cached
        )
        return output, num_accepted

    def _draft_for(self, drafter: Drafter, ran: list[_Ran], part: _Part) -> dict[Request, RequestOutput]:
        """Draft for all, or after an error for each alone; return who fails then."""
        with Contained() as fault:
            self._draft(drafter, ran, part)
        if fault.error is None:
            return {}
        if len(ran) == 1:
            return {ran[0].chunk.request: self._fail(ran[0].chunk.request, fault.error)}
        failed: dict[Request, RequestOutput] = {}
        for one in ran:
            failed |= self._draft_for(drafter, [one], part)
        return failed

    def _draft(self, drafter: Drafter, ran: list[_Ran], part: _Part) -> None:
        """Show the drafter what is certain and take its guesses."""
        num_drafts = self.config.speculative_tokens
        rows: list[int] = []
        next_ids: list[int] = []
        first_ids, wants, drafting = [], [], []
        for one in ran:
            request, start, count = one.chunk.request, one.chunk.start, one.committed
            rows += range(one.row, one.row + count)
            # A sequence that has just ended without a token has none after its last; it needs no guesses either.
            following = request.ids[start + 1 : start + 1 + count]
            next_ids += following + [0] * (count - len(following))
            first_ids.append(request.ids[start])
            wanted = one.samples and request.can_draft and request.max_length - len(request.ids) >= 2
            wants.append(wanted)
            if wanted:
                drafting.append(request)
        rings = [one.chunk.request.ring for one in ran]
        commit = Commit(
            rows=np.array(rows),
            rings=np.array(rings),
            starts=np.array([one.chunk.start for one in ran]),
            counts=np.array([one.committed for one in ran]),
            first_ids=np.array(first_ids),
            next_ids=np.array(next_ids),
            wants_drafts=np.array(wants),
            saves=tuple(save for save in part.saves.values() if save.ring in rings),
        )
        drafts = drafter.observe(part.hidden, commit, num_drafts, choose_drafts)
        for request, guesses in zip(drafting, drafts.tolist(), strict=True):
            request.drafts = guesses[: request.max_length - len(request.ids) - 1]

    def _reserve(self, prefix: PrefixCache, chunks: list[Chunk]) -> dict[int, Save]:
        """Reserve a snapshot for every page that known tokens fill in this step, before it runs.

        A step that is longer than the rings leaves nothing behind from which they could be taken afterwards.
        """
        saves: dict[int, Save] = {}
        row = 0
        for chunk in chunks:
            self._reserve_pages(prefix, chunk, chunk.start, chunk.start + chunk.num_tokens, row, saves)
            row += chunk.num_tokens + chunk.num_drafts
        return saves

    def _keep_drafted(self, prefix: PrefixCache, one: _Ran, saves: dict[int, Save]) -> None:
        """Keep the pages that accepted drafts filled; their rows are in the rings."""
        new: dict[int, Save] = {}
        known = one.chunk.start + one.chunk.num_tokens
        self._reserve_pages(prefix, one.chunk, known, one.chunk.request.num_computed, one.row, new)
        for save in new.values():
            self._cache.save(save.ring, save.length, save.snapshot_idx)
        saves |= new

    def _reserve_pages(
        self, prefix: PrefixCache, chunk: Chunk, start: int, end: int, row: int, saves: dict[int, Save]
    ) -> None:
        """Keep the pages that end after position `start` and up to `end`; add the snapshots that have to be taken.

        A snapshot that is given to a later page within the step is taken there alone.
        """
        size, request = self._pages.tokens_per_page, chunk.request
        first, last = start // size, end // size
        if first == last:
            return
        assert request.ring is not None
        pages = self._pages.block_table(request.number)
        for num_pages in range(first + 1, last + 1):
            kept = prefix.insert(request.ids, pages, num_pages, request.node)
            if kept is None:
                continue
            request.node, is_new = kept
            snapshot_idx, length = request.node.snapshot_idx, num_pages * size
            if is_new and snapshot_idx is not None:
                saves[snapshot_idx] = Save(request.ring, length, snapshot_idx, row + length - 1 - chunk.start)

    def _finish(self, request: Request) -> None:
        self._scheduler.remove(request)
        del self._requests[request.request_id]
        self._counts["finished"] += 1
        now = time.monotonic()
        if self._last_finish_s is not None:
            self._finish_interval_s += 0.2 * (now - self._last_finish_s - self._finish_interval_s)
        self._last_finish_s = now


_COUNTERS = (
    "prefix_query_tokens",
    "prefix_hit_tokens",
    "draft_tokens",
    "accepted_tokens",
    "preemptions",
    "steps",
    "prompt_tokens",
    "generated_tokens",
    "finished",
    "aborted",
    "failed",
)


@dataclasses.dataclass(slots=True)
class _Ran:
    """What one sequence did in a step.

    Attributes:
        chunk: what it was to do.
        row: of its first token among those of its part.
        samples: whether a token was drawn after it.
        committed: how many of its tokens are certain, right drafts included.
    """

    chunk: Chunk
    row: int
    samples: bool
    committed: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """What one run of the model brought: all of a step, or one sequence after an error.

    Attributes:
        ran: its sequences.
        hidden: what the model returned.
        sampled: tokens.
        saves: page boundaries at which rows are kept, by snapshot.
    """

    ran: list[_Ran]
    hidden: object
    sampled: Sampled
    saves: dict[int, Save]
