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
from megamoe.text.service import (
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
        num_tokens: tokens generated so far, per sequence.
    """

    def __init__(self, service: Service, metrics: Metrics, requests: Sequence[Request[T]], *, arrival: float) -> None:
        self._service = service
        self._metrics = metrics
        self._requests = requests
        self._arrival = arrival
        self._streams: list[RequestStream[T]] = []
        self.num_tokens = [0] * len(requests)

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
        if new and self.num_tokens[idx] == 0:
            self._metrics.first_token_s.observe(seconds)
        else:
            for _ in range(new):  # of a step that brought several tokens, each took its share
                self._metrics.token_s.observe(seconds / new)
        self.num_tokens[idx] += new
        if piece.finish_reason is not None:
            self._metrics.finished.labels(piece.finish_reason).inc()
