# SPDX-License-Identifier: Apache-2.0
"""Sampling in the engine: every parameter, and chi-square bounds on what is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import hypothesis
import pytest
import torch
from hypothesis import strategies

from megamoe.engine.request import Request
from megamoe.engine.sampler import NO_TOKEN, choose_drafts, sample_rows
from megamoe.engine.sampling_params import SamplingParams

from ..host_reads import count_host_reads

VOCAB = 12
LOGITS = torch.tensor([1.2, 0.3, -0.5, 2.0, 0.0, -1.0, 0.9, 1.5, -2.0, 0.4, 0.1, -0.2])


class Only:
    """A filter that allows some tokens, or all, and remembers what was chosen."""

    def __init__(self, ids: Sequence[int] | None, size: int = VOCAB) -> None:
        self.ids, self.size, self.accepted = ids, size, []

    def allowed(self) -> torch.Tensor | None:
        if self.ids is None:
            return None
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[list(self.ids)] = True
        return mask

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def request(
    params: SamplingParams,
    prompt: Sequence[int] = (0,),
    output: Sequence[int] = (),
    stop: Sequence[int] = (),
    only=None,
) -> Request:
    made = Request("r", 0, prompt, params, max_length=99, stop_ids=frozenset(stop), logits_filter=only)
    made.ids += output
    return made


def draw(params: SamplingParams, **state: object) -> int:
    one = request(params, **state)  # type: ignore[arg-type]
    return sample_rows(LOGITS[None], [one], [0]).token_ids[0]


def sampled(count: int, prompt: Sequence[int] = (0,), output: Sequence[int] = (), stop=(), only=None, **params) -> list:
    """Return one token from each of `count` seeds, drawn in one call."""
    requests = [request(SamplingParams(seed=seed, **params), prompt, output, stop, only) for seed in range(count)]
    return sample_rows(LOGITS.expand(count, -1), requests, [0] * count).token_ids


def chi_square(tokens: list[int], probabilities: torch.Tensor) -> float:
    """Return the statistic over tokens with an expected count of 5 or more; others must not occur or are pooled."""
    count = len(tokens)
    observed = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()
    assert not bool((observed[probabilities == 0] > 0).any()), "a token that has no probability was drawn"
    expected = probabilities * count
    assert bool((expected[probabilities > 0] >= 5).all()), "too few draws for this distribution"
    used = probabilities > 0
    return float(((observed - expected)[used] ** 2 / expected[used]).sum())


BOUND = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 10: 29.6, 11: 31.3}  # exceeded once in a thousand, by freedom


def softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().softmax(0)


def only_best(logits: torch.Tensor, count: int) -> torch.Tensor:
    return logits.masked_fill(logits < logits.sort(descending=True).values[count - 1], -math.inf)


# known answers


def test_bias_bans_and_prefers() -> None:
    assert draw(SamplingParams()) == 3
    assert draw(SamplingParams(logit_bias={3: -100.0})) == 7
    assert draw(SamplingParams(logit_bias={5: 3.1, 3: 0.05})) == 5
    assert draw(SamplingParams(logit_bias={5: 3.1, 3: 0.2})) == 3


def test_repetition_looks_at_prompt_and_output() -> None:
    """2.0 / 1.4 is below 1.5; and negative logits get worse."""
    params = SamplingParams(repetition_penalty=1.4)
    assert draw(params, prompt=(3, 1)) == draw(params, output=(3,)) == 7
    assert draw(params, prompt=(2, 4)) == 3
    assert draw(SamplingParams(repetition_penalty=0.1, logit_bias={}), prompt=(6,)) == 6, "below 1 it attracts"


def test_presence_and_frequency_look_at_the_output_alone() -> None:
    assert draw(SamplingParams(presence_penalty=0.6), prompt=(3,)) == 3
    assert draw(SamplingParams(presence_penalty=0.6), output=(3,)) == 7
    assert draw(SamplingParams(presence_penalty=0.4), output=(3, 3, 3)) == 3
    assert draw(SamplingParams(frequency_penalty=0.2), output=(3, 3)) == 3
    assert draw(SamplingParams(frequency_penalty=0.2), output=(3, 3, 3)) == 7
    assert draw(SamplingParams(frequency_penalty=-1.0), output=(6, 6)) == 6


def test_min_tokens_keeps_stops_away() -> None:
    params = SamplingParams(min_tokens=2, max_tokens=9)
    assert draw(params, stop=(3,)) == draw(params, stop=(3,), output=(5,)) == 7
    assert draw(params, stop=(3,), output=(5, 5)) == 3
    assert draw(params) == 3
    two_rows = sample_rows(LOGITS.expand(3, -1), [request(params, stop=(3,))] * 3, [0, 1, 2])
    assert two_rows.token_ids == [7, 7, 3], "drafts count"


def test_a_filter_allows_what_it_allows() -> None:
    assert draw(SamplingParams(), only=Only([2, 8])) == 2
    assert draw(SamplingParams(logit_bias={8: 3.0}), only=Only([2, 8])) == 8
    assert draw(SamplingParams(), only=Only(None)) == 3
    assert draw(SamplingParams(), only=Only([1, 2], size=3)) == 1, "what lies beyond its mask is not allowed"
    assert draw(SamplingParams(), only=Only([8, VOCAB], size=VOCAB + 5)) == 8, "nor ids that the model does not have"
    assert draw(SamplingParams(), only=Only([])) == NO_TOKEN


def test_a_filter_that_only_allows_the_end_wins_over_min_tokens() -> None:
    params = SamplingParams(min_tokens=5, max_tokens=9)
    assert draw(params, stop=(2,), only=Only([2])) == 2
    assert draw(params, stop=(2,), only=Only([2, 8])) == 8


def test_logprobs_are_the_models_own() -> None:
    """Whatever bias, penalty or temperature chose the token, its probability is that of the plain softmax."""
    want = LOGITS.double().log_softmax(0)
    params = SamplingParams(logprobs=2, logit_bias={5: 90.0}, temperature=2.0, seed=1, repetition_penalty=3.0)
    found = sample_rows(LOGITS[None], [request(params, prompt=(3,))], [0])
    assert found.token_ids == [5] and found.logprobs is not None and found.logprobs[0] is not None
    one = found.logprobs[0]
    assert one.token_id == 5 and [token_id for token_id, _ in one.top] == [3, 7]
    assert one.logprob == pytest.approx(float(want[5]), abs=1e-6)
    assert one.top[1][1] == pytest.approx(float(want[7]), abs=1e-6)


def test_every_row_gets_what_it_asked_for() -> None:
    rows = [request(SamplingParams(logprobs=number)) for number in (None, 0, 3)]
    found = sample_rows(LOGITS.expand(3, -1), rows, [0, 0, 0]).logprobs
    assert found is not None and found[0] is None
    assert [len(one.top) for one in found[1:] if one is not None] == [0, 3]
    assert sample_rows(LOGITS[None], rows[:1], [0]).logprobs is None


def test_the_logits_are_left_alone() -> None:
    logits = LOGITS[None].clone()
    sample_rows(logits, [request(SamplingParams(logit_bias={1: 5.0}), only=Only([1]))], [0])
    assert torch.equal(logits[0], LOGITS)


# properties: no request can break a step


@hypothesis.given(
    params=strategies.fixed_dictionaries(
        {},
        optional={
            "temperature": strategies.floats(0, 1e6),
            "top_p": strategies.floats(1e-9, 1),
            "top_k": strategies.integers(0, 2**63 - 1),
            "min_p": strategies.floats(0, 1),
            "seed": strategies.integers(0, 2**63 - 1),
            "repetition_penalty": strategies.floats(1e-3, 1e3),
            "presence_penalty": strategies.floats(-2, 2),
            "frequency_penalty": strategies.floats(-2, 2),
            "logit_bias": strategies.dictionaries(strategies.integers(0, VOCAB - 1), strategies.floats(-1e6, 1e6)),
            "min_tokens": strategies.integers(0, 3),
            "logprobs": strategies.integers(0, 20),
        },
    ),
    stop=strategies.lists(strategies.integers(0, VOCAB - 1)),
    output=strategies.lists(strategies.integers(0, VOCAB - 1), max_size=4),
    only=strategies.none() | strategies.lists(strategies.integers(0, VOCAB - 1)),
)
def test_whatever_params_accepts_gives_a_token(params, stop, output, only) -> None:
    one = request(SamplingParams(**params), output=output, stop=stop, only=None if only is None else Only(only))
    found = sample_rows(LOGITS[None] * 30, [one], [0])
    (token_id,) = found.token_ids
    assert 0 <= token_id < VOCAB or (token_id == NO_TOKEN and only == [])
    assert only is None or not only or token_id in only
    if "logprobs" in params:
        assert found.logprobs is not None and found.logprobs[0] is not None
        assert -math.inf < found.logprobs[0].logprob <= 1e-6


# properties: what a step waits for

EVERY_KIND = [
    request(SamplingParams(temperature=1.0, seed=1)),
    request(SamplingParams(logit_bias={3: -5.0, 2: 1.0})),
    request(SamplingParams(temperature=2.0, min_p=0.1, repetition_penalty=1.3, frequency_penalty=0.5), (3, 7), (1,)),
    request(SamplingParams(min_tokens=3, max_tokens=9), stop=(3,), only=Only([1, 3])),
    request(SamplingParams(), only=Only([])),
    request(SamplingParams(logprobs=3, temperature=1.0)),
    request(SamplingParams(logprobs=0)),
]


@pytest.mark.parametrize("rows", [EVERY_KIND[:1], EVERY_KIND[:5], EVERY_KIND[5:], EVERY_KIND], ids=len)
def test_a_step_reads_the_device_once(rows: list[Request]) -> None:
    """Tokens and log-probabilities come together: every other read would be one more wait for the device."""
    logits = LOGITS.expand(len(rows), -1)
    with count_host_reads() as reads:
        found = sample_rows(logits, rows, [0] * len(rows))
    assert len(found.token_ids) == len(rows) and reads.operations[-1] in ("sample", "token_logprobs")
    assert len(reads.places) == 1, reads.places


# properties: distributions, 6000 draws each


@pytest.mark.parametrize(
    ("params", "probabilities", "freedom"),
    [
        ({"temperature": 1.0}, softmax(LOGITS), 11),
        ({"temperature": 1.7}, softmax(LOGITS / 1.7), 11),
        ({"temperature": 0.6, "top_k": 4}, softmax(only_best(LOGITS, 4) / 0.6), 3),
        ({"temperature": 1.0, "top_p": 0.75}, softmax(only_best(LOGITS, 5)), 4),
        ({"temperature": 1.0, "min_p": 0.3}, softmax(only_best(LOGITS, 4)), 3),
        ({"temperature": 1.0, "top_k": 5, "min_p": 0.4, "top_p": 0.9}, softmax(only_best(LOGITS, 3)), 2),
        ({"temperature": 1.0, "logit_bias": {5: 2.0}}, softmax(LOGITS + 2.0 * (torch.arange(VOCAB) == 5)), 11),
        ({"temperature": 1.0, "presence_penalty": 1.0, "output": (3, 3)}, softmax(LOGITS - 1.0 * (LOGITS == 2.0)), 11),
        ({"temperature": 1.0, "frequency_penalty": 0.5, "output": (3, 3)}, softmax(LOGITS - 1.0 * (LOGITS == 2.0)), 11),
        ({"temperature": 1.0, "repetition_penalty": 2.0, "prompt": (3,)}, softmax(LOGITS - 1.0 * (LOGITS == 2.0)), 11),
        (
            {"temperature": 1.0, "min_tokens": 1, "stop": (3,)},
            softmax(LOGITS.masked_fill(LOGITS == 2.0, -math.inf)),
            10,
        ),
        ({"temperature": 1.0, "only": Only([0, 3, 7])}, softmax(only_best(LOGITS, 3)), 2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_draws_follow_the_distribution(params: dict, probabilities: torch.Tensor, freedom: int) -> None:
    assert int((probabilities > 0).sum()) == freedom + 1
    assert chi_square(sampled(6000, **params), probabilities) < BOUND[freedom]


def test_the_chi_square_bound_can_fail() -> None:
    assert chi_square(sampled(6000, temperature=1.1), softmax(LOGITS)) > BOUND[11]


def test_draws_along_a_sequence_follow_the_distribution() -> None:
    """One seed, 6000 tokens one after the other: the number of a token is that of its index."""
    requests = [request(SamplingParams(temperature=1.0, seed=4), output=[3] * index) for index in range(6000)]
    tokens = sample_rows(LOGITS.expand(6000, -1), requests, [0] * 6000).token_ids
    assert chi_square(tokens, softmax(LOGITS)) < BOUND[11]


def test_a_row_does_not_depend_on_its_company() -> None:
    rows = [
        request(SamplingParams(temperature=1.0, seed=1, logprobs=3)),
        request(SamplingParams(temperature=0.0, logit_bias={3: -5.0})),
        request(SamplingParams(temperature=2.0, seed=3, min_p=0.1, repetition_penalty=1.3), prompt=(3, 7, 7)),
        request(SamplingParams(temperature=1.0, seed=1), only=Only([1, 2, 3])),
        request(SamplingParams(temperature=1.0, top_k=3, seed=9, frequency_penalty=1.0), output=(1, 3)),
        request(SamplingParams(logprobs=0)),
    ]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(1))
    together = sample_rows(logits, rows, [0] * len(rows))
    for row, one in enumerate(rows):
        alone = sample_rows(logits[row : row + 1], [one], [0])
        assert alone.token_ids == together.token_ids[row : row + 1]
        assert together.logprobs is not None
        assert (alone.logprobs or [None]) == together.logprobs[row : row + 1]


def test_a_draft_is_the_best_guess() -> None:
    logits = torch.stack([LOGITS, -LOGITS, torch.tensor([0.0, 1.0, 1.0] + [0.0] * (VOCAB - 3))])
    assert choose_drafts(logits, 0).tolist() == [3, 8, 1]


def test_checking_a_draft_is_rejection_sampling() -> None:
    """Accepted with probability p(draft); otherwise distributed as p without the draft. 6000 draws."""
    probabilities, tokens = softmax(LOGITS), sampled(6000, temperature=1.0)
    draft = int(choose_drafts(LOGITS[None], 0)[0])
    rejected = [token for token in tokens if token != draft]
    share = 1 - len(rejected) / 6000
    assert abs(share - float(probabilities[draft])) < 3.3 * (0.25 / 6000) ** 0.5
    rest = probabilities.clone()
    rest[draft] = 0
    assert chi_square(rejected, rest / rest.sum()) < BOUND[10]
