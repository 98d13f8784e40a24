# SPDX-License-Identifier: Apache-2.0
"""An engine without a model, a tokenizer that has DeepSeek-V4's control tokens, and a server in a thread.

The server is the real one behind a real socket: disconnects, half-sent bodies and slow readers are what they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import tokenizers
import uvicorn

from megamoe.engine.logits_filter import LogitsFilter
from megamoe.engine.outputs import EngineStats, QueueFull, RequestOutput, TokenLogprobs
from megamoe.engine.request import NewRequest
from megamoe.engine.sampling_params import SamplingParams
from megamoe.models.deepseek_v4.chat import CONTROL_TOKENS
from megamoe.server.app import State, build_app
from megamoe.server.run import HttpServer, Listen, address_of, open_listener, warm_up
from megamoe.server.settings import ServerSettings
from megamoe.text.chat_format import ChatFormat
from megamoe.text.prompts import PromptEncoder
from megamoe.text.service import Service
from megamoe.text.tokenizer import Tokenizer

from ..fakes import BOS, EOS, next_after, write_tokenizer

Script = Callable[[list[int], SamplingParams], Sequence[int]]
PAGE = 16


def write_v4_tokenizer(directory: pathlib.Path) -> None:
    """Write a small byte-level tokenizer.json with every control token of DeepSeek-V4."""
    write_tokenizer(directory)
    path = directory / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    have = tokenizer.get_vocab()
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=False) for token in CONTROL_TOKENS if token not in have])
    path.write_text(tokenizer.to_str(), encoding="utf-8")


@dataclasses.dataclass
class _Request:
    prompt: list[int]
    params: SamplingParams
    script: Sequence[int]
    logits_filter: LogitsFilter | None
    made: list[int] = dataclasses.field(default_factory=list)

    @property
    def num_pages(self) -> int:
        return -(-(len(self.prompt) + len(self.made)) // PAGE)


class FakeEngine:
    """Makes the tokens a script says, and keeps account of pages; never reuses a prompt.

    Attributes:
        script: (prompt, params) → the tokens; when they are used up, EOS follows.
        per_step: tokens a request gets in a step.
        delay_s: how long a step takes.
        hold: while set, steps make nothing.
        aborted: ids in the order they were aborted.
        broken: raise in the next step.
        failing: ids that end with an error in their next step.
    """

    def __init__(self, script: Script, *, max_sequences: int = 4, max_waiting: int = 8, vocab_size: int = 400) -> None:
        self.script = script
        self.per_step = 1
        self.delay_s = 0.0
        self.hold = threading.Event()
        self.broken = False
        self.failing: set[str] = set()
        self.aborted: list[str] = []
        self.steps = 0
        self.params: list[SamplingParams] = []
        self.prompts: list[list[int]] = []
        self._max_sequences, self._max_waiting, self._vocab_size = max_sequences, max_waiting, vocab_size
        self._requests: dict[str, _Request] = {}
        self._counts = dict.fromkeys(("generated_tokens", "finished", "prompt_tokens", "aborted"), 0)

    def add_all(self, requests: Sequence[NewRequest]) -> None:
        if any(not one.prompt_ids or max(one.prompt_ids) >= self._vocab_size for one in requests):
            raise ValueError("prompt: bad ids")
        if len(self._requests) + len(requests) > self._max_sequences + self._max_waiting:
            raise QueueFull("engine: the queue is full", 7.2)
        for one in requests:
            prompt = list(one.prompt_ids)
            self.params.append(one.params)
            self.prompts.append(prompt)
            script = [*self.script(prompt, one.params), *([] if one.params.ignore_eos else [EOS])]
            self._requests[one.request_id] = _Request(prompt, one.params, script, one.logits_filter)

    def abort(self, request_id: str) -> bool:
        if self._requests.pop(request_id, None) is None:
            return False
        self.aborted.append(request_id)
        self._counts["aborted"] += 1
        return True

    def has_work(self) -> bool:
        return bool(self._requests)

    def stats(self) -> EngineStats:
        running = list(self._requests.values())[: self._max_sequences]
        zeros = {field.name: 0 for field in dataclasses.fields(EngineStats)}
        numbers = {
            "waiting": len(self._requests) - len(running),
            "running": len(running),
            "pages_used": sum(request.num_pages for request in running),
            "pages_total": 1000,
            "steps": self.steps,
        }
        return EngineStats(**{**zeros, **numbers, **self._counts})

    def step(self) -> list[RequestOutput]:
        if self.broken:
            raise RuntimeError("the engine broke")
        time.sleep(self.delay_s or 0.0002)
        if self.hold.is_set():
            time.sleep(0.002)
            return []
        self.steps += 1
        outputs = []
        for request_id in list(self._requests)[: self._max_sequences]:
            if request_id in self.failing:
                num_prompt = len(self._requests.pop(request_id).prompt)
                error = RuntimeError(f"the engine failed at {request_id}")
                outputs.append(RequestOutput(request_id, (), None, "error", num_prompt, 0, error))
                continue
            outputs.append(self._advance(request_id, self._requests[request_id]))
        return outputs

    def _advance(self, request_id: str, request: _Request) -> RequestOutput:
        params = request.params
        new: list[int] = []
        reason = None
        while reason is None and len(new) < self.per_step:
            token_id = self._next(request)
            request.made.append(token_id)
            new.append(token_id)
            if request.logits_filter is not None:
                request.logits_filter.accept(token_id)
            if (token_id == EOS and not params.ignore_eos) or token_id in params.stop_token_ids:
                reason = "stop"
            elif len(request.made) >= params.max_tokens:
                reason = "length"
        logprobs = None
        if params.logprobs is not None:
            top = [(token_id, -1.0 - place) for place, token_id in enumerate(range(10, 10 + params.logprobs))]
            logprobs = tuple(TokenLogprobs(token_id, -0.5, tuple(top)) for token_id in new)
        self._counts["generated_tokens"] += len(new)
        if reason is not None:
            self._counts["finished"] += 1
            del self._requests[request_id]
        return RequestOutput(request_id, tuple(new), logprobs, reason, len(request.prompt), 3)

    def _next(self, request: _Request) -> int:
        """The script's token; with a filter, a token it allows instead, the likeliest way to an end."""
        wanted = request.script[len(request.made)] if len(request.made) < len(request.script) else EOS
        if request.logits_filter is None:
            return wanted
        allowed = request.logits_filter.allowed()
        if allowed is None or bool(allowed[wanted]):
            return wanted
        if bool(allowed[EOS]):
            return EOS
        return int(allowed.nonzero()[-1] if len(request.made) % 3 == 0 else allowed.nonzero()[0])


