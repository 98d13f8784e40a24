# SPDX-License-Identifier: Apache-2.0
"""From a loaded model to a server that runs until it is told to stop.

SIGTERM or SIGINT begins the end: /ready says 503, new requests are refused with 503, running ones may finish for
`shutdown_timeout_s` and are then ended with an error that says so. A second signal ends them at once. The exit code is
0 if all could finish or were told, 1 if the engine failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import cast

import uvicorn

from megamoe.engine.engine import Engine
from megamoe.engine.memory import MemoryPlan
from megamoe.engine.model import BatchModel
from megamoe.engine.sampling_params import SamplingParams
from megamoe.engine.warm_up import describe as describe_kernels
from megamoe.server.app import State, build_app
from megamoe.server.settings import ServerSettings
from megamoe.text.chat_format import ChatConfig, ChatFormat
from megamoe.text.prompts import PromptEncoder
from megamoe.text.service import Request, RequestFailed, Service, ServiceStopped
from megamoe.text.stop import TextStream
from megamoe.text.tokenizer import Tokenizer

LAST_WORDS_S = 5  # for connections to take in the end of their answers
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclasses.dataclass(frozen=True)
class Listen:
    """Where to listen: port 0 takes a free one."""

    host: str = "127.0.0.1"
    port: int = 8000


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: ours end requests first, then the connections."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


def build_state(
    model: BatchModel, engine: Engine, settings: ServerSettings, *, version: str, release: str | None = None
) -> State:
    """Return what the routes share, for a model and an engine around it.

    Raises:
        ValueError: the tokenizer does not belong to the model, or the release is unknown.
    """
    tokenizer = Tokenizer(model.directory)
    if tokenizer.num_tokens > model.config.vocab_size:
        raise ValueError(
            f"tokenizer: {tokenizer.path} has ids up to {tokenizer.num_tokens - 1}, but model {model.name!r} has "
            f"{model.config.vocab_size} ids. Use the tokenizer.json that belongs to the weights."
        )
    config = model.config
    encoder = PromptEncoder(tokenizer, config.vocab_size, config.bos_token_id, config.eos_token_ids)
    chat_format = ChatFormat.for_model(tokenizer, cast(ChatConfig, model.config), release=release)
    return State(Service(engine), encoder, chat_format, settings, version=version)


async def warm_up(state: State) -> float:
    """Answer one short prompt, so that the first client finds code and memory in place; return the seconds it took."""
    started = time.monotonic()
    ids = state.encoder.encode("def ")
    reader = TextStream(state.encoder.tokenizer)
    async for _ in await state.service.submit(Request(ids, SamplingParams(max_tokens=4), reader)):
        pass
    return time.monotonic() - started


async def serve(state: State, listen: Listen, *, version: str, say: Callable[[str], None]) -> int:
    """Serve until a signal; return the exit code.

    Args:
        state: the parts.
        listen: where.
        version: of the package.
        say: prints a line for the operator.

    Raises:
        OSError: the address cannot be used.
    """
    app = build_app(state, version=version)
    listener = open_listener(listen)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        http="h11",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=LAST_WORDS_S,
        h11_max_incomplete_event_size=64 * 1024,
    )
    server = HttpServer(config)
    state.service.start()
    ending = asyncio.create_task(_end_on_signal(state, server, say))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    warming = asyncio.create_task(_get_ready(state, listener, say))
    try:
        await asyncio.wait((serving, ending), return_when=asyncio.FIRST_COMPLETED)
        await serving
    finally:
        for task in (warming, ending):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await state.service.stop()
    return 1 if state.service.failed.is_set() else 0


def open_listener(listen: Listen) -> socket.socket:
    """Return a bound socket.

    Raises:
        OSError: the address cannot be used.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {listen.host} port {listen.port}: {error.strerror}") from error
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _get_ready(state: State, listener: socket.socket, say: Callable[[str], None]) -> None:
    try:
        seconds = await warm_up(state)
    except ServiceStopped:  # told to stop before it was ready
        return
    except RequestFailed:
        state.service.failed.set()  # what cannot answer the first prompt is no server
        return
    gc.collect()
    gc.freeze()  # weights, code and caches live as long as the process: the collector need not walk them in a step
    state.is_ready = True
    say(f"ready at {address_of(listener)} (warm-up {seconds:.1f} s)")


async def _end_on_signal(state: State, server: HttpServer, say: Callable[[str], None]) -> None:
    """Wait for a signal or the engine's failure, then end requests and the server."""
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for one in SIGNALS:
        loop.add_signal_handler(one, signals.put_nowait, one)
    try:
        failed = asyncio.create_task(state.service.failed.wait())
        first = asyncio.create_task(signals.get())
        await asyncio.wait((failed, first), return_when=asyncio.FIRST_COMPLETED)
        state.is_ready = False
        state.ending.set()
        if failed.done():
            say("the engine failed; stopping")
            first.cancel()
        else:
            failed.cancel()
            timeout_s = state.settings.shutdown_timeout_s
            say(f"{first.result().name}: {state.service.num_open} open requests may finish for {timeout_s:g} s")
            second = asyncio.create_task(signals.get())
            draining = asyncio.create_task(state.service.drain(timeout_s))
            await asyncio.wait((second, draining), return_when=asyncio.FIRST_COMPLETED)
            for task in (second, draining):
                task.cancel()
            state.service.end_streams("The server is shutting down.")
        server.should_exit = True
        await asyncio.Future()  # handlers stay until the server has ended: a third signal must not kill it
    finally:
        for one in SIGNALS:
            loop.remove_signal_handler(one)


def run(state: State, listen: Listen, *, version: str, device: str) -> int:
    """Serve until a signal, telling the operator what happens; return the exit code."""
    settings = state.settings

    def say(line: str) -> None:
        print(f"megamoe: {line}", flush=True)

    say(
        f"serving {settings.model_name}, recipe {settings.recipe}, device {device}, chat format "
        f"{state.chat_format.name}, context {settings.context}, "
        f"{'no key asked for' if settings.api_key is None else 'key asked for'}"
    )
    return asyncio.run(serve(state, listen, version=version, say=say))


def describe(engine: Engine, state: State, memory: MemoryPlan | None = None) -> dict[str, object]:
    """Return the resolved plan, what a GPU's memory is for, and the ledger of kernels, as `--explain` prints them."""
    capacity = engine.plan.capacity
    server = dataclasses.asdict(state.settings)
    server["api_key"] = "not asked for" if state.settings.api_key is None else "asked for"
    return {
        "model": {
            "name": engine.model.name,
            "recipe": engine.model.recipe.name,
            "device": str(engine.model.device),
            "chat_format": state.chat_format.name,
        },
        "engine": dataclasses.asdict(engine.config),
        "plan": {
            **dataclasses.asdict(engine.plan.size),
            "num_snapshots": engine.plan.num_snapshots,
            "max_sequence_tokens": engine.plan.max_sequence_tokens,
            "bytes_per_sequence": capacity.bytes_per_sequence,
            "bytes_per_page": capacity.bytes_per_page,
            "bytes_per_token": capacity.bytes_per_token,
            "bytes_per_snapshot": capacity.bytes_per_snapshot,
        },
        "memory": None if memory is None else {**dataclasses.asdict(memory), "spare": memory.spare},
        "kernels": describe_kernels(engine.model),
        "server": server,
    }
