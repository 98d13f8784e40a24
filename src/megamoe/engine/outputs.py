# SPDX-License-Identifier: Apache-2.0
"""What the engine hands back: new tokens per request, its counters, and its refusal when it is full."""

from __future__ import annotations

import dataclasses
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one generated token, under the model's own distribution (before any sampling parameter).

    Attributes:
        token_id: the token that was chosen.
        logprob: its natural log-probability.
        top: the most probable tokens as (token id, log-probability), most probable first; as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step gave one request.

    Attributes:
        request_id: the request.
        token_ids: new tokens, one or more (several when drafts were right); none with max_tokens 0, or when a filter
            allows nothing more.
        logprobs: one per new token, or None where none were asked for.
        finish_reason: None while it goes on; "stop" (the last token is an end-of-sequence or stop id), "length"
            (max_tokens or the longest sequence is reached), "error" (see `error`) or "abort" (never from `Engine.step`:
            an aborted request has no output).
        prompt_tokens: tokens of the prompt.
        cached_tokens: how many of them came from another request's pages instead of being computed.
        error: what ended the request with "error"; it has no tokens in this step then.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    error: Exception | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters of an engine. Gauges tell the present, all others count since the engine was made.

    Attributes:
        waiting: gauge, requests without a ring.
        running: gauge, requests with one.
        pages_used: gauge, pages that sequences hold (pages kept only for reuse are free to take).
        pages_cached: gauge, pages kept for reuse, held by a sequence or not.
        pages_total: pages in all.
        prefix_query_tokens: prompt tokens looked up for reuse (again after a preemption before the first token).
        prefix_hit_tokens: prompt tokens that were reused.
        draft_tokens: draft tokens checked.
        accepted_tokens: draft tokens that were right.
        preemptions: times a sequence gave back its pages to be computed again later.
        steps: steps that ran the model.
        prompt_tokens: prompt tokens computed (reused ones excepted; again after a preemption).
        generated_tokens: tokens handed out.
        finished: requests that ended with "stop" or "length".
        aborted: requests that were aborted.
        failed: requests that an error ended.
    """

    waiting: int
    running: int
    pages_used: int
    pages_cached: int
    pages_total: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    draft_tokens: int
    accepted_tokens: int
    preemptions: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    finished: int
    aborted: int
    failed: int

    @property
    def acceptance_rate(self) -> float:
        """Share of draft tokens that were right; 0.0 before the first."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        """Share of prompt tokens that were reused; 0.0 before the first."""
        return self.prefix_hit_tokens / self.prefix_query_tokens if self.prefix_query_tokens else 0.0


class QueueFull(RuntimeError):  # noqa: N818 - a condition, not a mistake
    """No more requests can wait; nothing was changed.

    Attributes:
        retry_after_s: when a place will probably be free, in seconds, at least 1.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        """Keep the message and the time to wait."""
        super().__init__(message)
        self.retry_after_s = retry_after_s
