# SPDX-License-Identifier: Apache-2.0
"""experts: two experts by hand, the skeleton all four operations share, and the missing clamp of fault F13."""

from __future__ import annotations

import math

import pytest
import torch

from megamoe.ops import swiglu
from megamoe.ops.experts import experts
from megamoe.verify.tolerance import assert_within

from .expert_cases import ExpertCase, expected, make_case, same
from .invariance import assert_row_invariant


def _run(case: ExpertCase, limit: float | None = 10.0, **options: object) -> torch.Tensor:
    return experts(
        *(case.x, case.route_weights, case.expert_ids, case.w1, case.w3, case.w2),
        shared_output=case.shared_output,
        swiglu_limit=limit,
        **options,  # type: ignore[arg-type]
    )


def _expected(case: ExpertCase, **options: object) -> torch.Tensor:
    weights = case.w1.double(), case.w3.double(), case.w2.double()
    return expected(
        *(case, weights),
        round_x=same,
        round_h=lambda h: h.to(case.x.dtype).double(),
        **options,  # type: ignore[arg-type]
    )


# --- known answers ---


def test_two_experts_by_hand() -> None:
    """D = F = 1: expert e maps v to w2 * silu(w1 v) * (w3 v) * r."""
    w1, w3, w2 = (torch.tensor(w).view(3, 1, 1) for w in ([1.0, 2.0, 9.0], [1.0, 3.0, 9.0], [10.0, 100.0, 9.0]))
    x = torch.tensor([[1.0], [2.0]])
    ids = torch.tensor([[1, 0], [0, 1]])
    route = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    shared = torch.tensor([[5.0], [-5.0]])

    def silu(value: float) -> float:
        return value / (1 + math.exp(-value))

    want = [
        [100 * silu(2.0) * 3 * 0.25 + 10 * silu(1.0) * 1 * 0.75 + 5],
        [10 * silu(2.0) * 2 * 1.0 - 5],
    ]
    got = experts(x, route, ids, w1, w3, w2, shared_output=shared, swiglu_limit=10.0)
    torch.testing.assert_close(got, torch.tensor(want))
    without = experts(x, route, ids, w1, w3, w2, swiglu_limit=10.0)
    torch.testing.assert_close(without, torch.tensor(want) - shared)


def test_slots_are_added_in_order_in_fp32_and_rounded_once() -> None:
    """256, 1 and 1 in bf16: one rounding gives 258, a rounding at every step 256."""
    ones = torch.ones(3, 1, 1)
    x = torch.full((1, 1), 100.0).bfloat16()
    w2 = torch.tensor([256.0, 1.0, 1.0]).view(3, 1, 1) / 100 / 100
    route = torch.ones(1, 3)
    got = experts(x, route, torch.tensor([[0, 1, 2]]), ones, ones, w2, swiglu_limit=None)
    assert got.item() == 258.0


def test_an_expert_in_both_slots_counts_twice() -> None:
    case = make_case(1, 0, torch.float32)
    args = case.x, case.route_weights
    twice = experts(*args, torch.tensor([[4, 4]]), case.w1, case.w3, case.w2, swiglu_limit=10.0)
    merged = experts(
        case.x,
        case.route_weights.sum(1, keepdim=True),
        torch.tensor([[4]]),
        case.w1,
        case.w3,
        case.w2,
        swiglu_limit=10.0,
    )
    torch.testing.assert_close(twice, merged, rtol=1e-5, atol=1e-5)


# --- properties ---


