# SPDX-License-Identifier: Apache-2.0
"""Batching pays, and the engine's own time is small beside a model's; by the tool that prints both."""

from __future__ import annotations

import importlib.util
import pathlib
import statistics

import pytest

import megamoe


@pytest.fixture(scope="module")
def tool(repository: pathlib.Path):
    spec = importlib.util.spec_from_file_location("engine_overhead", repository / "tools" / "engine_overhead.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_batch_8_gives_three_times_the_tokens_of_batch_1(tool) -> None:
    model = megamoe.load("tiny")
    seconds = tool.step_seconds({batch: tool.make_engine(model, batch) for batch in (1, 8)}, rounds=9)
    one, eight = (statistics.median(seconds[batch]) for batch in (1, 8))
    assert 8 * one / eight >= 3


def test_the_engines_own_time(tool) -> None:
    """A loose bound: it must notice a loop over layers or sequences, not another machine."""
    model = megamoe.load("tiny")
    assert tool.overhead_seconds(model, batch=8, rounds=60, temperature=0.0) < 1e-3
