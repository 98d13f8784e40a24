# SPDX-License-Identifier: Apache-2.0
"""Service: one thread that owns an engine, and any number of asyncio tasks that ask it for text.

Only that thread calls the engine. Tasks hand it commands through a queue that is emptied before every step, so that a
cancelled request has given its pages back before the next step runs. Each request brings a reader, which turns tokens
into what is wanted (text, or the events of a chat) and knows the stop strings; the thread feeds it and hands what came
out to the event loop, once per step for all requests.

    service = Service(engine)
    service.start()                                    # inside a running event loop
    stream = await service.submit(Request(prompt_ids, params, TextStream(tokenizer, ["\\n\\n"])))
    async for piece in stream:
        print(piece.read)
    await service.stop()

An error while something is done for one request is a defect of ours that ends this request: its traceback goes to the
log, and its stream raises `RequestFailed`. One that cannot be traced to a request ends the thread with its traceback,
every open stream raises `ServiceStopped`, and `failed` is set.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

from megamoe.engine.containment import Contained
from megamoe.engine.engine import Engine
from megamoe.engine.outputs import EngineStats, QueueFull, RequestOutput, TokenLogprobs
from megamoe.engine.request import NewRequest
from megamoe.engine.sampling_params import SamplingParams
from megamoe.text.grammar import GrammarFilter

LOG = logging.getLogger("megamoe")
FinishReason: TypeAlias = Literal["stop", "length"]
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class ServiceStopped(Exception):
    """The service ends: it takes no requests, or ended this one early."""


class RequestTimeout(Exception):
    """A request took longer than it was allowed to."""


class FilterFailed(Exception):
    """The grammar of a request could not go on; the request was ended."""


class RequestFailed(Exception):
    """A defect of ours ended this request, and no other; the log has the traceback."""


class Reader(Protocol[T_co]):
    """Turns the tokens of one request into something; `TextStream` and `AnswerStream` are readers."""

    @property
    def num_tokens(self) -> int:
        """How many tokens were read."""
        ...

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the request, or None."""
        ...

    def feed(self, token_ids: Sequence[int]) -> T_co:
        """Read tokens, none beyond a stop string, and return what is certain."""
        ...

    def finish(self) -> T_co:
        """Return what was held back."""
        ...


@dataclasses.dataclass(frozen=True)
class Request(Generic[T]):
    """What to generate.

    Attributes:
        prompt_ids: tokens of the prompt.
        params: sampling and limits.
        reader: reads the answer; belongs to this request alone, and to the service's thread from now on.
        logits_filter: what tokens a grammar allows; belongs to this request alone.
        timeout_s: ends the request with `RequestTimeout`, waiting included; None waits for ever.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    reader: Reader[T]
    logits_filter: GrammarFilter | None = None
    timeout_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Piece(Generic[T]):
    """What one step added to a request.

    Attributes:
        read: what the reader made of the tokens. Tokens and text need not go together: a character may be incomplete,
            or a part of a stop string held back.
        rest: what the reader had held back; only in the last piece.
        token_ids: the new tokens, up to the one that completed a stop string.
        logprobs: of each token, or None if not asked for.
        finish_reason: None, or why this is the last piece.
    """

    read: T
    rest: T | None
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None


class RequestStream(Generic[T]):
    """The pieces of one request; iterate over it in the event loop that submitted it, and only once.

    Attributes:
        request_id: the engine's name for it.
        prompt_tokens: length of the prompt.
        cached_tokens: how many of them were found in the cache; known with the first piece.
    """

    def __init__(self, request_id: str, request: Request[T], cancel: Callable[[RequestStream[T]], None]) -> None:
        self.request_id = request_id
        self.prompt_tokens = len(request.prompt_ids)
        self.cached_tokens = 0
        self._loop = asyncio.get_running_loop()
        self._accepted: asyncio.Future[None] = self._loop.create_future()
        self._pieces: asyncio.Queue[Piece[T] | Exception] = asyncio.Queue()
        self._cancel = cancel
        self._is_done = False
        self._timer: asyncio.TimerHandle | None = None

    def __aiter__(self) -> AsyncIterator[Piece[T]]:
        return self

    async def __anext__(self) -> Piece[T]:
        if self._is_done and self._pieces.empty():
            raise StopAsyncIteration
        piece = await self._pieces.get()
        if isinstance(piece, Exception):
            raise piece
        return piece

    def cancel(self) -> None:
        """Give up the request: its pages are free before the engine's next step. Harmless when it has ended."""
        if not self._is_done:
            self._end()
            self._cancel(self)

    # Called in the event loop, by the service.

    def _accept(self) -> None:
        if not self._accepted.done():
            self._accepted.set_result(None)

    def _give(self, piece: Piece[T], cached_tokens: int) -> None:
        if self._is_done:  # cancelled while this was on its way
            return
        self.cached_tokens = cached_tokens
        self._pieces.put_nowait(piece)
        if piece.finish_reason is not None:
            self._end()

    def _fail(self, error: Exception) -> None:
        if self._is_done:
            return
        self._end()
        if not self._accepted.done():
            self._accepted.set_exception(error)
        else:
            self._pieces.put_nowait(error)

    def _time_out(self, timeout_s: float) -> None:
        if not self._is_done:
            self._cancel(self)
            self._fail(RequestTimeout(f"The request took longer than {timeout_s:g} s, the limit of this server."))

    def _end(self) -> None:
        self._is_done = True
        if self._timer is not None:
            self._timer.cancel()


