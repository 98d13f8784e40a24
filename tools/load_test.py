# SPDX-License-Identifier: Apache-2.0
"""Load test of `megamoe serve`: many clients at once, each answer compared with the one the same request got alone.

    python tools/load_test.py                       64 clients for 60 s against the bundled model
    python tools/load_test.py --clients 8 --seconds 5

Starts a server of its own on a free port of the loopback interface. First every request of a fixed set is answered
alone; then the clients send them in random order, streamed and whole, mixed with streams that are closed halfway and
with malformed requests; then some are answered alone again. Fails (exit code 1) if an answer differs from its solo run
in any token, log-probability or finish reason, if a request gets no answer, if pages, sequences or connections are
still held at the end, if the server's memory grew, or if it does not end cleanly.

Last line of standard output: one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

ANSWER_TIMEOUT_S = 120.0  # longer than any answer may take; a request without an answer by then is lost
MEMORY_SLACK_MIB = 24.0  # what caches of the interpreter and of malloc may still take in the second half of a run
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ab", "cd"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
TEXTS = [
    "def parse(self, text):",
    "import os\nimport sys\n\n",
    "class Point:\n    def __init__(self",
    '"""Return the ',
    "for name in sorted(",
    "    def close(self):\n        ",
    "# Copyright ",
    "x = [1, 2, 3]\nprint(",
]


@dataclasses.dataclass(frozen=True)
class Spec:
    """One request of the set: the same every time it is sent."""

    path: str
    body: dict[str, Any]


