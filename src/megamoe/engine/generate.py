# SPDX-License-Identifier: Apache-2.0
"""Generate from prompts that are all there: a loop around an engine.

A token is sampled from the logits of the position before it, so the last token of a sequence is never fed: a context of
P places yields up to P - num_prompt + 1 new tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from megamoe.engine.config import EngineConfig
from megamoe.engine.engine import Engine
from megamoe.engine.model import BatchModel
from megamoe.engine.outputs import FinishReason, TokenLogprobs
from megamoe.engine.request import NewRequest
from megamoe.engine.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class GeneratedToken:
    """One new token.

    Attributes:
        token_id: its id.
        finish_reason: None, or why it is the last one: "stop" (it is an end-of-sequence or stop id) or "length"
            (`max_tokens` or the context is reached).
        prompt_idx: the prompt it follows.
        logprobs: its log-probability and the alternatives, or None where none were asked for.
    """

    token_id: int
    finish_reason: FinishReason | None
    prompt_idx: int = 0
    logprobs: TokenLogprobs | None = None


def generate_tokens(
    model: BatchModel, prompt_ids: Sequence[int], params: SamplingParams, config: EngineConfig | None = None
) -> Iterator[GeneratedToken]:
    """Yield the tokens that follow a prompt.

    Args:
        model: a loaded model.
        prompt_ids: at least one id; begins with the model's BOS id if it has one.
        params: sampling and when to stop. `max_tokens` 0 yields nothing.
        config: of the engine; by default one whose caches hold exactly this sequence.

    Raises:
        ValueError: the prompt is empty, holds an id outside the vocabulary, or is longer than the context.
    """
    return generate_batch(model, [prompt_ids], params, config)


def generate_batch(
    model: BatchModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    config: EngineConfig | None = None,
) -> Iterator[GeneratedToken]:
    """Yield the tokens that follow several prompts, as they come; those of one prompt in order.

    Args:
        model: a loaded model.
        prompts: as in `generate_tokens`, any number.
        params: for every prompt alike, or one for each; each prompt draws its own numbers, so its tokens do not
            depend on the others.
        config: of the engine; by default one whose caches fit these prompts.

    Raises:
        ValueError: as in `generate_tokens`, before any token is generated, or not one of `params` for each prompt.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise ValueError(
            f"generate: {len(each)} sampling parameters for {len(prompts)} prompts. Pass one for all, or one for each."
        )
    if not prompts:
        return iter(())
    engine = Engine(model, config or config_for(model, prompts, each))
    engine.add_all([NewRequest(str(idx), ids, one) for idx, (ids, one) in enumerate(zip(prompts, each, strict=True))])
    return _run(engine)


def config_for(model: BatchModel, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> EngineConfig:
    """Return a configuration whose caches hold these prompts, eight at a time, and nothing for later ones."""
    context = model.config.max_position_embeddings
    pairs = zip(prompts, params, strict=True)
    longest = max(1, *(min(len(ids) + max(one.max_tokens - 1, 0), context) for ids, one in pairs))
    num_sequences = min(len(prompts), 8)
    return EngineConfig(
        max_sequences=num_sequences,
        max_waiting=len(prompts),
        num_pages=num_sequences * -(-longest // model.tokens_per_page),
        prefix_cache=False,
    )


def _run(engine: Engine) -> Iterator[GeneratedToken]:
    while engine.has_work():
        for output in engine.step():
            if output.error is not None:
                raise output.error
            last = len(output.token_ids) - 1
            for place, token_id in enumerate(output.token_ids):
                reason = output.finish_reason if place == last else None
                logprobs = None if output.logprobs is None else output.logprobs[place]
                yield GeneratedToken(token_id, reason, int(output.request_id), logprobs)
