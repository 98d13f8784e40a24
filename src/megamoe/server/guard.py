# SPDX-License-Identifier: Apache-2.0
"""What a request must pass before its body is read into objects: number of open requests, key, size of the body.

These are ASGI middlewares, because a limit that is checked after reading is none.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac

from prometheus_client import Gauge
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megamoe.server.errors import ApiError

API_PREFIX = "/v1/"
MODELS_PREFIX = "/v1/models/"


class OpenRequests:
    """Refuses API requests above a number that are open at the same time, and counts them.

    A request is open from its first line: those whose bodies have not arrived hold connections as well. Looking at the
    list of models is not limited, so that a client can always see whether there is a server.
    """

    def __init__(self, app: ASGIApp, *, limit: int, gauge: Gauge) -> None:
        self._app = app
        self._limit = limit
        self._gauge = gauge
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 429."""
        path = scope.get("path", "")
        if scope["type"] != "http" or not path.startswith(API_PREFIX) or f"{path}/".startswith(MODELS_PREFIX):
            await self._app(scope, receive, send)
            return
        if self._num_open >= self._limit:
            error = ApiError(
                429,
                f"{self._num_open} requests are open; the limit of this server is {self._limit}. Try again later.",
                code="too_many_requests",
                headers={"Retry-After": "1"},
            )
            await error.response()(scope, receive, send)
            return
        self._num_open += 1
        self._gauge.inc()
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_open -= 1
            self._gauge.dec()


class ApiKey:
    """Asks for `Authorization: Bearer <key>` below /v1/."""

    def __init__(self, app: ASGIApp, *, key: str) -> None:
        self._app = app
        self._digest = _digest(key.encode("utf-8"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] == "http" and scope["path"].startswith(API_PREFIX) and not self._is_allowed(scope):
            error = ApiError(
                401,
                "The API key is missing or wrong. Send it as 'Authorization: Bearer <key>'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        given = Headers(scope=scope).get("authorization", "")
        scheme, _, key = given.partition(" ")
        # Digests have one length, so the time to compare tells nothing about the key, not even how long it is.
        is_equal = hmac.compare_digest(_digest(key.strip().encode("utf-8")), self._digest)
        return is_equal and scheme.lower() == "bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class BodyLimit:
    """Refuses bodies above a number of bytes, announced or not, without reading on, and bodies that take too long.

    When the server begins to shut down, nobody waits for the rest of a body any more.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float, ending: asyncio.Event) -> None:
        self._app = app
        self._ending = ending
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 413 or 408."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isascii() and announced.isdigit() and int(announced[:20]) > self._max_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        error: ApiError | None = None
        num_bytes = 0
        is_read = False
        deadline = asyncio.get_running_loop().time() + self._timeout_s

        async def limited_receive() -> Message:
            nonlocal error, num_bytes, is_read
            if is_read:
                return await receive()  # waits for the client to leave
            message = await self._receive(receive, deadline)
            if message is None:
                error = _shutting_down() if self._ending.is_set() else self._too_slow()
                return {"type": "http.disconnect"}
            is_read = message["type"] != "http.request" or not message.get("more_body", False)
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                error = self._too_large()
                return {"type": "http.disconnect"}
            return message

        async def send_unless_refused(message: Message) -> None:
            if error is None:  # else whatever the application answers to half a body is not what happened
                await send(message)

        await self._app(scope, limited_receive, send_unless_refused)
        if error is not None:
            await error.response()(scope, receive, send)

    async def _receive(self, receive: Receive, deadline: float) -> Message | None:
        """Return the next part of a body, or None when it did not come in time or the server ends."""
        loop = asyncio.get_running_loop()
        receiving, ending = asyncio.ensure_future(receive()), asyncio.ensure_future(self._ending.wait())
        try:
            left_s = max(0.0, deadline - loop.time())
            await asyncio.wait((receiving, ending), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            return receiving.result() if receiving.done() else None
        finally:
            for task in (receiving, ending):
                task.cancel()
            await asyncio.gather(receiving, ending, return_exceptions=True)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The body is larger than {self._max_bytes} bytes, the limit of this server. Send a shorter prompt.",
            code="body_too_large",
            headers={"Connection": "close"},
        )

    def _too_slow(self) -> ApiError:
        return ApiError(
            408,
            f"The body did not arrive within {self._timeout_s:g} s. Send it faster.",
            code="body_timeout",
            headers={"Connection": "close"},
        )


def _shutting_down() -> ApiError:
    return ApiError(
        503,
        "The server is shutting down, and the body had not arrived.",
        code="shutting_down",
        headers={"Retry-After": "5", "Connection": "close"},
    )