def make_specs(model: str, count: int) -> list[Spec]:
    """Return a fixed mixture of requests; every answer is determined by its request."""
    draw = random.Random(7)
    specs = []
    for place in range(count):
        text = TEXTS[place % len(TEXTS)] + " " * (place // len(TEXTS))
        body: dict[str, Any] = {"model": model, "max_tokens": draw.choice([8, 16, 24, 32])}
        body |= {"temperature": 0} if place % 2 else {"temperature": 0.9, "top_p": 0.95, "seed": place}
        kind = place % 8
        if kind == 2:
            body |= {"presence_penalty": 0.5, "min_p": 0.02, "logit_bias": {"300": -5}}
        if kind == 4:
            body |= {"stop": ["\n", "("]}
        if kind == 5:
            body |= {"n": 2}
        if kind in (1, 3):
            body |= {"messages": [{"role": "user", "content": text}], "logprobs": True, "top_logprobs": 2}
            specs.append(Spec("/v1/chat/completions", body))
        elif kind == 6:
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
            body |= {"messages": [{"role": "user", "content": text}], "response_format": form}
            specs.append(Spec("/v1/chat/completions", body))
        else:
            # Several times the same beginning, longer than a page, so that prompts are found in the cache.
            prompt = TEXTS[0] * 60 + text if kind == 7 else text
            specs.append(Spec("/v1/completions", body | {"prompt": prompt, "logprobs": 1}))
    return specs


MALFORMED: list[tuple[str, bytes, int]] = [
    ("/v1/completions", b"{", 400),
    ("/v1/completions", b'{"model": "MODEL"}', 400),
    ("/v1/completions", b'{"model": "MODEL", "prompt": "x", "max_tokens": -1}', 400),
    ("/v1/completions", b'{"model": "MODEL", "prompt": [99999999]}', 400),
    ("/v1/completions", b'{"model": "nobody", "prompt": "x"}', 404),
    ("/v1/completions", b'{"model": "MODEL", "prompt": "' + b"x" * 2**21 + b'"}', 413),
    ("/v1/chat/completions", b'{"model": "MODEL", "messages": [{"role": "user", "content": "x", "y": 1}]}', 400),
    ("/v1/chat/completions", b'{"model": "MODEL", "messages": [], "stream": true}', 400),
    ("/v1/nothing", b"{}", 404),
]


# a small HTTP client: one request per connection, so that closing it is leaving


@dataclasses.dataclass
class Connection:
    """An answer that is being received."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def parts(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes."""
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int((await self.reader.readline()).strip(), 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
        else:
            yield await self.reader.readexactly(int(self.headers["content-length"]))

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of a stream, which must end with [DONE]."""
        buffer = b""
        async for part in self.parts():
            buffer += part
            *blocks, buffer = buffer.split(b"\n\n")
            for block in blocks:
                if block == b"data: [DONE]":
                    return
                if block.startswith(b"data: "):
                    event = json.loads(block[6:])
                    if "error" in event:
                        raise AnswerError(f"error in a stream: {event['error']['message']}")
                    yield event
        raise AnswerError("a stream ended without [DONE]")


class AnswerError(Exception):
    """An answer that is not what was promised."""


@contextlib.asynccontextmanager
async def request(address: tuple[str, int], path: str, body: bytes | None) -> AsyncIterator[Connection]:
    """Send a request (GET without a body) and give its answer; leaving the block closes the connection."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        method = "GET" if body is None else "POST"
        head = f"{method} {path} HTTP/1.1\r\nHost: {address[0]}\r\nConnection: close\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"\r\n" + (body or b""))
        status = int((await reader.readline()).split()[1])
        headers = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        yield Connection(status, headers, reader, writer)
    finally:
        writer.close()


# answers in a form that can be compared


@dataclasses.dataclass
class Choice:
    """One choice as it was put together."""

    text: str = ""
    finish_reason: str | None = None
    logprobs: list[Any] = dataclasses.field(default_factory=list)

    def add(self, choice: dict[str, Any]) -> None:
        """Add a chunk's choice, or a whole one."""
        part = choice.get("delta") or choice.get("message") or {}
        self.text += choice.get("text") or part.get("content") or ""
        self.finish_reason = choice["finish_reason"] or self.finish_reason
        logprobs = choice["logprobs"]
        if logprobs and "tokens" in logprobs:
            self.logprobs += zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
        elif logprobs:
            self.logprobs += [(one["token"], one["logprob"]) for one in logprobs["content"]]


def choices_of(events: Sequence[dict[str, Any]]) -> dict[int, Choice]:
    """Return the choices that events, or one whole answer, add up to."""
    choices: dict[int, Choice] = {}
    for event in events:
        for choice in event["choices"]:
            choices.setdefault(choice["index"], Choice()).add(choice)
    return choices


@dataclasses.dataclass
class Tally:
    """What happened."""

    answers: int = 0
    streams: int = 0
    aborted: int = 0
    malformed: int = 0
    refused: int = 0
    tokens: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)
    first_s: list[float] = dataclasses.field(default_factory=list)
    token_s: list[float] = dataclasses.field(default_factory=list)


class Load:
    """The clients of one run."""

    def __init__(self, address: tuple[str, int], model: str, specs: Sequence[Spec], seed: int) -> None:
        self.tally = Tally()
        self._address = address
        self._model = model
        self._specs = specs
        self._expected: list[dict[int, Choice]] = []
        self._seed = seed

    async def run_alone(self, *, is_first: bool) -> None:
        """Answer requests alone: all of them the first time, to know the answers; later every second, to compare."""
        for place, spec in enumerate(self._specs):
            if place % 2 and not is_first:
                continue
            choices = await self._whole(spec)
            if choices is None:
                raise SystemExit("load test: a request alone was refused with 429")
            if is_first:
                self._expected.append(choices)
            else:
                self._compare(place, choices, "alone again")

    async def run(self, num_clients: int, seconds: float) -> None:
        """Let the clients send until the time is over, then wait for every answer that is due."""
        until = time.monotonic() + seconds
        await asyncio.gather(*(self._client(client, until) for client in range(num_clients)))

    async def _client(self, client: int, until: float) -> None:
        draw = random.Random(self._seed * 1000 + client)
        kind = (client % 10 + 0.5) / 10  # each first request's, so that a short run has every kind
        while time.monotonic() < until:
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    if kind < 0.1:
                        await self._malformed(draw)
                    elif kind < 0.2:
                        await self._abort(draw)
                    else:
                        await self._answer(draw, is_stream=kind < 0.7)
            except TimeoutError:
                self.tally.problems.append(f"client {client}: no answer within {ANSWER_TIMEOUT_S:g} s")
            except (AnswerError, OSError, asyncio.IncompleteReadError, ValueError) as error:
                self.tally.problems.append(f"client {client}: {type(error).__name__}: {error}")
            kind = draw.random()

    async def _answer(self, draw: random.Random, *, is_stream: bool) -> None:
        place = draw.randrange(len(self._specs))
        spec = self._specs[place]
        while True:
            choices = await (self._streamed(spec) if is_stream else self._whole(spec))
            if choices is not None:
                break
            await asyncio.sleep(draw.uniform(0.2, 1.0))  # less than Retry-After: to keep the queue full
        self._compare(place, choices, "streamed" if is_stream else "whole")
        self.tally.answers += 1

    async def _whole(self, spec: Spec) -> dict[int, Choice] | None:
        async with request(self._address, spec.path, json.dumps(spec.body).encode()) as answer:
            body = b"".join([part async for part in answer.parts()])
            if self._is_refused(answer):
                return None
            if answer.status != 200:
                raise AnswerError(f"{spec.path} answered {answer.status}: {body[:200]!r}")
            whole = json.loads(body)
            self.tally.tokens += whole["usage"]["completion_tokens"]
            return choices_of([whole])

    async def _streamed(self, spec: Spec) -> dict[int, Choice] | None:
        body = spec.body | {"stream": True, "stream_options": {"include_usage": True}}
        started = time.monotonic()
        async with request(self._address, spec.path, json.dumps(body).encode()) as answer:
            if self._is_refused(answer):
                return None
            if answer.status != 200:
                raise AnswerError(f"{spec.path} answered {answer.status}")
            events = []
            last: dict[int, float] = {}
            async for event in answer.events():
                now = time.monotonic()
                events.append(event)
                for choice in event["choices"]:
                    if choice.get("text") or choice.get("delta", {}).get("content") or choice["logprobs"]:
                        index = choice["index"]
                        if index in last:
                            self.tally.token_s.append(now - last[index])
                        else:
                            self.tally.first_s.append(now - started)
                        last[index] = now
            self.tally.streams += 1
            self.tally.tokens += events[-1]["usage"]["completion_tokens"]
            return choices_of(events)

    async def _abort(self, draw: random.Random) -> None:
        """Leave: before the first byte of the answer, or after some events."""
        spec = draw.choice(self._specs)
        body = json.dumps(spec.body | {"stream": True}).encode()
        if draw.random() < 0.3:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(draw.uniform(0.0, 0.3)), request(self._address, spec.path, body):
                    pass
        else:
            async with request(self._address, spec.path, body) as answer:
                if not self._is_refused(answer):
                    count = draw.randrange(1, 6)
                    async for _ in answer.events():
                        count -= 1
                        if not count:
                            break
        self.tally.aborted += 1

    async def _malformed(self, draw: random.Random) -> None:
        path, body, status = draw.choice(MALFORMED)
        async with request(self._address, path, body.replace(b"MODEL", self._model.encode())) as answer:
            content = b"".join([part async for part in answer.parts()])
            if answer.status != 429 and (answer.status != status or set(json.loads(content)) != {"error"}):
                raise AnswerError(f"a malformed request got {answer.status} instead of {status}: {content[:200]!r}")
        self.tally.malformed += 1

    def _is_refused(self, answer: Connection) -> bool:
        if answer.status != 429:
            return False
        if "retry-after" not in answer.headers:
            raise AnswerError("429 without Retry-After")
        self.tally.refused += 1
        return True

    def _compare(self, place: int, choices: dict[int, Choice], how: str) -> None:
        if choices != self._expected[place]:
            self.tally.problems.append(
                f"request {place} {how}: got {choices!r}, alone it was {self._expected[place]!r}"[:600]
            )


# the server


async def metrics(address: tuple[str, int]) -> dict[str, float]:
    """Return the metrics without labels."""
    async with request(address, "/metrics", None) as answer:
        text = b"".join([part async for part in answer.parts()]).decode()
    pairs = (line.split() for line in text.splitlines() if not line.startswith("#") and "{" not in line)
    return {name: float(value) for name, value in pairs}


async def held_at_the_end(address: tuple[str, int]) -> dict[str, float]:
    """Return what is still held some time after the last answer; nothing should be."""
    names = (
        "megamoe_cache_pages_used",
        "megamoe_requests_running",
        "megamoe_requests_waiting",
        "megamoe_open_requests",
    )
    held: dict[str, float] = {}
    for _ in range(50):
        now = await metrics(address)
        held = {name: now[name] for name in names if now[name]}
        if not held:
            break
        await asyncio.sleep(0.1)
    return held


@contextlib.contextmanager
def own_server(arguments: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], tuple[str, int]]]:
    """Run a server of our own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "megamoe.cli", "serve", "--port", "0", *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="")
            if found := re.search(r"ready at http://([\d.]+):(\d+)", line):
                break
        else:
            raise SystemExit("load test: the server did not start")
        yield process, (found[1], int(found[2]))
    finally:
        process.kill()
        process.wait()


async def watch_memory(pid: int, samples: list[float]) -> None:
    """Note the resident memory of a process, in MiB, twice a second."""
    while True:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        samples.append(int(found[1]) / 1024)
        await asyncio.sleep(0.5)


def growth(samples: Sequence[float]) -> float:
    """Return by how many MiB the memory of the last quarter is above that of the second: the first is warming up."""
    quarter = len(samples) // 4
    if not quarter:
        return 0.0
    return statistics.median(samples[-quarter:]) - statistics.median(samples[quarter : 2 * quarter])


async def load_test(
    address: tuple[str, int], model: str, *, clients: int, seconds: float, num_specs: int, seed: int, pid: int | None
) -> dict[str, Any]:
    """Run the test against a server and return what was found; "problems" is empty if all is well."""
    load = Load(address, model, make_specs(model, num_specs), seed)
    await load.run_alone(is_first=True)
    load.tally = Tally()
    samples: list[float] = []
    watching = None if pid is None else asyncio.create_task(watch_memory(pid, samples))
    started = time.monotonic()
    await load.run(clients, seconds)
    elapsed = time.monotonic() - started
    if watching is not None:
        watching.cancel()
    tally = load.tally
    num_tokens = tally.tokens
    held = await held_at_the_end(address)
    tally.problems += [f"still held at the end: {name} {value:g}" for name, value in held.items()]
    if growth(samples) > MEMORY_SLACK_MIB:
        tally.problems.append(f"memory grew by {growth(samples):.1f} MiB; allowed are {MEMORY_SLACK_MIB:g}")
    if not tally.answers or not tally.aborted or not tally.malformed:
        tally.problems.append("the run was too short to send every kind of request")
    await load.run_alone(is_first=False)
    now = await metrics(address)
    return {
        "clients": clients,
        "seconds": round(elapsed, 1),
        "answers": tally.answers,
        "streamed": tally.streams,
        "aborted": tally.aborted,
        "malformed": tally.malformed,
        "refused_429": tally.refused,
        "tokens_per_second": round(num_tokens / elapsed, 1),
        "first_token_s": percentiles(tally.first_s),
        "per_token_s": percentiles(tally.token_s),
        "memory_mib": [round(one, 1) for one in (samples[:1] + samples[-1:])],
        "memory_growth_mib": round(growth(samples), 1),
        "prefix_hit_rate": round(now["megamoe_prefix_hit_rate"], 3),
        "preemptions": now["megamoe_preemptions_total"],
        "problems": tally.problems,
    }


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """Return the median, the 99th percentile and the largest."""
    if not values:
        return {"p50": None, "p99": None, "max": None}
    ordered = sorted(values)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(ordered[min(int(share * len(ordered)), len(ordered) - 1)], 4) for name, share in at.items()}


def report(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    rows = [(name.replace("_", " "), value) for name, value in result.items() if name != "problems"]
    lines = ["| | |", "| --- | --- |"]
    for name, value in rows:
        if isinstance(value, dict):
            value = ", ".join(f"{key} {one}" for key, one in value.items())
        elif isinstance(value, list):
            value = " → ".join(map(str, value))
        lines.append(f"| {name} | {value} |")
    return "\n".join(lines)


def main() -> int:
    """Run the test and return the exit code."""
    parser = argparse.ArgumentParser(description="Load test of megamoe serve on the loopback interface.")
    parser.add_argument("--clients", type=int, default=64, choices=range(1, 257), metavar="1..256")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--requests", type=int, default=24, help="size of the set of requests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--speculative-tokens", default="0")
    options = parser.parse_args()
    seconds = min(options.seconds, 600.0)
    arguments = ["--max-sequences", "16", "--max-waiting", "24", "--memory", "512MiB"]
    with own_server([*arguments, "--speculative-tokens", options.speculative_tokens]) as (process, address):
        result = asyncio.run(
            load_test(
                address,
                "tiny",
                clients=options.clients,
                seconds=seconds,
                num_specs=options.requests,
                seed=options.seed,
                pid=process.pid if pathlib.Path("/proc").is_dir() else None,
            )
        )
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    if code:
        result["problems"].append(f"the server ended with exit code {code}")
    print(report(result))
    for problem in result["problems"][:10]:
        print(f"problem: {problem}", file=sys.stderr)
    print(json.dumps(result))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
