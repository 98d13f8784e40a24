# SPDX-License-Identifier: Apache-2.0
"""nvfp4_weight_only_experts: decoded weights, and faults F1 (folded tensor scale), F2 (one scale for two), F13."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megamoe.formats.nvfp4 import NvFp4Tensor, quantize
from megamoe.ops import swiglu
from megamoe.ops.nvfp4_weight_only_experts import nvfp4_weight_only_experts
from megamoe.ops.nvfp4_weight_only_linear import nvfp4_weight_only_linear
from megamoe.ops.swiglu import clamped_swiglu
from megamoe.verify.tolerance import assert_within

from .expert_cases import ExpertCase, expected, make_case, same
from .invariance import assert_row_invariant
from .nvfp4_cases import decode, folded

OP = "nvfp4_weight_only_experts"
Weights = tuple[NvFp4Tensor, NvFp4Tensor, NvFp4Tensor]


def _quantized(case: ExpertCase) -> Weights:
    return quantize(case.w1), quantize(case.w3), quantize(case.w2)


def _run(case: ExpertCase, weights: Weights, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    return nvfp4_weight_only_experts(
        *(case.x, case.route_weights, case.expert_ids, *weights),
        shared_output=case.shared_output,
        swiglu_limit=10.0,
        out_dtype=out_dtype,
    )


def _expected(case: ExpertCase, weights: Weights) -> torch.Tensor:
    w1, w3, w2 = map(decode, weights)
    return expected(case, (w1, w3, w2), round_x=same, round_h=lambda h: h.to(case.x.dtype).double())


# --- known answers ---


def test_one_expert_by_hand() -> None:
    """Identity weights of 6 (up) and 6 (gate), x = 1 in one channel: silu(6) * 6 * r through a w2 of 6."""
    eye = quantize((torch.eye(16) * 6.0)[None])
    x = torch.zeros(1, 16)
    x[0, 5] = 1.0
    ids = torch.zeros(1, 1, dtype=torch.int64)
    got = nvfp4_weight_only_experts(x, torch.full((1, 1), 0.5), ids, eye, eye, eye, swiglu_limit=10.0)
    assert got[0, 5].item() == pytest.approx(5.985164261060192 * 6 * 0.5 * 6, rel=1e-5)
    assert int((got != 0).sum()) == 1


# --- properties ---


@pytest.mark.parametrize("num_tokens", [0, 1, 8, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_one_token_at_a_time(num_tokens: int, dtype: torch.dtype, seed: int) -> None:
    case = make_case(num_tokens, seed, dtype)
    weights = _quantized(case)
    want = _expected(case, weights)
    assert_within(OP, _run(case, weights), want.to(dtype))
    tiled = weights[0].tiled(), weights[1].tiled(), weights[2].tiled()
    assert torch.equal(_run(case, tiled), _run(case, weights))


def test_row_invariant(seed: int) -> None:
    case = make_case(70, seed)
    weights = _quantized(case)

    def run(x: torch.Tensor, route: torch.Tensor, ids: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        return nvfp4_weight_only_experts(x, route, ids, *weights, shared_output=shared, swiglu_limit=10.0)

    assert_row_invariant(run, case.x, case.route_weights, case.expert_ids, case.shared_output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_weights_give_what_linears_give(dtype: torch.dtype, seed: int) -> None:
    case = make_case(5, seed, dtype)
    weights, (w1, w3, w2) = _quantized(case), _quantized(make_case(1, seed + 1))
    shared = w1[0], w3[1], w2[2]
    gate, up = (nvfp4_weight_only_linear(case.x, w) for w in shared[:2])
    output = nvfp4_weight_only_linear(clamped_swiglu(gate, up, limit=10.0), shared[2])
    args = case.x, case.route_weights, case.expert_ids, *weights
    want = nvfp4_weight_only_experts(*args, shared_output=output, swiglu_limit=10.0)
    assert torch.equal(nvfp4_weight_only_experts(*args, shared_weights=shared, swiglu_limit=10.0), want)
    with pytest.raises(ValueError, match="by its output or by its weights; got both"):
        nvfp4_weight_only_experts(*args, shared_output=output, shared_weights=shared, swiglu_limit=10.0)
    with pytest.raises(ValueError, match=r"shared_w2 must be \[D, F\]"):
        nvfp4_weight_only_experts(*args, shared_weights=(shared[0], shared[1], shared[1]), swiglu_limit=10.0)


# --- faults ---


def test_one_tensor_scale_for_w1_and_w3_is_caught(seed: int) -> None:
    """Fault F2: a fused gate-up weight keeps one of the two scales."""
    case = make_case(8, seed)
    w1, w3, w2 = _quantized(case)
    assert not torch.equal(w1.tensor_scale, w3.tensor_scale)
    want = _expected(case, (w1, w3, w2)).float()
    assert_within(OP, _run(case, (w1, w3, w2), torch.float32), want)
    for faulty in (
        (w1, dataclasses.replace(w3, tensor_scale=w1.tensor_scale), w2),
        (dataclasses.replace(w1, tensor_scale=w3.tensor_scale), w3, w2),
    ):
        with pytest.raises(AssertionError, match=f"{OP}: .* first at"):
            assert_within(OP, _run(case, faulty, torch.float32), want)


def test_one_tensor_scale_for_all_experts_is_caught(seed: int) -> None:
    case = make_case(8, seed)
    w1, w3, w2 = _quantized(case)
    want = _expected(case, (w1, w3, w2)).float()
    faulty = dataclasses.replace(w3, tensor_scale=w3.tensor_scale.amax().expand(6))
    with pytest.raises(AssertionError, match=f"{OP}: .* first at"):
        assert_within(OP, _run(case, (w1, faulty, w2), torch.float32), want)


def test_a_folded_tensor_scale_is_caught(seed: int) -> None:
    """Fault F1."""
    case = make_case(8, seed)
    w1, w3, w2 = _quantized(case)
    want = _expected(case, (w1, w3, w2)).float()
    for faulty in ((folded(w1), w3, w2), (w1, folded(w3), w2), (w1, w3, folded(w2))):
        with pytest.raises(AssertionError, match=f"{OP}: .* first at"):
            assert_within(OP, _run(case, faulty, torch.float32), want)


def test_a_missing_clamp_is_caught(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Fault F13."""
    case = make_case(8, seed)
    weights = _quantized(case)
    want = _expected(case, weights).float()
    right = swiglu.reference
    monkeypatch.setattr(swiglu, "reference", lambda g, u, limit, w, dtype: right(g, u, None, w, dtype))
    with pytest.raises(AssertionError, match=f"{OP}: .* first at"):
        assert_within(OP, _run(case, weights, torch.float32), want)


# --- refusals ---


def test_refusals() -> None:
    case = make_case(2, 0)
    w1, w3, w2 = _quantized(case)
    args = case.x, case.route_weights, case.expert_ids
    with pytest.raises(TypeError, match=f"{OP}: w1 must be NvFp4Tensor; got float32"):
        nvfp4_weight_only_experts(*args, case.w1, w3, w2, swiglu_limit=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"{OP}: w2 must be \[E, D, F\].*; got NvFp4Tensor \[6, 32, 64\]"):
        nvfp4_weight_only_experts(*args, w1, w3, w1, swiglu_limit=None)
    with pytest.raises(ValueError, match=f"{OP}: expert_ids must be an expert of w1 .*; got -2"):
        ids = torch.full_like(case.expert_ids, -2)
        nvfp4_weight_only_experts(case.x, case.route_weights, ids, w1, w3, w2, swiglu_limit=None)
