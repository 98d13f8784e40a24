# SPDX-License-Identifier: Apache-2.0
"""tools/load_test.py: a short run against the bundled model, and proof that it finds what it looks for."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import pathlib
import subprocess
import sys
import types
from collections.abc import Sequence

import pytest

from megamoe.engine.outputs import RequestOutput
from megamoe.engine.sampling_params import SamplingParams

from .fakes import FakeEngine, echo_of_prompt, make_state, running

SHORT = ["--clients", "20", "--seconds", "4", "--requests", "8", "--speculative-tokens", "1"]


@pytest.fixture(scope="module")
def tool(repository: pathlib.Path) -> types.ModuleType:
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("load_test", repository / "tools" / "load_test.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["load_test"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_short_run_of_the_bundled_model(repository: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/load_test.py", *SHORT], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["problems"] == [] and result["answers"] > 10 and result["aborted"] and result["malformed"]
    assert result["first_token_s"]["p99"] >= result["first_token_s"]["p50"] > 0


def load(tool: types.ModuleType, directory: pathlib.Path, engine: FakeEngine) -> list[str]:
    """Run the load against a fake engine for a moment and return the problems."""
    with running(make_state(directory, engine), engine) as server:
        host, port = server.url.removeprefix("http://").split(":")
        address = (host, int(port))
        test = tool.load_test(address, "fake", clients=20, seconds=1.0, num_specs=5, seed=1, pid=None)
        problems: list[str] = asyncio.run(test)["problems"]
        return problems


def test_a_sound_server_has_no_problems(tool: types.ModuleType, v4_directory: pathlib.Path) -> None:
    assert load(tool, v4_directory, FakeEngine(echo_of_prompt)) == []


def test_a_mixed_up_answer_is_found(tool: types.ModuleType, v4_directory: pathlib.Path) -> None:
    count = itertools.count()

    def sometimes_another_s(prompt: list[int], params: SamplingParams) -> Sequence[int]:
        place = next(count)  # the warm-up and the solo runs come first
        return echo_of_prompt([*prompt, 1] if place > 8 and place % 5 == 0 else prompt, params)

    problems = load(tool, v4_directory, FakeEngine(sometimes_another_s))
    assert problems and all("alone it was" in problem for problem in problems)


def test_a_leaked_page_is_found(tool: types.ModuleType, v4_directory: pathlib.Path) -> None:
    class Leaky(FakeEngine):
        def abort(self, request_id: str) -> bool:
            leaked = self._requests.get(request_id)
            found = super().abort(request_id)
            if leaked is not None:
                self.leaked = leaked.num_pages
            return found

        leaked = 0

        def stats(self):  # type: ignore[no-untyped-def]
            import dataclasses

            stats = super().stats()
            return dataclasses.replace(stats, pages_used=stats.pages_used + self.leaked)

    engine = Leaky(echo_of_prompt)
    engine.delay_s = 0.005  # so that streams are still going on when they are closed
    problems = load(tool, v4_directory, engine)
    assert len(problems) == 1 and "still held at the end: megamoe_cache_pages_used" in problems[0]


def test_a_lost_answer_is_found(
    tool: types.ModuleType, v4_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that forgets a request: nobody waits for ever, and it is reported."""
    monkeypatch.setattr(tool, "ANSWER_TIMEOUT_S", 2.0)
    count = itertools.count()

    class Forgetful(FakeEngine):
        def _advance(self, request_id: str, request) -> RequestOutput:  # type: ignore[no-untyped-def]
            output = super()._advance(request_id, request)
            if output.finish_reason is not None and next(count) == 60:
                return RequestOutput("nobody", *[getattr(output, name) for name in list(output.__slots__)[1:]])
            return output

    problems = load(tool, v4_directory, Forgetful(echo_of_prompt))
    assert any("no answer within 2 s" in problem for problem in problems)


def test_growing_memory_is_found(tool: types.ModuleType) -> None:
    assert tool.growth([100.0 + place for place in range(80)]) == 40.0
    assert tool.growth([*range(100, 130), *[130.0] * 50]) < 10
    assert tool.growth([1.0, 2.0]) == 0.0
