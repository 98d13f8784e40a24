# SPDX-License-Identifier: Apache-2.0
"""Generate one sequence: prefill the prompt, then sample and feed back one token at a time.

A token is sampled from the logits of the position before it, so the last token of a sequence is never fed: a cache of P
places yields up to P - num_prompt + 1 new tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from megamoe.engine.model import LanguageModel
from megamoe.engine.sampling_params import SamplingParams
from megamoe.ops.sample import sample

FinishReason = Literal["stop", "length"]

# A prompt is fed in parts, because logits exist for every fed token: 512 x 129,280 x 4 bytes is 265 MB.
PREFILL_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class GeneratedToken:
    """One new token.

    Attributes:
        token_id: its id.
        finish_reason: None, or why it is the last one: "stop" (it is an end-of-sequence or stop id) or "length"
            (`max_tokens` or the context is reached).
    """

    token_id: int
    finish_reason: FinishReason | None


def generate_tokens(
    model: LanguageModel, prompt_ids: Sequence[int], params: SamplingParams
) -> Iterator[GeneratedToken]:
    """Yield the tokens that follow a prompt.

    Args:
        model: a loaded model.
        prompt_ids: at least one id; begins with the model's BOS id if it has one.
        params: sampling and when to stop. `max_tokens` 0 yields nothing.

    Raises:
        ValueError: the prompt is empty, holds an id outside the vocabulary, or is longer than the context.
    """
    context = model.config.max_position_embeddings
    if not prompt_ids:
        raise ValueError("prompt: got no token ids; a sequence needs at least one, the BOS id.")
    if len(prompt_ids) > context:
        raise ValueError(
            f"prompt: got {len(prompt_ids)} tokens; the context of model {model.name!r} is {context} tokens. "
            "Shorten the prompt."
        )
    for token_id in prompt_ids:
        if not 0 <= token_id < model.config.vocab_size:
            raise ValueError(
                f"prompt: token ids must be 0 to {model.config.vocab_size - 1}; got {token_id}. "
                "Encode it with this model's tokenizer."
            )
    return _decode(model, prompt_ids, params)


def _decode(model: LanguageModel, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[GeneratedToken]:
    num_new = min(params.max_tokens, model.config.max_position_embeddings - len(prompt_ids) + 1)
    if num_new == 0:
        return
    cache = model.new_cache(max_tokens=len(prompt_ids) + num_new - 1)
    sampler = _Sampler(params, model.device)
    stop_ids = {*model.config.eos_token_ids, *params.stop_token_ids}
    ids = torch.tensor(list(prompt_ids), dtype=torch.int64, device=model.device)
    for num_left in range(num_new, 0, -1):
        for part in ids.split(PREFILL_CHUNK):
            logits = model.step(part, cache)[-1:]  # [1, V] fp32
        token_id = sampler.next_id(logits)
        if token_id in stop_ids:
            yield GeneratedToken(token_id, "stop")
            return
        yield GeneratedToken(token_id, "length" if num_left == 1 else None)
        ids = torch.tensor([token_id], dtype=torch.int64, device=model.device)


class _Sampler:
    """Draws one sequence's tokens: its parameters as tensors, and its own random numbers."""

    def __init__(self, params: SamplingParams, device: torch.device) -> None:
        self.params = params
        self.device = device
        self.temperature = torch.tensor([params.temperature], dtype=torch.float32, device=device)
        self.top_k = torch.tensor([params.top_k], dtype=torch.int64, device=device)
        self.top_p = torch.tensor([params.top_p], dtype=torch.float32, device=device)
        self.zero = torch.zeros(1, dtype=torch.float32, device=device)
        self.generator = torch.Generator()  # on the CPU: the same numbers on every device
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    def next_id(self, logits: torch.Tensor) -> int:
        uniform = self.zero if self.params.is_greedy else torch.rand(1, generator=self.generator).to(self.device)
        ids = sample(logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, uniform=uniform)
        return int(ids[0])
