# SPDX-License-Identifier: Apache-2.0
"""`megamoe serve` as a process with the bundled model: what it prints, how it ends, what it refuses to start with."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx2
import pytest

from megamoe.cli import main

from .fakes import events_of
from .test_stress import raw_request


class Process:
    """A running `megamoe serve`."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megamoe.cli", "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if "ready at" in line:
                break
        else:
            assert self.process.stderr is not None
            raise AssertionError(self.process.stderr.read())
        found = re.search(r"ready at (http://\S+)", self.lines[-1])
        assert found is not None
        self.url = found[1]

    def end(self, *signals: signal.Signals) -> tuple[int, str, str]:
        """Send signals, wait for the end, and return exit code, standard output and error."""
        for one in signals:
            self.process.send_signal(one)
            time.sleep(0.2)
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[Process]:
    process = Process(*arguments)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.communicate()


def long_stream(url: str, max_tokens: int) -> str:
    body = {"model": "tiny", "prompt": "def ", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    return httpx2.post(f"{url}/v1/completions", json=body, timeout=60).text


def wait_for_running(url: str) -> None:
    for _ in range(200):
        if "megamoe_requests_running 1.0" in httpx2.get(f"{url}/metrics").text:
            return
        time.sleep(0.02)
    raise AssertionError("it never ran")


def test_from_start_to_a_clean_end() -> None:
    """The start says what is served and where; a signal lets a running stream finish and refuses new requests."""
    with serving("--speculative-tokens", "1") as server:
        assert len(server.lines) == 2
        assert server.lines[0] == (
            "megamoe: serving tiny, recipe w4a16, device cpu, chat format plain, context 8192, no key asked for\n"
        )
        assert server.url.startswith("http://127.0.0.1:")
        assert httpx2.get(f"{server.url}/ready").json() == {"status": "ready"}
        card = httpx2.get(f"{server.url}/v1/models").json()["data"][0]
        assert (card["id"], card["recipe"], card["max_model_len"]) == ("tiny", "w4a16", 8192)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            stream = pool.submit(long_stream, server.url, 60)
            wait_for_running(server.url)
            server.process.send_signal(signal.SIGTERM)
            refused = None
            for _ in range(100):
                refused = httpx2.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "x"})
                if refused.status_code == 503:
                    break
            assert refused is not None and refused.json()["error"]["code"] == "shutting_down"
            assert httpx2.get(f"{server.url}/ready").status_code == 503
            metrics = httpx2.get(f"{server.url}/metrics").text.splitlines()
            numbers = dict(line.split() for line in metrics if "{" not in line and not line.startswith("#"))
            chunks = events_of(stream.result())
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        code, out, err = server.end()
    assert float(numbers["megamoe_cache_pages_used"]) > 0 and float(numbers["megamoe_draft_tokens_total"]) > 0
    assert 0 <= float(numbers["megamoe_draft_acceptance_rate"]) <= 1
    assert (code, err) == (0, "") and "SIGTERM: 1 open requests may finish for 30 s" in out


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)], ids=str)
def test_what_does_not_finish_is_told(signals: tuple[signal.Signals, ...]) -> None:
    timeout = "0.3" if len(signals) == 1 else "60"
    with serving("--shutdown-timeout", timeout, "--max-sequences", "2") as server:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            stream = pool.submit(long_stream, server.url, 4000)
            wait_for_running(server.url)
            started = time.monotonic()
            code, _, err = server.end(*signals)
            assert time.monotonic() - started < 15
            last = stream.result().strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert (code, err) == (0, "")


def test_a_half_sent_body_leaves_no_traceback() -> None:
    with serving() as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(raw_request("/v1/completions", b"{", Content_Length="99"))
            for _ in range(200):
                if "megamoe_open_requests 1.0" in httpx2.get(f"{server.url}/metrics").text:
                    break
                time.sleep(0.02)
            code, _, err = server.end(signal.SIGTERM)
            assert b"503" in connection.recv(100)
        assert (code, err) == (0, "")


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["serve", "--explain", "--memory", "256MiB", "--max-sequences", "3", "--speculative-tokens", "1"]
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["engine"]["max_sequences"] == plan["plan"]["num_sequences"] == 3
    assert plan["engine"]["memory_bytes"] == 256 * 2**20 and plan["engine"]["speculative_tokens"] == 1
    assert plan["model"] == {"name": "tiny", "recipe": "w4a16", "device": "cpu", "chat_format": "plain"}
    assert plan["server"]["api_key"] == "not asked for" and plan["plan"]["bytes_per_page"] > 0


def test_the_key_is_read_from_a_file_and_never_shown(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text("sesame\n")
    assert main(["serve", "--explain", "--api-key-file", str(tmp_path / "key"), "--host", "0.0.0.0"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["server"]["api_key"] == "asked for" and "sesame" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines"),
        (["--host", "::"], "can be reached from other machines"),
        (["--api-key-file", "no-such-file"], "No such file"),
        (["--port", "70000"], "70000"),
        (["--memory", "lots"], "512MiB"),
        (["--memory", "1KiB"], "memory_bytes 1,024"),
        (["--max-sequences", "0"], "max_sequences must be 1 or more"),
        (["--max-step-tokens", "4"], "max_step_tokens must be at least"),
        (["--max-tokens", "0"], "max_tokens must be 1 or more"),
        (["--request-timeout", "0"], "request_timeout_s must be above 0"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--recipe", "w2a2"], "unknown recipe"),
        (["--chat-release", "1999"], "unknown release"),
    ],
    ids=str,
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("key", ["", "\n", " x", "schlüssel", "a\nb"], ids=repr)
def test_keys_that_no_header_can_carry(tmp_path: pathlib.Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text(key, encoding="utf-8")
    assert main(["serve", "--explain", "--api-key-file", str(tmp_path / "key")]) == 2
    assert "API key" in capsys.readouterr().err


def test_an_address_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen on 127.0.0.1 port" in capsys.readouterr().err


def test_help_does_not_load_the_extra(repository: pathlib.Path) -> None:
    code = "import sys; from megamoe.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    for arguments in (["serve", "--help"], ["serve", "--host", "0.0.0.0"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=repository, capture_output=True, check=False
        )
        assert not {b"torch", b"fastapi", b"uvicorn"} & set(done.stderr.split())