@dataclasses.dataclass(frozen=True)
class _Submit:
    streams: Sequence[RequestStream[Any]]
    requests: Sequence[Request[Any]]


@dataclasses.dataclass(frozen=True)
class _Cancel:
    request_id: str


@dataclasses.dataclass(frozen=True)
class _AskStats:
    answer: asyncio.Future[EngineStats]


@dataclasses.dataclass(frozen=True)
class _Stop:
    pass


_Command: TypeAlias = _Submit | _Cancel | _AskStats | _Stop
_Delivery: TypeAlias = Callable[[], None]


@dataclasses.dataclass
class _Running:
    """What the thread keeps of a request."""

    stream: RequestStream[Any]
    request: Request[Any]
    num_read: int = 0


class Service:
    """Answers from an engine, for many at once.

    Attributes:
        failed: set when the engine raised an error; the service is then over.
        failures_in_a_row: requests that an error ended since the last one that ended well.
    """

    def __init__(self, engine: Engine) -> None:
        self.failed = asyncio.Event()
        self.failures_in_a_row = 0
        self._engine = engine
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._running: dict[str, _Running] = {}
        self._deliveries: list[_Delivery] = []
        self._ids = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ended: asyncio.Future[None] | None = None
        self._streams: set[RequestStream[Any]] = set()
        self._is_accepting = False
        self._step_started: float | None = None

    # In the event loop.

    def start(self) -> None:
        """Start the thread. Everything else is then called in the event loop that runs now."""
        assert self._thread is None, "a service starts once"
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="megamoe-engine", daemon=True)
        self._is_accepting = True
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Requests that were submitted and have not ended."""
        return len(self._streams)

    @property
    def step_s(self) -> float:
        """Seconds since the step that runs now began; 0 between steps."""
        started = self._step_started
        return 0.0 if started is None else time.monotonic() - started

    async def submit(self, request: Request[T]) -> RequestStream[T]:
        """Queue a request and return its stream once the engine has taken it; errors are those of `submit_all`."""
        return (await self.submit_all([request]))[0]

    async def submit_all(self, requests: Sequence[Request[T]]) -> list[RequestStream[T]]:
        """Queue requests that belong together and return their streams once the engine has taken all of them.

        They are one command: whoever else submits meanwhile comes before all of them or after all of them, and the
        engine takes all of them or none.

        Raises:
            ValueError: the engine refuses one of them.
            QueueFull: too many requests wait.
            RequestTimeout: they were not even taken in time.
            RequestFailed: the engine failed at taking them.
            ServiceStopped: the service has stopped or stops.
        """
        if not self._is_accepting:
            raise ServiceStopped("The server is shutting down.")
        streams = [RequestStream(f"r{next(self._ids)}", request, self._cancel) for request in requests]
        self._streams.update(streams)
        for stream, request in zip(streams, requests, strict=True):
            if request.timeout_s is not None:
                stream._timer = stream._loop.call_later(request.timeout_s, stream._time_out, request.timeout_s)
        self._commands.put(_Submit(streams, requests))
        is_wanted = False
        try:
            await asyncio.gather(*[stream._accepted for stream in streams])
            is_wanted = True
        finally:
            if not is_wanted:  # whoever waited has gone, perhaps in the moment they were accepted; or they were refused
                for stream in streams:
                    stream.cancel()
        return streams

    async def stats(self) -> EngineStats:
        """Return the engine's numbers, between two steps.

        Raises:
            ServiceStopped: the service has ended.
        """
        if self._ended is None or self._ended.done():
            raise ServiceStopped("The server has stopped.")
        answer: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._commands.put(_AskStats(answer))
        await asyncio.wait((answer, self._ended), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ServiceStopped("The server has stopped.")
        return answer.result()

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for those there are; end them with `ServiceStopped` after `timeout_s`.

        Returns:
            Whether all of them ended by themselves.
        """
        self._is_accepting = False
        deadline = time.monotonic() + timeout_s
        while self._streams and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return self.end_streams("The server is shutting down.") == 0

    def end_streams(self, why: str) -> int:
        """End every open stream with `ServiceStopped` and return how many there were."""
        streams = list(self._streams)
        for stream in streams:
            self._cancel(stream)
            stream._fail(ServiceStopped(why))
        return len(streams)

    async def stop(self) -> None:
        """End every stream, then the thread. Harmless when it has ended."""
        self._is_accepting = False
        self.end_streams("The server is shutting down.")
        if self._ended is not None:
            self._commands.put(_Stop())
            await self._ended
            assert self._thread is not None
            self._thread.join()  # it has said its last word

    def _cancel(self, stream: RequestStream[Any]) -> None:
        self._streams.discard(stream)
        self._commands.put(_Cancel(stream.request_id))

    def _deliver(self, deliveries: Sequence[_Delivery]) -> None:
        for delivery in deliveries:
            delivery()

    def _give(self, stream: RequestStream[Any], piece: Piece[Any], cached_tokens: int) -> None:
        stream._give(piece, cached_tokens)
        if piece.finish_reason is not None:
            self.failures_in_a_row = 0
            self._streams.discard(stream)

    def _fail(self, stream: RequestStream[Any], error: Exception) -> None:
        self.failures_in_a_row += isinstance(error, RequestFailed)
        stream._fail(error)
        self._streams.discard(stream)

    def _thread_ended(self, failed: bool) -> None:
        self._is_accepting = False
        if failed:
            self.failed.set()
        self.end_streams("The engine failed; the server's log says why." if failed else "The server is shutting down.")
        assert self._ended is not None
        if not self._ended.done():
            self._ended.set_result(None)

    # In the thread.

    def _run(self) -> None:
        failed = True
        try:
            while self._obey_commands():
                self._step()
            failed = False
        finally:  # an error goes on to the thread's excepthook, which prints it
            assert self._loop is not None
            self._hand_over()
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._thread_ended, failed)

    def _obey_commands(self) -> bool:
        """Do what was asked since the last step; wait for something if the engine is idle. False means stop."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.has_work())
            except queue.Empty:
                return True
            match command:
                case _Submit():
                    self._add(command.streams, command.requests)
                case _Cancel():
                    self._running.pop(command.request_id, None)
                    self._engine.abort(command.request_id)
                case _AskStats():
                    stats = self._engine.stats()
                    self._deliveries.append(functools.partial(_set, command.answer, stats))
                case _Stop():
                    return False
            self._hand_over()

    def _add(self, streams: Sequence[RequestStream[Any]], requests: Sequence[Request[Any]]) -> None:
        pairs = list(zip(streams, requests, strict=True))
        with Contained() as fault:
            self._engine.add_all(
                [NewRequest(stream.request_id, one.prompt_ids, one.params, one.logits_filter) for stream, one in pairs]
            )
        for stream, request in pairs:
            if fault.error is not None:
                refused = isinstance(fault.error, ValueError | QueueFull)
                error = fault.error if refused else _defect(stream.request_id, fault.error)
                self._deliveries.append(functools.partial(self._fail, stream, error))
            else:
                self._running[stream.request_id] = _Running(stream, request)
                self._deliveries.append(stream._accept)

    def _step(self) -> None:
        self._step_started = time.monotonic()
        for output in self._engine.step():
            running = self._running.get(output.request_id)
            if running is not None:  # else it was cancelled
                self._take(running, output)
        self._step_started = None
        self._hand_over()

    def _take(self, running: _Running, output: RequestOutput) -> None:
        """Turn one step's tokens into a piece; end the request at a stop string, whatever the engine made after it."""
        request, stream = running.request, running.stream
        piece: Piece[Any] | None = None
        if output.error is None:
            with Contained() as fault:
                piece = _read(running, output)
        error = output.error or fault.error
        if request.logits_filter is not None and request.logits_filter.error is not None:
            self._end(running, output, FilterFailed(request.logits_filter.error))
        elif piece is None:
            assert error is not None
            self._end(running, output, _defect(stream.request_id, error))
        else:
            self._deliveries.append(functools.partial(self._give, stream, piece, output.cached_tokens))
            if piece.finish_reason is not None:
                self._end(running, output, None)

    def _end(self, running: _Running, output: RequestOutput, error: Exception | None) -> None:
        del self._running[output.request_id]
        if output.finish_reason is None:
            self._engine.abort(output.request_id)
        if error is not None:
            self._deliveries.append(functools.partial(self._fail, running.stream, error))

    def _hand_over(self) -> None:
        """Pass everything that happened since the last time to the event loop, with one wake-up."""
        if self._deliveries:
            deliveries, self._deliveries = self._deliveries, []
            assert self._loop is not None
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._deliver, deliveries)


