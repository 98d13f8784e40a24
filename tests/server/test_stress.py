# SPDX-License-Identifier: Apache-2.0
"""What a server must survive: full queues, clients that leave, stall or send too much, wrong keys, a broken engine."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from .fakes import FakeEngine, RunningServer, echo_of_prompt, events_of, make_state, running

COMPLETION = {"model": "fake", "prompt": "def f(", "max_tokens": 20}
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}]}


@contextlib.contextmanager
def a_server(directory: pathlib.Path, *, engine: FakeEngine | None = None, **settings: Any) -> Iterator[RunningServer]:
    engine = engine or FakeEngine(echo_of_prompt)
    with running(make_state(directory, engine, **settings), engine) as server:
        yield server


def raw_request(path: str, body: bytes, **headers: str) -> bytes:
    fields = {"Host": "x", "Content_Type": "application/json", "Content_Length": str(len(body)), **headers}
    lines = [f"POST {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def connect(server: RunningServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def metric(client: httpx2.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(name + " ")).split()[1])


# the queue


def test_a_full_queue_is_429_with_retry_after(server: RunningServer, client: httpx2.Client) -> None:
    expected = client.post("/v1/completions", json=COMPLETION).json()["choices"]
    server.engine.hold.set()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        posts = [pool.submit(httpx2.post, f"{server.url}/v1/completions", json=COMPLETION) for _ in range(16)]
        server.wait_until(lambda: sum(post.done() for post in posts) == 4)  # 4 run, 8 wait
        refused = [post.result() for post in posts if post.done()]
        assert {answer.status_code for answer in refused} == {429}
        assert {answer.headers["retry-after"] for answer in refused} == {"8"}
        assert refused[0].json()["error"]["code"] == "queue_full"
        assert client.post("/v1/chat/completions", json={**CHAT, "stream": True, "n": 2}).status_code == 429, (
            "a stream is refused by its status as well"
        )
        assert metric(client, "megamoe_requests_waiting") == 8 and metric(client, "megamoe_requests_running") == 4
        server.engine.hold.clear()
        answers = [post.result() for post in posts]
    assert [answer.json()["choices"] for answer in answers if answer.status_code == 200] == [expected] * 12


def test_choices_that_do_not_all_fit_are_all_refused(server: RunningServer, client: httpx2.Client) -> None:
    server.engine.hold.set()
    answer = client.post("/v1/completions", json={**COMPLETION, "n": 16})
    assert answer.status_code == 429
    assert not server.engine.has_work() and server.engine.prompts == [], "none was taken"


def test_a_burst_of_many_choices_is_served_as_far_as_it_fits(v4_directory: pathlib.Path) -> None:
    """24 requests of 16 sequences each come at once, and there is room for 64: four are served whole."""
    engine = FakeEngine(echo_of_prompt, max_sequences=16, max_waiting=48)
    with a_server(v4_directory, engine=engine) as server, concurrent.futures.ThreadPoolExecutor(24) as pool:
        engine.hold.set()
        body = {**COMPLETION, "n": 16}
        posts = [pool.submit(httpx2.post, f"{server.url}/v1/completions", json=body) for _ in range(24)]
        server.wait_until(lambda: sum(post.done() for post in posts) == 20)
        engine.hold.clear()
        answers = [post.result() for post in posts]
        assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 20
        assert all(len(answer.json()["choices"]) == 16 for answer in answers if answer.status_code == 200)


def test_more_open_requests_than_allowed(v4_directory: pathlib.Path) -> None:
    with a_server(v4_directory, max_open_requests=2) as server, httpx2.Client(base_url=server.url) as client:
        server.engine.hold.set()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            posts = [pool.submit(httpx2.post, f"{server.url}/v1/completions", json=COMPLETION) for _ in range(2)]
            server.wait_until(lambda: server.state.service.num_open == 2)
            answer = client.post("/v1/completions", json=COMPLETION)
            assert answer.status_code == 429 and answer.json()["error"]["code"] == "too_many_requests"
            assert answer.headers["retry-after"] == "1"
            assert client.get("/health").status_code == 200, "operators are not locked out"
            server.engine.hold.clear()
            assert [post.result().status_code for post in posts] == [200, 200]
        assert client.post("/v1/completions", json=COMPLETION).status_code == 200


# clients that leave


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_frees_its_pages(
    server: RunningServer, client: httpx2.Client, path: str, is_stream: bool
) -> None:
    server.engine.script = lambda prompt, params: [10] * 10_000
    server.engine.delay_s = 0.01
    body = {**(COMPLETION if path == "/v1/completions" else CHAT), "max_tokens": 256, "stream": is_stream, "n": 2}
    before = metric(client, "megamoe_client_disconnects_total")
    with connect(server) as connection:
        connection.sendall(raw_request(path, json.dumps(body).encode()))
        if is_stream:
            connection.recv(64)
        server.wait_until(lambda: server.engine.steps > 3 and metric(client, "megamoe_cache_pages_used") > 0)
    server.wait_until(lambda: len(server.engine.aborted) == 2)
    assert metric(client, "megamoe_cache_pages_used") == 0
    server.wait_until(lambda: metric(client, "megamoe_client_disconnects_total") == before + 1)
    assert metric(client, "megamoe_open_requests") == 0


def test_cancelling_takes_effect_before_the_next_step(server: RunningServer) -> None:
    """The abort is obeyed between the step that runs when the client leaves and the one after it."""
    server.engine.script = lambda prompt, params: [10] * 10_000
    server.engine.delay_s = 0.6
    with connect(server) as connection:
        connection.sendall(raw_request("/v1/completions", json.dumps({**COMPLETION, "stream": True}).encode()))
        server.wait_until(server.engine.has_work)
        connection.recv(64)
        steps = server.engine.steps
    server.wait_until(lambda: bool(server.engine.aborted))
    assert server.engine.steps <= steps + 1


def test_a_client_that_leaves_while_it_waits(server: RunningServer, client: httpx2.Client) -> None:
    server.engine.hold.set()
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            connection = stack.enter_context(connect(server))
            connection.sendall(raw_request("/v1/completions", json.dumps(COMPLETION).encode()))
        server.wait_until(lambda: server.state.service.num_open == 12)
    server.wait_until(lambda: len(server.engine.aborted) == 12)
    assert not server.engine.has_work()


def test_a_client_that_leaves_does_not_disturb_others(server: RunningServer, client: httpx2.Client) -> None:
    expected = client.post("/v1/completions", json=COMPLETION).json()["choices"]
    server.engine.delay_s = 0.01
    with connect(server) as connection, concurrent.futures.ThreadPoolExecutor(3) as pool:
        connection.sendall(raw_request("/v1/completions", json.dumps({**COMPLETION, "stream": True}).encode()))
        connection.recv(64)
        posts = [pool.submit(httpx2.post, f"{server.url}/v1/completions", json=COMPLETION) for _ in range(3)]
        connection.close()
        assert [post.result().json()["choices"] for post in posts] == [expected] * 3


def test_an_answer_without_progress_keeps_the_connection_with_comments(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megamoe.server.streaming.KEEP_ALIVE_S", 0.05)
    server.engine.hold.set()
    threading.Timer(0.4, server.engine.hold.clear).start()
    text = httpx2.post(f"{server.url}/v1/completions", json={**COMPLETION, "stream": True}).text
    assert text.count(": waiting\n\n") >= 2
    assert len(events_of(text)) > 1


# limits


def test_a_body_that_is_too_large(v4_directory: pathlib.Path) -> None:
    with a_server(v4_directory, max_body_bytes=2000) as server, httpx2.Client(base_url=server.url) as client:
        answer = client.post("/v1/completions", json={**COMPLETION, "prompt": "x" * 2000})
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
        with connect(server) as connection:  # announced, never sent
            connection.sendall(raw_request("/v1/completions", b"", Content_Length="99999999999"))
            assert b"413" in connection.recv(100)
        with connect(server) as connection:  # not announced
            head = raw_request("/v1/completions", b"", Transfer_Encoding="chunked").replace(
                b"Content-Length: 0\r\n", b""
            )
            connection.sendall(head + b"".join(b"3e8\r\n" + b"x" * 1000 + b"\r\n" for _ in range(4)))
            assert b"413" in connection.recv(100)
        assert client.post("/v1/completions", json=COMPLETION).status_code == 200


def test_a_body_that_fills_the_context_is_not_too_large(v4_directory: pathlib.Path) -> None:
    """1 MiB and 16 bytes a token: a prompt of the longest tokens, escaped, comes through and is counted."""
    with a_server(v4_directory, context=300) as server, httpx2.Client(base_url=server.url) as client:
        limit = 2**20 + 16 * 300
        for num_bytes, status in ((limit, 400), (limit + 1, 413)):
            text = json.dumps({**COMPLETION, "prompt": ""})
            body = text.replace('"prompt": ""', f'"prompt": "{"x" * (num_bytes - len(text))}"')
            assert len(body) == num_bytes
            answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == status, "the one is read and has too many tokens, the other is not read"


def test_a_body_that_does_not_arrive(v4_directory: pathlib.Path) -> None:
    with a_server(v4_directory, body_timeout_s=0.2) as server, connect(server) as connection:
        connection.sendall(raw_request("/v1/completions", b'{"model":', Content_Length="500"))
        answer = b"".join(iter(lambda: connection.recv(2000), b""))
        assert b"408" in answer.split(b"\r\n")[0] and b"body_timeout" in answer


def test_unfinished_bodies_are_counted_and_lock_nobody_out(v4_directory: pathlib.Path) -> None:
    with (
        a_server(v4_directory, max_open_requests=20) as server,
        httpx2.Client(base_url=server.url) as client,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(20):
            connection = stack.enter_context(connect(server))
            connection.sendall(raw_request("/v1/completions", b'{"model":', Content_Length="500"))
        server.wait_until(lambda: metric(client, "megamoe_open_requests") == 20)
        assert client.post("/v1/completions", json=COMPLETION).json()["error"]["code"] == "too_many_requests"
        for path in ("/v1/models", "/v1/models/fake"):
            assert client.get(path).status_code == 200
        stack.close()
        server.wait_until(lambda: metric(client, "megamoe_open_requests") == 0)
        assert client.post("/v1/completions", json=COMPLETION).status_code == 200


def test_a_half_sent_body_is_told_that_the_server_ends(v4_directory: pathlib.Path) -> None:
    with a_server(v4_directory) as server, connect(server) as connection:
        connection.sendall(raw_request("/v1/completions", b'{"model":', Content_Length="500"))
        server.wait_until(lambda: metric(httpx2.Client(base_url=server.url), "megamoe_open_requests") == 1)
        server.loop.call_soon_threadsafe(server.state.ending.set)
        answer = b"".join(iter(lambda: connection.recv(2000), b""))
        assert b"503" in answer.split(b"\r\n")[0] and b"shutting_down" in answer


def test_a_request_that_takes_too_long(v4_directory: pathlib.Path) -> None:
    with a_server(v4_directory, request_timeout_s=0.3) as server, httpx2.Client(base_url=server.url) as client:
        server.engine.hold.set()
        answer = client.post("/v1/completions", json=COMPLETION)
        assert answer.status_code == 408 and answer.headers["x-should-retry"] == "false"
        assert answer.json()["error"]["code"] == "request_timeout"
        text = client.post("/v1/chat/completions", json={**CHAT, "stream": True}).text
        last = text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
        server.wait_until(lambda: len(server.engine.aborted) == 2)
        assert not server.engine.has_work()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"\xff\xfe",
        b'{"model": "fake", "prompt": "x", "temperature": NaN}',
        b'{"model": "fake", "prompt": "x", "temperature": 1e999}',
        b'{"model": "fake", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "fake", "prompt": "\\ud800"}',
        b'{"model": "fake", "prompt": "x", "stop": ["\\udfff"]}',
        b'{"\\ud800": 1}',
    ],
    ids=lambda content: content[:24].decode("latin-1"),
)
def test_bodies_that_are_no_request(client: httpx2.Client, content: bytes) -> None:
    answer = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_form_is_no_request(client: httpx2.Client) -> None:
    """What a page of another origin can send without asking is not JSON, and is refused."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = client.post("/v1/completions", content=json.dumps(COMPLETION), headers={"Content-Type": kind})
        assert answer.status_code == 400 and "application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v2", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/static/../../etc/passwd", 404, "not_found"),
    ],
)
def test_paths_and_methods(client: httpx2.Client, method: str, path: str, status: int, code: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status and answer.json()["error"]["code"] == code


def test_bad_requests_among_good_ones(server: RunningServer, client: httpx2.Client) -> None:
    expected = client.post("/v1/completions", json=COMPLETION).json()["choices"]
    bad: list[Any] = [{}, {**COMPLETION, "n": -1}, {**COMPLETION, "prompt": [10**6]}, {**COMPLETION, "x": 1}]

    def post(place: int) -> Any:
        answer = httpx2.post(f"{server.url}/v1/completions", json=COMPLETION if place % 2 else bad[place // 2 % 4])
        return answer.json()["choices"] if place % 2 else answer.status_code

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        results = list(pool.map(post, range(40)))
    assert results[1::2] == [expected] * 20 and results[::2] == [400] * 20


# the key


def test_the_key_is_asked_for(v4_directory: pathlib.Path) -> None:
    with a_server(v4_directory, api_key="sesame") as server, httpx2.Client(base_url=server.url) as client:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}, {"Authorization": "Bearer"}):
            answer = client.post("/v1/completions", json=COMPLETION, headers=header)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/models").status_code == 401
        assert not server.engine.prompts[1:], "nothing of it reached the engine"  # the first is the warm-up
        for header in ({"Authorization": "Bearer sesame"}, {"Authorization": "bearer  sesame"}):
            assert client.get("/v1/models", headers=header).status_code == 200
        for path in ("/", "/health", "/ready", "/metrics", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200, path


def test_keys_are_compared_in_constant_time(v4_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides are digests of one length, whatever was sent, and only hmac.compare_digest looks at them."""
    import hmac

    compared: list[tuple[int, int]] = []
    true_compare = hmac.compare_digest

    def compare(first: bytes, second: bytes) -> bool:
        compared.append((len(first), len(second)))
        return true_compare(first, second)

    with a_server(v4_directory, api_key="sesame") as server:
        monkeypatch.setattr("megamoe.server.guard.hmac.compare_digest", compare)
        for key in ("x", "s", "sesame", "sesame" * 50):
            httpx2.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert compared == [(32, 32)] * 4


# the engine and the end


def test_a_broken_engine_is_told_to_everybody(v4_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: errors.append(args.exc_value))
    with a_server(v4_directory) as server, httpx2.Client(base_url=server.url) as client:
        assert client.get("/ready").json() == {"status": "ready"} and client.get("/health").status_code == 200
        server.engine.hold.set()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            post = pool.submit(httpx2.post, f"{server.url}/v1/completions", json=COMPLETION)
            stream = pool.submit(httpx2.post, f"{server.url}/v1/completions", json={**COMPLETION, "stream": True})
            server.wait_until(lambda: server.state.service.num_open == 2)
            server.engine.broken = True
            assert post.result().status_code == 503 and "engine failed" in post.result().json()["error"]["message"]
            assert "engine failed" in stream.result().text and "[DONE]" not in stream.result().text
        assert client.get("/health").status_code == 503 and client.get("/ready").status_code == 503
        assert client.post("/v1/completions", json=COMPLETION).status_code == 503
        assert metric(client, "megamoe_engine_up") == 0
    assert [str(error) for error in errors] == ["the engine broke"], "the traceback is shown once"


def test_an_error_at_one_request_is_told_to_it_alone(v4_directory: pathlib.Path) -> None:
    with a_server(v4_directory) as server, httpx2.Client(base_url=server.url) as client:
        expected = client.post("/v1/completions", json=COMPLETION).json()["choices"]  # r1, after the warm-up
        server.engine.delay_s = 0.01
        server.engine.failing = {"r2", "r4", *(f"r{idx}" for idx in range(6, 14))}
        for is_stream in (False, True):
            answer = client.post("/v1/completions", json={**COMPLETION, "stream": is_stream})
            error = json.loads(answer.text.removeprefix("data: "))["error"]
            assert answer.status_code == (200 if is_stream else 500)
            assert error["type"] == "server_error" and error["code"] == "internal_error"
            assert client.post("/v1/completions", json=COMPLETION).json()["choices"] == expected
        assert client.get("/health").status_code == 200
        for _ in range(8):
            assert client.post("/v1/completions", json=COMPLETION).status_code == 500
        assert client.get("/health").json()["error"]["code"] == "engine_failing", "nothing works: not the requests"
        assert client.post("/v1/completions", json=COMPLETION).json()["choices"] == expected
        assert client.get("/health").status_code == 200


def test_a_step_that_does_not_end_is_unhealthy(
    server: RunningServer, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megamoe.server.app.STALLED_S", 0.05)
    server.engine.delay_s = 0.3
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        post = pool.submit(httpx2.post, f"{server.url}/v1/completions", json={**COMPLETION, "max_tokens": 1})
        server.wait_until(lambda: client.get("/health").status_code == 503)
        assert client.get("/health").json()["error"]["code"] == "engine_stalled"
        assert post.result().status_code == 200
    assert client.get("/health").status_code == 200


def test_not_ready_before_warm_up(v4_directory: pathlib.Path) -> None:
    engine = FakeEngine(echo_of_prompt)
    with running(make_state(v4_directory, engine), engine, warm=False) as server:
        answer = httpx2.get(f"{server.url}/ready")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "not_ready"
        assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}


def test_a_long_prompt_stops_nobody(server: RunningServer, client: httpx2.Client) -> None:
    """Prompts are tokenized in a worker thread; the event loop answers meanwhile."""
    slow = threading.Event()
    original = type(server.state.encoder).encode

    def encode(encoder: Any, text: str) -> list[int]:
        if text == "slow":
            slow.wait(10)
        return original(encoder, text)

    with pytest.MonkeyPatch.context() as patch, concurrent.futures.ThreadPoolExecutor(1) as pool:
        patch.setattr(type(server.state.encoder), "encode", encode)
        post = pool.submit(httpx2.post, f"{server.url}/v1/completions", json={**COMPLETION, "prompt": "slow"})
        time.sleep(0.1)
        assert client.post("/v1/completions", json=COMPLETION).status_code == 200
        slow.set()
        assert post.result().status_code == 200


def test_leaving_at_any_moment_leaves_nothing_behind(server: RunningServer, client: httpx2.Client) -> None:
    """Connections are closed at many different moments of an answer's life, some while others are served."""
    server.engine.delay_s = 0.001
    expected = client.post("/v1/completions", json=COMPLETION).json()["choices"]
    for place in range(120):
        body = {**(COMPLETION if place % 2 else CHAT), "max_tokens": 20, "stream": place % 3 > 0, "n": 1 + place % 2}
        with connect(server) as connection:
            connection.sendall(raw_request(f"/v1/{'' if place % 2 else 'chat/'}completions", json.dumps(body).encode()))
            time.sleep((place % 24) * 0.002)
    assert client.post("/v1/completions", json=COMPLETION).json()["choices"] == expected
    server.wait_until(lambda: metric(client, "megamoe_open_requests") == 0)
    server.wait_until(lambda: server.state.service.num_open == 0 and not server.engine.has_work())
    assert metric(client, "megamoe_cache_pages_used") == 0
