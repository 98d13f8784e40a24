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
        {"min_tokens": 128},
        {"min_p": 1.0},
        {"repetition_penalty": 1e-3},
        {"presence_penalty": -2},
        {"frequency_penalty": 2.0},
        {"logit_bias": {0: -100.0, 7: 5}},
        {"ignore_eos": True},
        {"logprobs": 0},
        {"logprobs": 20},
    ],
    ids=str,
)
def test_edges_are_allowed(good: dict[str, Any]) -> None:
    params = SamplingParams(**good)
    assert {name: getattr(params, name) for name in good} == good


def test_as_many_ids_as_allowed_and_one_more() -> None:
    params = SamplingParams(stop_token_ids=tuple(range(1024)), logit_bias=dict.fromkeys(range(4096), 1.0))
    assert len(params.stop_token_ids) == 1024 and len(params.logit_bias) == 4096
    with pytest.raises(ValueError, match="stop_token_ids must have at most 1024 ids; got 1025"):
        SamplingParams(stop_token_ids=tuple(range(1025)))
    with pytest.raises(ValueError, match="logit_bias must have at most 4096 entries; got 4097"):
        SamplingParams(logit_bias=dict.fromkeys(range(4097), 0.0))


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
        ({"min_tokens": -1}, "min_tokens must be 0 or more; got -1"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be at most max_tokens; got 5 and 4"),
        ({"min_p": 1.1}, "min_p must be 0 to 1; got 1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be 1e-3 to 1e3; got 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be 1e-3 to 1e3; got inf"),
        ({"presence_penalty": 2.1}, "presence_penalty must be -2 to 2; got 2.1"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must be -2 to 2; got nan"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias must be 0 or more; got -1"),
        ({"logit_bias": {1: math.inf}}, "logit_bias must be -1e6 to 1e6; got inf"),
        ({"logit_bias": {1: -1e38}}, "logit_bias must be -1e6 to 1e6; got -1e[+]38"),
        ({"logprobs": 21}, "logprobs must be at most 20; got 21"),
        ({"top_k": -1}, "top_k must be 0 or more; got -1"),
        ({"top_k": 2**63}, r"top_k must be below 2\*\*63"),
        ({"seed": -1}, "seed must be 0 or more; got -1"),
        ({"seed": 2**63}, r"seed must be below 2\*\*63"),
        ({"temperature": -0.1}, "temperature must be 0 .* to 1e6; got -0.1"),
        ({"temperature": 1e39}, "temperature must be 0 .* to 1e6; got 1e[+]39"),
        ({"temperature": math.nan}, "temperature must be 0 .*; got nan"),
        ({"temperature": math.inf}, "temperature must be 0 .*; got inf"),
        ({"top_p": 0.0}, "top_p must be 1e-9 to 1; got 0.0"),
        ({"top_p": 1e-50}, "top_p must be 1e-9 to 1; got 1e-50"),
        ({"top_p": 1.0001}, "top_p must be 1e-9 to 1; got 1.0001"),
        ({"top_p": math.nan}, "top_p must be 1e-9 to 1; got nan"),
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


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"logit_bias": [(1, 2.0)]}, "logit_bias must map token ids to numbers"),
        ({"logit_bias": {"1": 2.0}}, "logit_bias must be an integer; got '1'"),
        ({"logit_bias": {1: "2"}}, "logit_bias must be a number; got '2'"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False; got 1"),
        ({"logprobs": True}, "logprobs must be an integer; got True"),
        ({"min_tokens": None}, "min_tokens must be an integer; got None"),
    ],
    ids=str,
)
def test_new_fields_of_the_wrong_type(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SamplingParams(**bad)


def test_biases_are_copied() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 9.0
    assert params.logit_bias == {1: 2.0} and hash(params)


def test_penalties_are_known() -> None:
    assert not SamplingParams(logit_bias={1: 1.0}).has_penalties
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert SamplingParams(**{name: 1.5}).has_penalties  # type: ignore[arg-type]