def _read(running: _Running, output: RequestOutput) -> Piece[Any]:
    """Let the request's reader read one step's tokens."""
    request, reader, ids = running.request, running.request.reader, output.token_ids
    is_stop_id = output.finish_reason == "stop" and any(i in request.params.stop_token_ids for i in ids[-1:])
    finish_reason: FinishReason | None = None
    read = reader.feed(ids[:-1] if is_stop_id else ids)  # an id that was asked for as a stop is no text
    num_tokens = len(ids)
    if reader.matched_stop is not None:
        finish_reason = "stop"
        num_tokens -= (len(ids) - is_stop_id) - (reader.num_tokens - running.num_read)
    elif output.finish_reason == "stop" or output.finish_reason == "length":
        finish_reason = output.finish_reason
    rest = None if finish_reason is None else reader.finish()
    running.num_read = reader.num_tokens
    logprobs = None if output.logprobs is None else output.logprobs[:num_tokens]
    return Piece(read, rest, ids[:num_tokens], logprobs, finish_reason)


def _defect(request_id: str, error: Exception) -> RequestFailed:
    """Log what ended a request, and return what its stream is told."""
    LOG.error("request %s ended by an error; the others go on", request_id, exc_info=error)
    failed = RequestFailed("The server failed at this request; its log says why.")
    failed.__cause__ = error
    return failed


def _set(answer: asyncio.Future[EngineStats], stats: EngineStats) -> None:
    if not answer.done():
        answer.set_result(stats)
