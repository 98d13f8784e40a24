# SPDX-License-Identifier: Apache-2.0
"""A server with a fake engine and DeepSeek-V4's chat format, and a client for it."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import httpx2
import pytest

from .fakes import FakeEngine, RunningServer, echo_of_prompt, make_state, running, write_v4_tokenizer


@pytest.fixture(scope="session")
def v4_directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with a tokenizer.json that has DeepSeek-V4's control tokens."""
    directory = tmp_path_factory.mktemp("v4-tokenizer")
    write_v4_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def shared_server(v4_directory: pathlib.Path) -> Iterator[RunningServer]:
    """One server for the tests of a module."""
    engine = FakeEngine(echo_of_prompt)
    with running(make_state(v4_directory, engine), engine) as server:
        yield server


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    """The module's server, with its engine as it was; nothing may be left open after a test."""
    engine = shared_server.engine
    engine.script, engine.per_step, engine.delay_s = echo_of_prompt, 1, 0.0
    engine.params.clear()
    engine.prompts.clear()
    engine.aborted.clear()
    yield shared_server
    engine.hold.clear()
    shared_server.wait_until(lambda: not engine.has_work())
    shared_server.wait_until(lambda: shared_server.state.service.num_open == 0)


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx2.Client]:
    """An HTTP client."""
    with httpx2.Client(base_url=server.url, timeout=20) as client:
        yield client