def echo_of_prompt(prompt: list[int], params: SamplingParams) -> list[int]:
    """A script: tokens that depend on the whole prompt and the seed, 24 at most."""
    ids = [*prompt, params.seed or 0]
    return [next_after([*ids, place]) for place in range(24)]


@dataclasses.dataclass
class RunningServer:
    """A server under test.

    Attributes:
        url: where it listens.
        engine: its engine.
        state: what its routes share.
        tokenizer: its tokenizer.
    """

    url: str
    engine: FakeEngine
    state: State
    tokenizer: Tokenizer
    loop: asyncio.AbstractEventLoop

    def wait_until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait for something that must happen."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.005)


@dataclasses.dataclass(frozen=True)
class FakeChatConfig:
    """What ChatFormat asks of a model's config."""

    bos_token_id: int | None = BOS
    chat_release: str = "preview"


def make_state(directory: pathlib.Path, engine: object, *, context: int = 3000, **settings: object) -> State:
    """Return a server's state around an engine."""
    tokenizer = Tokenizer(directory)
    encoder = PromptEncoder(tokenizer, 400, BOS, (EOS,))
    chat_format = ChatFormat.for_model(tokenizer, FakeChatConfig())
    all_settings = ServerSettings("fake", "exact", context, **{"max_tokens": 256, **settings})
    return State(Service(engine), encoder, chat_format, all_settings, version="0.0")


@contextlib.contextmanager
def running(state: State, engine: FakeEngine, *, warm: bool = True) -> Iterator[RunningServer]:
    """Run a server in a thread until the block ends."""
    started = threading.Event()
    box: dict[str, object] = {}

    async def main() -> None:
        listener = open_listener(Listen("127.0.0.1", 0))
        app = build_app(state, version="0.0")
        config = uvicorn.Config(app, log_level="warning", lifespan="off", ws="none", http="h11", access_log=False)
        server = HttpServer(config)
        state.service.start()
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        if warm:
            await warm_up(state)
            state.is_ready = True
        stop = asyncio.Event()
        box.update(url=address_of(listener), stop=stop, loop=asyncio.get_running_loop())
        started.set()
        await stop.wait()
        await state.service.drain(0)
        server.should_exit = True
        await serving
        await state.service.stop()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert started.wait(20)
    loop, stop = box["loop"], box["stop"]
    try:
        yield RunningServer(str(box["url"]), engine, state, state.encoder.tokenizer, loop)
    finally:
        engine.hold.clear()
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        assert not thread.is_alive()


def events_of(body: str) -> list[dict[str, object]]:
    """Return the JSON objects of a complete event stream, which must end as it should."""
    blocks = [block for block in body.split("\n\n") if block and not block.startswith(":")]
    assert blocks[-1] == "data: [DONE]", blocks[-1]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]
