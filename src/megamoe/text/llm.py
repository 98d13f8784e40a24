# SPDX-License-Identifier: Apache-2.0
"""LLM: prompts in, text out, in one process without a server.

    llm = LLM("tiny", recipe="w4a16")
    for completion in llm.generate(["def ", "class "], SamplingParams(max_tokens=32)):
        print(completion.text)

A prompt is completed as it is: BOS is put before it and nothing else is added. An empty prompt is BOS alone, so the
model writes the beginning of a document.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Self

import torch

from megamoe.engine.generate import GeneratedToken, generate_batch, generate_tokens
from megamoe.engine.model import BatchModel, load_model
from megamoe.engine.outputs import FinishReason
from megamoe.engine.sampling_params import SamplingParams
from megamoe.engine.warm_up import explain, warm_up_model
from megamoe.text.detokenizer import Detokenizer
from megamoe.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed one prompt.

    Attributes:
        text: the generated text, without special tokens.
        token_ids: the generated ids, the stop id included where there was one.
        prompt_tokens: number of prompt tokens, BOS included.
        finish_reason: "stop" (an end-of-sequence or stop id) or "length" (`max_tokens` or the context reached).
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason


@dataclasses.dataclass(frozen=True)
class TextPiece:
    """What one more token added.

    Attributes:
        text: new text, possibly empty; the last piece brings everything held back.
        token_id: the token.
        finish_reason: None, or why this is the last piece.
    """

    text: str
    token_id: int
    finish_reason: FinishReason | None


class LLM:
    """A model with its tokenizer.

    Attributes:
        model: the loaded model.
        tokenizer: its tokenizer.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "tiny",
        *,
        recipe: str = "w4a16",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        pack: str | os.PathLike[str] | None = None,
        accept: Iterable[str] = (),
    ) -> None:
        """Load a model and get it ready; arguments and errors are those of `megamoe.load` and of `Tokenizer`.

        On a CUDA device all kernels are loaded, run once at every batch size and sealed before this returns
        (engine/warm_up.py); one that is asked for later raises.
        """
        self._set(load_model(model, recipe=recipe, device=device, dtype=dtype, pack=pack, accept=accept))

    @classmethod
    def from_model(cls, model: BatchModel) -> Self:
        """Return an LLM around a model that is loaded already; the tokenizer is read from `model.directory`."""
        llm = cls.__new__(cls)
        llm._set(model)
        return llm

    def _set(self, model: BatchModel) -> None:
        self.model = model
        self.tokenizer = Tokenizer(model.directory)
        if self.tokenizer.num_tokens > model.config.vocab_size:
            raise ValueError(
                f"tokenizer: {self.tokenizer.path} has ids up to {self.tokenizer.num_tokens - 1}, but model "
                f"{model.name!r} has {model.config.vocab_size} ids. Use the tokenizer.json that belongs to the weights."
            )
        warm_up_model(model)

    def explain(self) -> str:
        """Return the ledger: every kernel that was loaded, its key, the seconds and where it came from."""
        return explain(self.model)

    def encode(self, prompt: str) -> list[int]:
        """Return the ids the model reads for a prompt: BOS, then the text.

        Raises:
            ValueError: the prompt is not valid Unicode.
        """
        bos = self.model.config.bos_token_id
        return [*([] if bos is None else [bos]), *self.tokenizer.encode(prompt)]

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[TextPiece]:
        """Yield text as it is generated, one piece per token.

        Args:
            prompt_ids: from `encode`.
            params: sampling and when to stop.

        Raises:
            ValueError: the prompt does not fit the model, see `megamoe.engine.generate`.
        """
        return self._pieces(generate_tokens(self.model, prompt_ids, params))

    def _pieces(self, tokens: Iterator[GeneratedToken]) -> Iterator[TextPiece]:
        detokenizer = Detokenizer(self.tokenizer)
        for token in tokens:
            text = detokenizer.add(token.token_id)
            if token.finish_reason is not None:
                text += detokenizer.finish()
            yield TextPiece(text, token.token_id, token.finish_reason)

    def generate(self, prompts: str | Sequence[str], params: SamplingParams | None = None) -> list[Completion]:
        """Complete prompts, several at a time.

        Args:
            prompts: one or more texts.
            params: for every prompt alike; each prompt draws from its own generator, so its completion does not
                depend on the others. Default: greedy.

        Returns:
            One completion per prompt, in order.

        Raises:
            ValueError: a prompt is not valid Unicode or longer than the context; nothing has been generated then.
        """
        params = params or SamplingParams()
        all_ids = [self.encode(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        tokens: list[list[GeneratedToken]] = [[] for _ in all_ids]
        for token in generate_batch(self.model, all_ids, params):  # checks every prompt before the first token
            tokens[token.prompt_idx].append(token)
        streams = [self._pieces(iter(found)) for found in tokens]
        return [_complete(len(ids), pieces) for ids, pieces in zip(all_ids, streams, strict=True)]


def _complete(prompt_tokens: int, stream: Iterator[TextPiece]) -> Completion:
    pieces = list(stream)
    return Completion(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(piece.token_id for piece in pieces),
        prompt_tokens=prompt_tokens,
        finish_reason=(pieces[-1].finish_reason if pieces else None) or "length",  # max_tokens 0 has no last piece
    )