@pytest.mark.parametrize("num_tokens", [0, 1, 8, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_one_token_at_a_time(num_tokens: int, dtype: torch.dtype, seed: int) -> None:
    case = make_case(num_tokens, seed, dtype)
    want = _expected(case)
    assert_within("experts", _run(case), want.to(dtype))
    assert_within("experts", _run(case, out_dtype=torch.float32), want.float())


def test_row_invariant(seed: int) -> None:
    case = make_case(70, seed)

    def run(x: torch.Tensor, route: torch.Tensor, ids: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        return experts(x, route, ids, case.w1, case.w3, case.w2, shared_output=shared, swiglu_limit=10.0)

    assert_row_invariant(run, case.x, case.route_weights, case.expert_ids, case.shared_output)


def test_renaming_experts_changes_nothing(seed: int) -> None:
    case = make_case(20, seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    renamed = ExpertCase(
        *(case.x, case.route_weights, order.argsort()[case.expert_ids]),
        *(case.w1[order], case.w3[order], case.w2[order], case.shared_output),
    )
    assert torch.equal(_run(renamed), _run(case))


def test_experts_without_tokens_are_not_touched(seed: int) -> None:
    """Expert 3 is chosen by no token: NaN weights there must not matter."""
    case = make_case(20, seed)
    want = _run(case)
    for weight in (case.w1, case.w3, case.w2):
        weight[3] = float("nan")
    assert torch.equal(_run(case), want)


# --- faults ---


def test_a_missing_clamp_is_caught(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Fault F13 on the routed path."""
    case = make_case(8, seed, torch.float32)
    want = _expected(case).float()
    assert_within("experts", _run(case), want)
    right = swiglu.reference
    monkeypatch.setattr(swiglu, "reference", lambda g, u, limit, w, dtype: right(g, u, None, w, dtype))
    with pytest.raises(AssertionError, match="experts: .* first at"):
        assert_within("experts", _run(case), want)


def test_w1_and_w3_in_the_wrong_order_are_caught(seed: int) -> None:
    case = make_case(8, seed, torch.float32)
    swapped = ExpertCase(case.x, case.route_weights, case.expert_ids, case.w3, case.w1, case.w2, case.shared_output)
    with pytest.raises(AssertionError, match="experts: .* first at"):
        assert_within("experts", _run(swapped), _expected(case).float())


def test_the_route_weight_is_inside_the_rounding_of_h() -> None:
    """h = 64 * 1.0048828125 = 64.3125 is 64.5 in bf16; times 3 is 193.5, 194 in bf16. After w2 it would be 193."""
    one = torch.ones(1, 1, 1)
    x = torch.full((1, 1), 64.0).bfloat16()
    route = torch.full((1, 1), 1.0048828125)
    got = experts(x, route, torch.zeros(1, 1, dtype=torch.int64), one, one / 64, one * 3, swiglu_limit=None)
    assert got.item() == 194.0


# --- refusals ---


def test_refusals() -> None:
    case = make_case(2, 0)
    ids = case.expert_ids.clone()
    ids[1, 0] = -2
    with pytest.raises(
        ValueError, match=r"experts: expert_ids must be an expert of w1 \(0 to 5\), 6 or more .*; got -2"
    ):
        experts(case.x, case.route_weights, ids, case.w1, case.w3, case.w2, swiglu_limit=None)
    args = case.x, case.route_weights, case.expert_ids
    with pytest.raises(ValueError, match=r"experts: w2 must be \[E, D, F\].*; got float32 \[6, 32, 64\]"):
        experts(*args, case.w1, case.w3, case.w2.transpose(1, 2), swiglu_limit=None)
    with pytest.raises(ValueError, match=r"experts: w3 must be \[E, F, D\].*; got float32 \[5, 32, 64\]"):
        experts(*args, case.w1, case.w3[:5], case.w2, swiglu_limit=None)
    with pytest.raises(ValueError, match=r"experts: shared_output must be \[T, D\]"):
        experts(*args, case.w1, case.w3, case.w2, shared_output=case.x[:1], swiglu_limit=None)
    with pytest.raises(ValueError, match="experts: the SwiGLU limit must be positive; got 0"):
        experts(*args, case.w1, case.w3, case.w2, swiglu_limit=0.0)
    with pytest.raises(TypeError, match="experts: route_weights must be float32; got bfloat16"):
        experts(case.x, case.route_weights.bfloat16(), case.expert_ids, case.w1, case.w3, case.w2, swiglu_limit=None)
