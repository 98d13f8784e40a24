# SPDX-License-Identifier: Apache-2.0
"""The service: one thread, one engine, many streams. A fake engine stands in for the model."""

from __future__ import annotations

import asyncio
import pathlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from megamoe.engine.outputs import QueueFull
from megamoe.engine.sampling_params import SamplingParams
from megamoe.text.service import Request, RequestFailed, RequestStream, RequestTimeout, Service, ServiceStopped
from megamoe.text.stop import TextStream
from megamoe.text.tokenizer import Tokenizer

from ..server.fakes import FakeEngine, echo_of_prompt


class Setup:
    """An engine, its service, and a way to ask."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.tokenizer = Tokenizer(directory)
        self.engine = FakeEngine(echo_of_prompt)
        self.service = Service(self.engine)

    def request(self, prompt: str = "def", stops: tuple[str, ...] = (), **fields: Any) -> Request[str]:
        params = SamplingParams(**{"max_tokens": 8, **fields.pop("params", {})})
        return Request(self.tokenizer.encode(prompt), params, TextStream(self.tokenizer, stops), **fields)

    async def text(self, stream: RequestStream[str]) -> str:
        return "".join([piece.read + (piece.rest or "") async for piece in stream])

    def expected(self, prompt: str = "def", count: int = 8) -> str:
        return self.tokenizer.decode(echo_of_prompt(self.tokenizer.encode(prompt), SamplingParams())[:count])


@pytest.fixture
def run(tokenizer_directory: pathlib.Path) -> Callable[[Callable[[Setup], Awaitable[None]]], Setup]:
    """Run a test in an event loop with a started service, and stop the service after it."""

    def run(test: Callable[[Setup], Awaitable[None]]) -> Setup:
        setup = Setup(tokenizer_directory)

        async def main() -> None:
            setup.service.start()
            try:
                await asyncio.wait_for(test(setup), 20)
            finally:
                setup.engine.hold.clear()
                await setup.service.stop()

        asyncio.run(main())
        assert not any(thread.name == "megamoe-engine" for thread in threading.enumerate())
        return setup

    return run


def test_a_text(run: Any) -> None:
    async def test(setup: Setup) -> None:
        stream = await setup.service.submit(setup.request())
        pieces = [piece async for piece in stream]
        assert "".join(piece.read + (piece.rest or "") for piece in pieces) == setup.expected()
        assert [piece.finish_reason for piece in pieces] == [None] * 7 + ["length"]
        assert all(piece.rest is None for piece in pieces[:-1]) and pieces[-1].rest is not None
        assert sum(len(piece.token_ids) for piece in pieces) == 8
        assert stream.prompt_tokens == 1 and stream.cached_tokens == 3 and setup.service.num_open == 0

    run(test)


def test_only_the_thread_calls_the_engine(run: Any) -> None:
    async def test(setup: Setup) -> None:
        callers = set()
        for name in ("add_all", "abort", "step", "stats", "has_work"):
            method = getattr(setup.engine, name)

            def noted(*args: Any, method: Any = method, **kwargs: Any) -> Any:
                callers.add(threading.current_thread().name)
                return method(*args, **kwargs)

            setattr(setup.engine, name, noted)
        stream = await setup.service.submit(setup.request())
        await setup.service.stats()
        (await setup.service.submit(setup.request(params={"max_tokens": 20}))).cancel()
        await setup.text(stream)
        await setup.service.stats()
        assert callers == {"megamoe-engine"}

    run(test)


def test_an_idle_service_does_not_spin(run: Any) -> None:
    async def test(setup: Setup) -> None:
        calls = []
        original = setup.engine.has_work
        setup.engine.has_work = lambda: calls.append(1) or original()  # type: ignore[method-assign,func-returns-value]
        await asyncio.sleep(0.3)
        assert len(calls) < 3

    run(test)


def test_cancelling_is_obeyed_before_the_next_step(run: Any) -> None:
    async def test(setup: Setup) -> None:
        setup.engine.delay_s = 0.1
        stream = await setup.service.submit(setup.request(params={"max_tokens": 1000, "ignore_eos": True}))
        await anext(stream)
        steps = setup.engine.steps
        stream.cancel()
        stream.cancel()
        assert (await setup.service.stats()).pages_used == 0
        assert setup.engine.steps <= steps + 1 and setup.engine.aborted == ["r0"]
        assert [piece async for piece in stream] == [], "what was on its way is not given out"

    run(test)


@pytest.mark.parametrize("is_accepted", [False, True])
def test_whoever_gives_up_waiting_is_cancelled(run: Any, is_accepted: bool) -> None:
    """Before the engine has taken the request, and in the moment it has but nobody was told."""

    async def test(setup: Setup) -> None:
        gate = threading.Event()
        original = setup.engine.step
        setup.engine.step = lambda: (gate.wait(10), original())[1]  # type: ignore[method-assign]
        first = await setup.service.submit(setup.request(params={"max_tokens": 20}))
        waiting = asyncio.create_task(setup.service.submit(setup.request()))
        await asyncio.sleep(0)  # it has sent its command
        if is_accepted:
            stream = next(iter(setup.service._streams - {first}))
            stream._accept()
        waiting.cancel()
        assert isinstance((await asyncio.gather(waiting, return_exceptions=True))[0], asyncio.CancelledError)
        assert setup.service.num_open == 1
        gate.set()
        await setup.service.stats()
        assert setup.engine.aborted == ["r1"]
        first.cancel()

    run(test)


def test_refusals_of_the_engine(run: Any) -> None:
    async def test(setup: Setup) -> None:
        bad = Request([9999], SamplingParams(), TextStream(setup.tokenizer))
        with pytest.raises(ValueError, match="bad ids"):
            await setup.service.submit(bad)
        setup.engine.hold.set()
        for _ in range(12):
            await setup.service.submit(setup.request())
        with pytest.raises(QueueFull) as caught:
            await setup.service.submit(setup.request())
        assert caught.value.retry_after_s == 7.2 and setup.service.num_open == 12

    run(test)


def test_requests_that_belong_together_are_taken_together(run: Any) -> None:
    """Room for 12 and groups of 8: whoever is first is served whole, whoever is not is refused whole."""

    async def test(setup: Setup) -> None:
        setup.engine.hold.set()
        groups = [setup.service.submit_all([setup.request() for _ in range(8)]) for _ in range(3)]
        taken, *refused = await asyncio.gather(*groups, return_exceptions=True)
        assert not isinstance(taken, BaseException) and [type(one) for one in refused] == [QueueFull, QueueFull]
        assert setup.service.num_open == 8 and setup.engine.aborted == [] and len(setup.engine.prompts) == 8
        bad = Request([9999], SamplingParams(), TextStream(setup.tokenizer))
        with pytest.raises(ValueError, match="bad ids"):
            await setup.service.submit_all([setup.request(), bad])
        assert setup.service.num_open == 8
        setup.engine.hold.clear()
        assert await asyncio.gather(*map(setup.text, taken)) == [setup.expected()] * 8

    run(test)


def test_a_timeout_counts_from_the_submission(run: Any) -> None:
    async def test(setup: Setup) -> None:
        setup.engine.hold.set()
        stream = await setup.service.submit(setup.request(timeout_s=0.1))
        with pytest.raises(RequestTimeout, match="longer than 0.1 s"):
            await anext(stream)
        await setup.service.stats()
        assert setup.engine.aborted == ["r0"] and setup.service.num_open == 0
        setup.engine.hold.clear()
        in_time = await setup.service.submit(setup.request(timeout_s=10))
        assert await setup.text(in_time) == setup.expected()

    run(test)


def test_a_stop_string_across_steps_and_inside_one(run: Any) -> None:
    async def test(setup: Setup) -> None:
        whole = setup.expected(count=20)
        stop = whole[6:9]
        counts = []
        for per_step in (1, 2, 5, 20):
            setup.engine.per_step = per_step
            stream = await setup.service.submit(setup.request(stops=(stop,), params={"max_tokens": 20, "logprobs": 0}))
            pieces = [piece async for piece in stream]
            text = "".join(piece.read + (piece.rest or "") for piece in pieces)
            assert text == whole[: whole.index(stop)] and pieces[-1].finish_reason == "stop"
            assert all(len(piece.logprobs or ()) == len(piece.token_ids) for piece in pieces)
            counts.append(sum(len(piece.token_ids) for piece in pieces))
        assert len(set(counts)) == 1

    run(test)


@pytest.mark.parametrize("place", ["feed", "finish"])
@pytest.mark.parametrize("error", [ValueError, KeyError, RecursionError, AssertionError])
def test_a_reader_that_fails_hurts_only_itself(
    run: Any, error: type[Exception], place: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(TextStream):
        """Fails in one place."""

    def fail(*_: Any) -> str:
        raise error("cannot be read")

    setattr(Broken, place, fail)

    async def test(setup: Setup) -> None:
        good = await setup.service.submit(setup.request())
        bad = await setup.service.submit(
            Request(setup.tokenizer.encode("x"), SamplingParams(max_tokens=9), Broken(setup.tokenizer))
        )
        with pytest.raises(RequestFailed, match="its log says why"):
            _ = [piece async for piece in bad]
        assert await setup.text(good) == setup.expected()
        await setup.service.stats()
        assert setup.engine.aborted == (["r1"] if place == "feed" else [])
        assert not setup.service.failed.is_set()

    run(test)
    assert "request r1 ended by an error" in caplog.text and "cannot be read" in caplog.text, "with its traceback"


def test_an_engine_that_fails_at_one_request_serves_the_others(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def test(setup: Setup) -> None:
        right = setup.engine.add_all

        def add_all(requests: Any) -> None:
            if requests[0].request_id == "r0":
                raise TypeError("not what it expects")
            right(requests)

        setup.engine.add_all = add_all  # type: ignore[method-assign]
        setup.engine.failing = {"r1"}
        with pytest.raises(RequestFailed):
            await setup.service.submit(setup.request())
        bad, good = await setup.service.submit(setup.request()), await setup.service.submit(setup.request())
        with pytest.raises(RequestFailed):
            await setup.text(bad)
        assert setup.service.failures_in_a_row == 2
        assert await setup.text(good) == setup.expected()
        assert setup.service.failures_in_a_row == 0 and not setup.service.failed.is_set()

    run(test)
    assert "not what it expects" in caplog.text and "the engine failed at r1" in caplog.text


def test_draining_lets_requests_finish(run: Any) -> None:
    async def test(setup: Setup) -> None:
        setup.engine.delay_s = 0.01
        stream = await setup.service.submit(setup.request())
        reading = asyncio.create_task(setup.text(stream))
        assert await setup.service.drain(10)
        assert await reading == setup.expected()
        with pytest.raises(ServiceStopped, match="shutting down"):
            await setup.service.submit(setup.request())

    run(test)


def test_draining_ends_what_does_not_finish(run: Any) -> None:
    async def test(setup: Setup) -> None:
        setup.engine.hold.set()
        stream = await setup.service.submit(setup.request())
        assert not await setup.service.drain(0.1)
        with pytest.raises(ServiceStopped):
            await anext(stream)
        await setup.service.stats()
        assert setup.engine.aborted == ["r0"]

    run(test)


def test_stats_after_the_end(run: Any) -> None:
    async def test(setup: Setup) -> None:
        await setup.service.stop()
        with pytest.raises(ServiceStopped):
            await setup.service.stats()

    run(test)


def test_a_defect_of_the_engine_ends_everything(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: errors.append(args.exc_value))

    async def test(setup: Setup) -> None:
        setup.engine.hold.set()
        stream = await setup.service.submit(setup.request())
        setup.engine.broken = True
        with pytest.raises(ServiceStopped, match="engine failed"):
            await anext(stream)
        assert setup.service.failed.is_set()
        with pytest.raises(ServiceStopped):
            await setup.service.submit(setup.request())
        with pytest.raises(ServiceStopped):
            await setup.service.stats()

    run(test)
    assert [str(error) for error in errors] == ["the engine broke"]
