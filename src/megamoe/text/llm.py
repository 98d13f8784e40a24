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
from typing import Any, Self

import torch

from megamoe.engine.generate import GeneratedToken, generate_batch, generate_tokens
from megamoe.engine.model import BatchModel, load_model, model_directory
from megamoe.engine.outputs import FinishReason, TokenLogprobs
from megamoe.engine.sampling_params import SamplingParams
from megamoe.engine.warm_up import explain, warm_up_model
from megamoe.text.detokenizer import Detokenizer
from megamoe.text.tokenizer import FILE_NAME, Tokenizer, check_tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed one prompt.

    Attributes:
        text: the generated text, without special tokens.
        token_ids: the generated ids, the stop id included where there was one.
        prompt_tokens: number of prompt tokens, BOS included.
        finish_reason: "stop" (an end-of-sequence or stop id) or "length" (`max_tokens` or the context reached).
        logprobs: per generated id, or None where `SamplingParams.logprobs` did not ask for them.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclasses.dataclass(frozen=True)
class TextPiece:
    """What one more token added.

    Attributes:
        text: new text, possibly empty; the last piece brings everything held back.
        token_id: the token.
        finish_reason: None, or why this is the last piece.
        logprobs: of the token, or None where none were asked for.
    """

    text: str
    token_id: int
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None


class LLM:
    """A model with its tokenizer.

    Attributes:
        model: the loaded model.
        ready_seconds: phase of loading and getting ready → how long it took.
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
        load_format: str = "safetensors",
        num_layers: int | None = None,
    ) -> None:
        """Load a model and get it ready; arguments and errors are those of `megamoe.load` and of `Tokenizer`.

        A model of dummy weights needs no tokenizer.json: without one, prompts are token ids, and completions have no
        text.

        On a CUDA device all kernels are loaded, run once at every batch size and sealed before this returns
        (engine/warm_up.py); one that is asked for later raises.
        """
        directory = model_directory(model, load_format)
        if load_format != "dummy":
            check_tokenizer(directory)  # before the weights, which take minutes
        loaded = load_model(
            model,
            recipe=recipe,
            device=device,
            dtype=dtype,
            pack=pack,
            accept=accept,
            load_format=load_format,
            num_layers=num_layers,
        )
        self._set(loaded, has_tokenizer=load_format != "dummy" or (directory / FILE_NAME).is_file())

    @classmethod
    def from_model(cls, model: BatchModel) -> Self:
        """Return an LLM around a model that is loaded already; the tokenizer is read from `model.directory`."""
        llm = cls.__new__(cls)
        llm._set(model, has_tokenizer=True)
        return llm

    def _set(self, model: BatchModel, *, has_tokenizer: bool) -> None:
        self.model = model
        self._tokenizer = Tokenizer(model.directory) if has_tokenizer else None
        if self._tokenizer is not None and self._tokenizer.num_tokens > model.config.vocab_size:
            raise ValueError(
                f"tokenizer: {self._tokenizer.path} has ids up to {self._tokenizer.num_tokens - 1}, but model "
                f"{model.name!r} has {model.config.vocab_size} ids. Use the tokenizer.json that belongs to the weights."
            )
        self.ready_seconds = {**model.load_seconds, "warm-up": warm_up_model(model)}

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ValueError: it has none, which a model of dummy weights may.
        """
        if self._tokenizer is None:
            raise ValueError(
                f"tokenizer: model {self.model.name!r} was made without {FILE_NAME}, so there is no text. Pass token "
                f"ids, or put a {FILE_NAME} beside its config.json."
            )
        return self._tokenizer

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
        detokenizer = None if self._tokenizer is None else Detokenizer(self._tokenizer)
        for token in tokens:
            text = "" if detokenizer is None else detokenizer.add(token.token_id)
            if detokenizer is not None and token.finish_reason is not None:
                text += detokenizer.finish()
            yield TextPiece(text, token.token_id, token.finish_reason, token.logprobs)

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete prompts, several at a time.

        Args:
            prompts: one or more, each a text or token ids. BOS is put before a text, ids are taken as they are.
            params: for every prompt alike, or one for each; each prompt draws from its own generator, so its completion
                does not depend on the others. Default: greedy.

        Returns:
            One completion per prompt, in order.

        Raises:
            TypeError: a prompt is neither text nor integers.
            ValueError: a prompt is not valid Unicode or longer than the context, or there is not one of `params` for
                each; nothing has been generated then.
        """
        params = SamplingParams() if params is None else params
        all_ids = [self._ids(prompt) for prompt in _each(prompts)]
        tokens: list[list[GeneratedToken]] = [[] for _ in all_ids]
        for token in generate_batch(self.model, all_ids, params):  # checks every prompt before the first token
            tokens[token.prompt_idx].append(token)
        each = [params] * len(all_ids) if isinstance(params, SamplingParams) else params
        return [
            _complete(len(ids), self._pieces(iter(found)), one.logprobs is not None)
            for ids, found, one in zip(all_ids, tokens, each, strict=True)
        ]

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.encode(prompt)
        ids: list[Any] | None = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, bytes) else None
        if ids is None or not all(type(one) is int for one in ids):
            raise TypeError(f"generate: a prompt must be text or a sequence of token ids; got {prompt!r:.100}.")
        return ids


def _each(prompts: str | Sequence[int] | Sequence[str | Sequence[int]]) -> list[str | Sequence[int]]:
    """Return the prompts as a list: a text or a sequence of integers is one prompt."""
    if isinstance(prompts, str | bytes):  # bytes are refused as a prompt, not read as ids
        return [prompts]
    several: list[Any] = list(prompts)
    return [several] if several and all(type(one) is int for one in several) else several


def _complete(prompt_tokens: int, stream: Iterator[TextPiece], has_logprobs: bool) -> Completion:
    pieces = list(stream)
    return Completion(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(piece.token_id for piece in pieces),
        prompt_tokens=prompt_tokens,
        finish_reason=(pieces[-1].finish_reason if pieces else None) or "length",  # max_tokens 0 has no last piece
        logprobs=tuple(piece.logprobs for piece in pieces if piece.logprobs is not None) if has_logprobs else None,
    )
