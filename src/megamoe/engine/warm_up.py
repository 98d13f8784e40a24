# SPDX-License-Identifier: Apache-2.0
"""What happens between a loaded model and "ready" on a device with kernels: load them all, run them all, seal.

Kernels are loaded, or compiled, for every operation the model calls. Then an engine runs steps of every size it could
be asked for, the largest first, with the model's own weights and real tokens: what a kernel is first run on is data
such as it will see, never random bytes, which hold NaN scales (fault F7). That also makes every workspace once, at its
largest, so that the allocator has the memory when traffic comes. Every decode step it could be asked for is captured on
the way. Then graphs and the store are sealed: a kernel that is asked for later and was not here raises instead of
stalling every request while it compiles.

On the CPU, and under `megamoe.ops.use("reference")`, there are no kernels and nothing is done.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from megamoe.cache.buckets import buckets_up_to
from megamoe.engine.config import EngineConfig
from megamoe.engine.engine import Engine
from megamoe.engine.model import BatchModel
from megamoe.engine.sampling_params import SamplingParams
from megamoe.ops import dispatch

EVERY_SETTING = SamplingParams(
    max_tokens=3,
    temperature=0.7,
    top_p=0.9,
    min_p=0.01,
    top_k=50,
    seed=0,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logprobs=1,
    ignore_eos=True,
)
"""Reaches every operation that chooses a token."""


def buckets(most: int) -> list[int]:
    """Return the numbers of tokens, or of sequences, that stand for all up to `most`, the largest first.

    They are the powers of two below it, and itself: a kernel chooses its path, tiles and workspaces by such steps.
    """
    return sorted({most, *(1 << bits for bits in range(most.bit_length()))} - {0}, reverse=True)


def bucket_of(num_tokens: int) -> int:
    """Return the bucket of a number of tokens: the next power of two."""
    return 1 << max(0, num_tokens - 1).bit_length()


def warm_up(engine: Engine) -> float:
    """Get an engine ready: load and run every kernel it will use, then seal; return the seconds it took.

    Raises:
        NotImplementedError: an operation has no kernel on the device; all are named.
        ValueError: a kernel has to be compiled and cannot be.
    """
    device = engine.model.device
    if not dispatch.uses_kernels(device):
        return 0.0
    start = time.perf_counter()
    calls = engine.model.op_calls(with_drafts=engine.config.speculative_tokens > 0)
    dispatch.prepare(calls, device, what=f"warm-up: model {engine.model.name!r} with recipe {engine.model.recipe.name}")
    run_every_bucket(engine)
    engine.runner.seal()
    dispatch.seal(device)
    return time.perf_counter() - start


def warm_up_model(model: BatchModel) -> float:
    """Get a model ready for engines made with the default step sizes, as `LLM` makes them for every call."""
    if not dispatch.uses_kernels(model.device):
        return 0.0
    sizes = EngineConfig(prefix_cache=False)
    pages = sizes.max_sequences * -(-sizes.max_step_tokens // model.tokens_per_page)
    return warm_up(Engine(model, EngineConfig(prefix_cache=False, num_pages=pages)))


def run_every_bucket(engine: Engine) -> None:
    """Run prompts of every number of tokens and decoding of every number of sequences, then forget them."""
    config, plan = engine.config, engine.plan
    per_page, context = plan.size.tokens_per_page, plan.max_sequence_tokens
    longest = min(config.prefill_chunk, context, plan.size.num_pages * per_page)
    prompts, once = _prompts(engine.model), SamplingParams(max_tokens=1)
    most = min(config.max_sequences, plan.size.num_pages) * plan.size.ring_tokens  # a sequence has at least one page
    for num_tokens in reversed(buckets_up_to(most)):
        for _ in range(2):  # called and captured, then replayed
            engine.rehearse(0, prompts(num_tokens), plan.size.ring_tokens)
    for num_tokens in buckets(min(config.max_step_tokens, config.max_sequences * longest)):
        num_sequences = -(-num_tokens // longest)
        sizes = [num_tokens // num_sequences + (i < num_tokens % num_sequences) for i in range(num_sequences)]
        _run(engine, [prompts(size) for size in sizes], once)
    engine.reset_prefix_cache()  # pages are nobody's again
    greedy = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=1)  # has drafts; sequences with penalties have none
    for num_sequences in buckets(config.max_sequences):
        for first, rest in ((EVERY_SETTING, EVERY_SETTING), (greedy, greedy), (EVERY_SETTING, greedy)):
            _run(engine, [prompts(1) for _ in range(num_sequences)], first, rest)
        # At the end of a page the entries of every layer are complete, here those of all sequences at once.
        engine.rehearse(min(per_page, context) - 1, [prompts(2)[1] for _ in range(num_sequences)])
    if config.prefix_cache:
        prompt = prompts(min(per_page + 1, context))
        for _ in range(2):  # the second finds what the first left: rings are copied to and from snapshots
            _run(engine, [prompt], once)
        engine.reset_prefix_cache()
    engine.reset_counters()


def _run(
    engine: Engine, prompts: Sequence[list[int]], first: SamplingParams, rest: SamplingParams | None = None
) -> None:
    """Run prompts together, to their end; the first with other parameters than the rest."""
    for index, ids in enumerate(prompts):
        engine.add(f"warm-up {index}", ids, rest if index and rest is not None else first)
    while engine.has_work():
        for output in engine.step():
            if output.error is not None:  # not a request's trouble yet: the engine cannot be got ready
                raise output.error


def _prompts(model: BatchModel) -> Callable[[int], list[int]]:
    """Return a function that makes a prompt of some length: never the same one, all over the vocabulary, BOS first."""
    numbers = itertools.count(104729, 7919)

    def prompt(num_tokens: int) -> list[int]:
        ids = [number % model.config.vocab_size for number in itertools.islice(numbers, num_tokens)]
        if model.config.bos_token_id is not None:
            ids[0] = model.config.bos_token_id
        return ids

    return prompt


def explain(model: BatchModel) -> str:
    """Return what was loaded for a model, from where and how long it took, and what was converted, as text."""
    return "\n".join([dispatch.explain(model.device), *model.conversions])


def describe(model: BatchModel) -> dict[str, Any]:
    """Return `explain` as data."""
    kernels = dispatch.ledger(model.device)
    said = dispatch.explain(model.device).splitlines()[-1]  # how many for which architecture, sealed or not
    return {"summary": said, "ledger": kernels, "conversions": list(model.conversions)}
