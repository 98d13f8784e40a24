# SPDX-License-Identifier: Apache-2.0
"""The sequences of one HTTP request: submitted together, merged into one order of arrival, given up together."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Generic, TypeVar

from megamoe.engine.outputs import QueueFull
from megamoe.server.errors import ApiError
from megamoe.server.metrics import Metrics
from megamoe.text.chat_format import Malformed, Mended
from megamoe.text.service import (
    LOG,
    FilterFailed,
    Piece,
    Request,
    RequestFailed,
    RequestStream,
    RequestTimeout,
    Service,
    ServiceStopped,
)

T = TypeVar("T")
ServiceError = (ValueError, QueueFull, RequestTimeout, ServiceStopped, FilterFailed, RequestFailed)


def as_api_error(error: Exception) -> ApiError:
    """Return what a client is told about an error of the service."""
    if isinstance(error, QueueFull):
        wait = str(max(1, math.ceil(error.retry_after_s)))
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": wait})
    if isinstance(error, RequestTimeout):
        return ApiError(408, str(error), code="request_timeout", headers={"x-should-retry": "false"})
    if isinstance(error, ServiceStopped):
        return ApiError(503, str(error), code="shutting_down", headers={"Retry-After": "5"})
    if isinstance(error, RequestFailed):
        return ApiError(500, str(error), code="internal_error", headers={"x-should-retry": "false"})
    if isinstance(error, FilterFailed):
        return ApiError(400, f"The answer's grammar is too complex: {error}", code="grammar_failed")
    return ApiError(400, str(error), code="invalid_value")


class Generation(Generic[T]):
    """Several sequences that answer one request.

    Attributes:
        num_tokens: tokens of the pieces given out so far, per sequence.
    """

    def __init__(self, service: Service, metrics: Metrics, requests: Sequence[Request[T]], *, arrival: float) -> None:
        self._service = service
        self._metrics = metrics
        self._requests = requests
        self._arrival = arrival
        self._streams: list[RequestStream[T]] = []
        self.num_tokens = [0] * len(requests)
        self._has_begun = [False] * len(requests)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the first sequence found in the cache; the others would find them because of it."""
        return self._streams[0].cached_tokens if self._streams else 0

    async def start(self) -> None:
        """Submit all sequences; whoever made this object calls `cancel` in the end, whatever happens.

        Raises:
            ApiError: the engine refuses one of them.
        """
        try:
            self._streams = await self._service.submit_all(self._requests)
        except ServiceError as error:
            raise as_api_error(error) from error

    def report(self, event: Malformed | Mended) -> None:
        """Log and count what a model wrote that does not follow the grammar of tool calls.

        What was written is the client's and not logged.
        """
        request_id = self._streams[0].request_id if self._streams else "?"
        if isinstance(event, Malformed):
            LOG.warning("request %s: malformed tool call, %s: %s", request_id, event.fault.value, event.detail)
            self._metrics.malformed_calls.labels(event.fault.value).inc()
        else:
            LOG.info("request %s: tool call read in spite of %s: %s", request_id, event.slip.value, event.detail)
            self._metrics.mended_calls.labels(event.slip.value).inc()

    def cancel(self) -> None:
        """Give up what has not ended."""
        for stream in self._streams:
            stream.cancel()

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece[T]], None]:
        """Yield the pieces of all sequences as they come, each with its sequence's index.

        Closing this generator, or an error in one sequence, gives all of them up.

        Raises:
            ApiError: a sequence cannot be completed.
        """
        merged: asyncio.Queue[tuple[int, Piece[T] | ApiError]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._follow(idx, stream, merged)) for idx, stream in enumerate(self._streams)]
        num_open = len(tasks)
        try:
            while num_open:
                idx, piece = await merged.get()
                if isinstance(piece, ApiError):
                    raise piece
                if piece.finish_reason is not None:
                    num_open -= 1
                self.num_tokens[idx] += len(piece.token_ids)
                yield idx, piece
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(
        self, idx: int, stream: RequestStream[T], merged: asyncio.Queue[tuple[int, Piece[T] | ApiError]]
    ) -> None:
        last = self._arrival
        try:
            async for piece in stream:
                now = time.monotonic()
                self._observe(idx, piece, now - last)
                last = now
                merged.put_nowait((idx, piece))
        except ServiceError as error:
            merged.put_nowait((idx, as_api_error(error)))

    def _observe(self, idx: int, piece: Piece[T], seconds: float) -> None:
        new = len(piece.token_ids)
        if new and not self._has_begun[idx]:
            self._has_begun[idx] = True
            self._metrics.first_token_s.observe(seconds)
        else:
            for _ in range(new):  # of a step that brought several tokens, each took its share
                self._metrics.token_s.observe(seconds / new)
        if piece.finish_reason is not None:
            self._metrics.finished.labels(piece.finish_reason).inc()
