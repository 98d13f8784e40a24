# SPDX-License-Identifier: Apache-2.0
"""route_experts: scores by hand, ties, the bias that only selects, the table that only selects."""

from __future__ import annotations

import math

import pytest
import torch

from megamoe.ops.route_experts import route_experts
from megamoe.verify.tolerance import assert_within

from .invariance import assert_row_invariant


def _logit(score: float) -> float:
    """Return g with sqrt(softplus(g)) = score."""
    return math.log(math.expm1(score * score))


GATE = torch.tensor([[_logit(1.0)], [_logit(2.0)], [_logit(0.5)], [_logit(3.0)]])
ONE = torch.ones(1, 1)
FIRST = torch.zeros(1, dtype=torch.int64)


def _expected_weights(x: torch.Tensor, gate: torch.Tensor, ids: torch.Tensor, scaling: float) -> torch.Tensor:
    logits = x.double() @ gate.double().T
    scores = torch.logaddexp(logits, torch.zeros_like(logits)).sqrt().gather(1, ids)
    return (scores / scores.sum(1, keepdim=True) * scaling).float()


# --- known answers ---


def test_scores_by_hand() -> None:
    weights, ids = route_experts(ONE, GATE, token_ids=FIRST, top_k=2, routed_scaling=1.5)
    assert ids.tolist() == [[3, 1]] and ids.dtype == torch.int64
    assert weights[0].tolist() == pytest.approx([1.5 * 3 / 5, 1.5 * 2 / 5], rel=1e-6)


