# SPDX-License-Identifier: Apache-2.0
"""Server-sent events, and ending work when the client has gone.

ASGI tells of a lost connection through `receive`, not through `send`: whoever does not listen generates for nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from megamoe.server.errors import ApiError, encode_json

T = TypeVar("T")
KEEP_ALIVE_S = 15.0  # below the idle limits of common proxies


class ClientGone(Exception):
    """The client closed the connection before it had its answer."""


class EventStream(Response):
    """Sends JSON objects as server-sent events, `data: [DONE]` at the end.

    While nothing happens, a comment is sent now and then, so that proxies keep the connection. When the client leaves,
    `events` is closed at once: its `finally` is where work is given up. Sending may take no longer than `timeout_s`
    in all, so that a client which stops reading cannot hold a connection for ever.

    `on_end` is called once in any case, `on_disconnect` before it when the client left.

    An `ApiError` from `events` ends the stream with one event that holds it, without `[DONE]`.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any], None],
        *,
        timeout_s: float,
        on_end: Callable[[], None],
        on_disconnect: Callable[[], None],
    ) -> None:
        super().__init__(None, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._timeout_s = timeout_s
        self._on_end = on_end
        self._on_disconnect = on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or stop when the client leaves."""
        sending = asyncio.create_task(self._send_all(send))
        leaving = asyncio.create_task(_disconnected(receive))
        is_complete = False
        try:
            await asyncio.wait((sending, leaving), timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
            is_complete = sending.done()
        finally:
            try:
                await _end(leaving)
                error = await _end(sending)
            finally:
                if not is_complete:
                    self._on_disconnect()
                self._on_end()
        if error is not None and not isinstance(error, OSError):  # OSError: the client left while we sent
            raise error

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(_with_pauses(self._events)) as events:
            try:
                async for event in events:
                    await _send(send, b": waiting\n\n" if event is None else b"data: " + encode_json(event) + b"\n\n")
                await _send(send, b"data: [DONE]\n\n")
            except ApiError as error:
                await _send(send, b"data: " + encode_json(error.body()) + b"\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _with_pauses(events: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[dict[str, Any] | None, None]:
    """Yield the events, and None whenever there was none for a while."""
    following: asyncio.Future[dict[str, Any]] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(_next(events))
            await asyncio.wait((following,), timeout=KEEP_ALIVE_S)
            if not following.done():
                yield None
                continue
            try:
                event = following.result()
            except _EndOfEvents:
                return
            following = None
            yield event
    finally:
        if following is not None:
            await _end(following)
        await events.aclose()


async def _end(task: asyncio.Future[Any]) -> BaseException | None:
    """Cancel a task, wait until it has ended in whatever way, and return its error; cancellation is none."""
    task.cancel()
    results = await asyncio.gather(task, return_exceptions=True)
    error: Any = results[0]
    return error if isinstance(error, BaseException) and not isinstance(error, asyncio.CancelledError) else None


class _EndOfEvents(Exception):
    """StopAsyncIteration cannot pass through a future."""


async def _next(events: AsyncIterator[T]) -> T:
    try:
        return await anext(events)
    except StopAsyncIteration:
        raise _EndOfEvents from None


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, which is cancelled when the client leaves.

    Raises:
        ClientGone: the client left first; nobody is there to read an answer.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        await _end(leaving)
        await _end(working)
