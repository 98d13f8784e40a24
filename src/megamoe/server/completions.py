# SPDX-License-Identifier: Apache-2.0
"""POST /v1/completions: text in, text out, nothing added but BOS."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from megamoe.engine.outputs import TokenLogprobs
from megamoe.server.errors import ApiError
from megamoe.server.generation import Generation
from megamoe.server.prepare import (
    check_common,
    check_ids,
    check_model,
    max_new_tokens,
    num_choices,
    sampling_params,
    stop_strings,
)
from megamoe.server.protocol import (
    CompletionAnswer,
    CompletionChoice,
    CompletionDetails,
    CompletionLogprobs,
    CompletionRequest,
    PromptDetails,
    StreamOptions,
    Usage,
)
from megamoe.server.settings import ServerSettings
from megamoe.text.prompts import PromptEncoder
from megamoe.text.service import Piece, Request
from megamoe.text.stop import TextStream
from megamoe.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class Completion:
    """One request to /v1/completions, checked and tokenized."""

    def __init__(
        self, request: CompletionRequest, encoder: PromptEncoder, settings: ServerSettings, fingerprint: str
    ) -> None:
        """Check and tokenize; may take a while for a long prompt.

        Raises:
            ApiError: naming the field that cannot be served.
        """
        check_model(request, settings)
        check_common(request)
        if request.echo and request.logprobs is not None:
            raise ApiError(
                400,
                "echo together with logprobs is not supported: prompt tokens have no log-probabilities here. "
                "Leave one of them out.",
                param="echo",
                code="unsupported_parameter",
            )
        prompts = _prompts(request)
        n = num_choices(request, len(prompts), settings)
        if request.best_of is not None and request.best_of != n:
            raise ApiError(
                400,
                f"best_of must equal n; got {request.best_of} and {n}. Ask for n choices and choose among them.",
                param="best_of",
                code="unsupported_parameter",
            )
        self._request = request
        self._settings = settings
        self._tokenizer = encoder.tokenizer
        self._n = n
        self._head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": settings.model_name,
            "system_fingerprint": fingerprint,
        }
        self._prompt_ids: list[list[int]] = []
        self._echoes: list[str] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                try:
                    ids = encoder.encode(prompt)
                except ValueError as error:
                    raise ApiError(400, str(error), param="prompt", code="invalid_value") from error
                self._echoes.append(prompt)
            else:
                check_ids(prompt, encoder.vocab_size, "prompt")
                ids = list(prompt)
                self._echoes.append(encoder.tokenizer.decode(ids))
            self._prompt_ids.append(ids)
        self.requests: list[Request[str]] = []
        for ids in self._prompt_ids:
            limit = max_new_tokens(request.max_tokens, DEFAULT_MAX_TOKENS, len(ids), settings, prompt_param="prompt")
            for choice in range(n):
                params = sampling_params(
                    request,
                    max_tokens=limit,
                    logprobs=request.logprobs,
                    choice=choice,
                    vocab_size=encoder.vocab_size,
                )
                reader = TextStream(encoder.tokenizer, stop_strings(request), min_tokens=request.min_tokens or 0)
                self.requests.append(Request(ids, params, reader, timeout_s=settings.request_timeout_s))

    async def answer(self, generation: Generation[str]) -> dict[str, Any]:
        """Return the whole answer."""
        builders = self._builders()
        texts = [self._echo(idx) for idx in range(len(builders))]
        logprobs: list[list[CompletionLogprobs]] = [[] for _ in builders]
        reasons: list[Any] = [None] * len(builders)
        async for idx, piece in generation.pieces():
            texts[idx] += piece.read + (piece.rest or "")
            part = builders[idx].logprobs(piece)
            if part is not None:
                logprobs[idx].append(part)
            reasons[idx] = piece.finish_reason
        choices = [
            CompletionChoice(
                index=idx,
                text=texts[idx],
                logprobs=None if self._request.logprobs is None else _join(logprobs[idx]),
                finish_reason=reasons[idx],
            )
            for idx in range(len(builders))
        ]
        answer = CompletionAnswer(**self._head, choices=choices, usage=self._usage(generation))
        return answer.model_dump(mode="json", exclude_unset=True)

    async def events(self, generation: Generation[str]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the answer's chunks."""
        builders = self._builders()
        stats = StreamUsage(self._request.stream_options, lambda: self._usage(generation))
        for idx in range(len(builders)):
            if self._request.echo:
                first = CompletionChoice(index=idx, text=self._echo(idx), logprobs=None, finish_reason=None)
                yield self._chunk([first], stats.of_chunk())
        pieces = generation.pieces()
        try:
            async for idx, piece in pieces:
                part = builders[idx].logprobs(piece)
                text = piece.read + (piece.rest or "")
                if text or part is not None or piece.finish_reason is not None:
                    choice = CompletionChoice(index=idx, text=text, logprobs=part, finish_reason=piece.finish_reason)
                    yield self._chunk([choice], stats.of_chunk())
        finally:
            await pieces.aclose()
        if stats.ends_with_usage:
            yield self._chunk([], {"usage": self._usage(generation)})

    def _chunk(self, choices: Sequence[CompletionChoice], usage: dict[str, Any]) -> dict[str, Any]:
        chunk = CompletionAnswer(**self._head, choices=list(choices), **usage)
        return chunk.model_dump(mode="json", exclude_unset=True)

    def _builders(self) -> list[_LogprobsBuilder]:
        return [_LogprobsBuilder(self._tokenizer, len(self._echo(idx))) for idx in range(len(self.requests))]

    def _echo(self, idx: int) -> str:
        return self._echoes[idx // self._n] if self._request.echo else ""

    def _usage(self, generation: Generation[str]) -> Usage:
        return usage(sum(map(len, self._prompt_ids)), sum(generation.num_tokens), generation.cached_tokens, 0)


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int, reasoning_tokens: int) -> Usage:
    """Return the usage object."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=cached_tokens),
        completion_tokens_details=CompletionDetails(reasoning_tokens=reasoning_tokens),
    )


class StreamUsage:
    """What the chunks of a stream say of the usage.

    Attributes:
        ends_with_usage: the last chunk has the usage and no choices.
    """

    def __init__(self, options: StreamOptions | None, count: Callable[[], Usage]) -> None:
        self.ends_with_usage = options is not None and options.include_usage
        self._is_continuous = options is not None and options.continuous_usage_stats
        self._count = count

    def of_chunk(self) -> dict[str, Any]:
        """Return the field `usage` of a chunk with choices: the tokens of all choices so far, null, or no field."""
        if self._is_continuous:
            return {"usage": self._count()}
        return {"usage": None} if self.ends_with_usage else {}


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    ids = [one for one in prompt if isinstance(one, int)]
    return [ids] if ids else [one for one in prompt if not isinstance(one, int)]


class _LogprobsBuilder:
    """Turns the engine's logprobs into the parallel lists of this API, counting offsets through one choice."""

    def __init__(self, tokenizer: Tokenizer, offset: int) -> None:
        self._tokenizer = tokenizer
        self._offset = offset

    def logprobs(self, piece: Piece[str]) -> CompletionLogprobs | None:
        if piece.logprobs is None or not piece.logprobs:
            return None
        tokens, offsets = [], []
        for one in piece.logprobs:
            text = token_text(self._tokenizer, one.token_id)
            tokens.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=[one.logprob for one in piece.logprobs],
            top_logprobs=[self._top(one) for one in piece.logprobs],
            text_offset=offsets,
        )

    def _top(self, one: TokenLogprobs) -> dict[str, float]:
        """Several tokens may spell the same text, as bytes that are no character do: the likeliest is shown."""
        top: dict[str, float] = {}
        for token_id, logprob in one.top:
            top.setdefault(token_text(self._tokenizer, token_id), logprob)
        return top


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token as text; bytes that are no whole characters are shown as U+FFFD."""
    return tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")


def _join(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[token for part in parts for token in part.tokens],
        token_logprobs=[value for part in parts for value in part.token_logprobs],
        top_logprobs=[top for part in parts for top in part.top_logprobs or []],
        text_offset=[offset for part in parts for offset in part.text_offset],
    )