def test_the_bias_selects_but_does_not_weigh() -> None:
    bias = torch.tensor([0.0, 0.0, 10.0, -10.0])
    weights, ids = route_experts(ONE, GATE, token_ids=FIRST, top_k=2, routed_scaling=1.0, bias=bias)
    assert ids.tolist() == [[2, 1]]
    assert weights[0].tolist() == pytest.approx([0.5 / 2.5, 2 / 2.5], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_the_table_selects_and_the_scores_weigh(dtype: torch.dtype) -> None:
    table = torch.tensor([[0, 1], [2, 0], [3, 2]], dtype=dtype)
    x = torch.ones(3, 1)
    token_ids = torch.tensor([2, 0, 2])
    weights, ids = route_experts(x, GATE, top_k=2, routed_scaling=2.5, expert_table=table, token_ids=token_ids)
    assert ids.tolist() == [[3, 2], [0, 1], [3, 2]] and ids.dtype == torch.int64
    assert weights[0].tolist() == pytest.approx([2.5 * 3 / 3.5, 2.5 * 0.5 / 3.5], rel=1e-6)


def test_ties_go_to_the_lowest_expert() -> None:
    gate = torch.tensor([[0.0], [1.0], [0.0], [1.0], [1.0], [0.0]])
    for top_k, want in ((1, [1]), (2, [1, 3]), (4, [1, 3, 4, 0]), (6, [1, 3, 4, 0, 2, 5])):
        assert route_experts(ONE, gate, token_ids=FIRST, top_k=top_k, routed_scaling=1.0)[1].tolist() == [want]
    many = torch.zeros(300, 2)  # enough experts for a sort that is not insertion
    same = route_experts(torch.ones(3, 2), many, token_ids=torch.arange(3), top_k=6, routed_scaling=1.0)[1]
    assert same.tolist() == [[0, 1, 2, 3, 4, 5]] * 3


def test_very_low_and_very_high_logits() -> None:
    gate = torch.tensor([[-60.0], [-50.0], [1e4]])
    weights, ids = route_experts(ONE, gate, token_ids=FIRST, top_k=3, routed_scaling=1.0)
    assert ids.tolist() == [[2, 1, 0]]
    assert weights[0].tolist() == pytest.approx([1.0, math.exp(-25) / 100, math.exp(-30) / 100], rel=1e-5)


# --- properties ---


@pytest.mark.parametrize("num_tokens", [0, 1, 8, 9])
@pytest.mark.parametrize("num_experts,top_k", [(8, 2), (256, 6), (1, 1)])
def test_agrees_with_fp64(num_tokens: int, num_experts: int, top_k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, 96, generator=generator).bfloat16()
    gate = torch.randn(num_experts, 96, generator=generator).bfloat16()
    bias = torch.randn(num_experts, generator=generator)
    tokens = torch.arange(num_tokens)
    weights, ids = route_experts(x, gate, token_ids=tokens, top_k=top_k, routed_scaling=2.5, bias=bias)
    logits = x.double() @ gate.double().T
    selection = torch.logaddexp(logits, torch.zeros_like(logits)).sqrt() + bias
    assert torch.equal(ids, selection.topk(top_k, dim=1).indices)
    assert_within("route_experts", weights, _expected_weights(x, gate, ids, 2.5))
    torch.testing.assert_close(weights.sum(1), torch.full((num_tokens,), 2.5))


def test_row_invariant(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, gate = torch.randn(60, 256, generator=generator), torch.randn(33, 256, generator=generator)
    bias = torch.randn(33, generator=generator)
    table = torch.randint(33, (50, 6), generator=generator)
    token_ids = torch.randint(50, (60,), generator=generator)

    def both(rows: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        by_table = route_experts(rows, gate, top_k=6, routed_scaling=1.5, expert_table=table, token_ids=ids)
        by_score = route_experts(rows, gate, top_k=6, routed_scaling=1.5, bias=bias, token_ids=ids)
        return *by_score, *by_table

    assert_row_invariant(both, x, token_ids)


def test_weights_from_biased_scores_are_caught(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, gate = torch.randn(5, 32, generator=generator), torch.randn(8, 32, generator=generator)
    bias = torch.rand(8, generator=generator)
    weights, ids = route_experts(x, gate, token_ids=torch.arange(5), top_k=2, routed_scaling=1.0, bias=bias)
    biased = (torch.nn.functional.softplus(x @ gate.T).sqrt() + bias).gather(1, ids)
    with pytest.raises(AssertionError, match="route_experts: .* first at"):
        assert_within("route_experts", biased / biased.sum(1, keepdim=True), weights)


# --- refusals ---


def test_refusals() -> None:
    x, gate = torch.zeros(2, 4), torch.zeros(3, 4)
    table, ids = torch.zeros(5, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    for top_k in (0, 4):
        with pytest.raises(ValueError, match=f"route_experts: top_k must be 1 to 3 .*; got {top_k}"):
            route_experts(x, gate, token_ids=ids, top_k=top_k, routed_scaling=1.0)
    with pytest.raises(ValueError, match=r"bias must be \[E\].*E = 3; got float32 \[4\]"):
        route_experts(x, gate, token_ids=ids, top_k=2, routed_scaling=1.0, bias=torch.zeros(4))
    with pytest.raises(ValueError, match="bias only selects experts by score; got bias and expert_table"):
        route_experts(x, gate, top_k=2, routed_scaling=1.0, bias=torch.zeros(3), expert_table=table, token_ids=ids)
    with pytest.raises(ValueError, match=r"token_ids must be \[T\]"):
        route_experts(x, gate, top_k=2, routed_scaling=1.0, token_ids=ids[:1])
    with pytest.raises(ValueError, match=r"expert_table must be \[V, 1\]"):
        route_experts(x, gate, top_k=1, routed_scaling=1.0, expert_table=table, token_ids=ids)
    for bad in (-2, 5):
        wrong = torch.tensor([0, bad])
        allowed = r"-1 \(nobody\) or 0 to 4, the rows of expert_table"
        with pytest.raises(ValueError, match=f"token_ids must be {allowed}; got {bad}"):
            route_experts(x, gate, top_k=2, routed_scaling=1.0, expert_table=table, token_ids=wrong)
    with pytest.raises(ValueError, match=r"token_ids must be -1 \(nobody\) or 0 and more, the ids of tokens; got -2"):
        route_experts(x, gate, top_k=2, routed_scaling=1.0, token_ids=torch.tensor([0, -2]))
    with pytest.raises(ValueError, match="expert_table must be 0 to 2, the experts of gate; got 3"):
        route_experts(x, gate, top_k=2, routed_scaling=1.0, expert_table=table + 3, token_ids=ids)
