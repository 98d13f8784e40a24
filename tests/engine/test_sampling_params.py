# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters mean what they say or are refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

import megamoe
from megamoe.engine.sampling_params import SamplingParams


def test_default_is_greedy() -> None:
    params = SamplingParams()
    assert params.is_greedy and params.temperature == 0 and params.top_k == 0 and params.top_p == 1
    assert params.seed is None and params.stop_token_ids == ()


def test_it_is_the_public_class() -> None:
    assert megamoe.SamplingParams is SamplingParams


@pytest.mark.parametrize(
    "good",
    [
        {"max_tokens": 0},
        {"temperature": 0},
        {"temperature": 1e-6},
        {"top_p": 1},
        {"top_p": 1e-6},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"top_k": 2**63 - 1},
        {"stop_token_ids": (1, 2)},
    ],
    ids=str,
)
def test_edges_are_allowed(good: dict[str, Any]) -> None:
    params = SamplingParams(**good)
    assert {name: getattr(params, name) for name in good} == good


def test_lists_become_tuples_so_that_params_are_frozen() -> None:
    ids = [3, 4]
    params = SamplingParams(stop_token_ids=ids)  # type: ignore[arg-type]
    ids.append(5)
    assert params.stop_token_ids == (3, 4) and hash(params)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.max_tokens = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"max_tokens": -1}, "max_tokens must be 0 or more; got -1"),
        ({"top_k": -1}, "top_k must be 0 or more; got -1"),
        ({"top_k": 2**63}, r"top_k must be below 2\*\*63"),
        ({"seed": -1}, "seed must be 0 or more; got -1"),
        ({"seed": 2**63}, r"seed must be below 2\*\*63"),
        ({"temperature": -0.1}, "temperature must be 0 .* or more; got -0.1"),
        ({"temperature": math.nan}, "temperature must be 0 .*; got nan"),
        ({"temperature": math.inf}, "temperature must be 0 .*; got inf"),
        ({"top_p": 0.0}, "top_p must be more than 0 and at most 1; got 0.0"),
        ({"top_p": 1.0001}, "top_p must be more than 0 and at most 1; got 1.0001"),
        ({"top_p": math.nan}, "top_p must be more than 0 and at most 1; got nan"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids must be 0 or more; got -1"),
    ],
    ids=str,
)
def test_values_out_of_range(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"sampling: {message}"):
        SamplingParams(**bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 1.0},
        {"max_tokens": True},
        {"max_tokens": "3"},
        {"temperature": "0"},
        {"top_p": True},
        {"seed": 1.5},
        {"stop_token_ids": "12"},
        {"stop_token_ids": 1},
        {"stop_token_ids": (1.0,)},
    ],
    ids=str,
)
def test_values_of_another_type(bad: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"sampling: {next(iter(bad))} must be"):
        SamplingParams(**bad)
