# SPDX-License-Identifier: Apache-2.0
"""nvfp4_experts: x and h quantized per token, and faults F1, F2, F13 and a missing requantization."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megamoe.formats.nvfp4 import NvFp4Tensor, quantize
from megamoe.ops import swiglu
from megamoe.ops.nvfp4_experts import nvfp4_experts
from megamoe.ops.nvfp4_linear import nvfp4_linear
from megamoe.ops.nvfp4_weight_only_experts import nvfp4_weight_only_experts
from megamoe.ops.quantize import quantize_nvfp4
from megamoe.ops.swiglu import clamped_swiglu
from megamoe.verify.tolerance import assert_within

from .expert_cases import ExpertCase, expected, make_case, same
from .invariance import assert_row_invariant
from .nvfp4_cases import decode, folded

Weights = tuple[NvFp4Tensor, NvFp4Tensor, NvFp4Tensor]


def _quantized(case: ExpertCase) -> Weights:
    return quantize(case.w1), quantize(case.w3), quantize(case.w2)


def _run(case: ExpertCase, weights: Weights, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    return nvfp4_experts(
        *(case.x, case.route_weights, case.expert_ids, *weights),
        shared_output=case.shared_output,
        swiglu_limit=10.0,
        out_dtype=out_dtype,
    )


def _round(values: torch.Tensor) -> torch.Tensor:
    return decode(quantize_nvfp4(values.float()))


def _expected(case: ExpertCase, weights: Weights) -> torch.Tensor:
    w1, w3, w2 = map(decode, weights)
    return expected(case, (w1, w3, w2), round_x=_round, round_h=_round)


# --- known answers ---


def test_one_expert_by_hand() -> None:
    """h = silu(6) * 6 * r in one channel alone: its own amax, so NVFP4 holds it up to fp32 rounding."""
    eye = quantize((torch.eye(16) * 6.0)[None])
    x = torch.zeros(1, 16)
    x[0, 5] = 1.0
    ids = torch.zeros(1, 1, dtype=torch.int64)
    got = nvfp4_experts(x, torch.full((1, 1), 0.5), ids, eye, eye, eye, swiglu_limit=10.0)
    assert got[0, 5].item() == pytest.approx(5.985164261060192 * 6 * 0.5 * 6, rel=1e-5)
    assert int((got != 0).sum()) == 1


# --- properties ---


@pytest.mark.parametrize("num_tokens", [0, 1, 8, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_one_token_at_a_time(num_tokens: int, dtype: torch.dtype, seed: int) -> None:
    case = make_case(num_tokens, seed, dtype)
    weights = _quantized(case)
    assert_within("nvfp4_experts", _run(case, weights), _expected(case, weights).to(dtype))


def test_row_invariant_with_tokens_of_very_different_size(seed: int) -> None:
    case = make_case(70, seed)
    x = (case.x.float() * torch.logspace(-3, 1, 70)[:, None]).bfloat16()
    weights = _quantized(case)

    def run(x: torch.Tensor, route: torch.Tensor, ids: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        return nvfp4_experts(x, route, ids, *weights, shared_output=shared, swiglu_limit=10.0)

    assert_row_invariant(run, x, case.route_weights, case.expert_ids, case.shared_output)


def test_a_token_of_zeros_gives_the_shared_output(seed: int) -> None:
    case = make_case(3, seed)
    case.x[1] = 0.0
    assert torch.equal(_run(case, _quantized(case))[1], case.shared_output[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_weights_give_what_linears_give(dtype: torch.dtype, seed: int) -> None:
    case = make_case(5, seed, dtype)
    weights, (w1, w3, w2) = _quantized(case), _quantized(make_case(1, seed + 1))
    shared = w1[0], w3[1], w2[2]
    source = quantize_nvfp4(case.x)
    gate, up = (nvfp4_linear(source, w, out_dtype=dtype) for w in shared[:2])
    hidden = quantize_nvfp4(clamped_swiglu(gate, up, limit=10.0))
    output = nvfp4_linear(hidden, shared[2], out_dtype=dtype)
    args = case.x, case.route_weights, case.expert_ids, *weights
    want = nvfp4_experts(*args, shared_output=output, swiglu_limit=10.0)
    assert torch.equal(nvfp4_experts(*args, shared_weights=shared, swiglu_limit=10.0), want)
    with pytest.raises(ValueError, match="by its output or by its weights; got both"):
        nvfp4_experts(*args, shared_output=output, shared_weights=shared, swiglu_limit=10.0)
    with pytest.raises(ValueError, match=r"shared_w2 must be \[D, F\]"):
        nvfp4_experts(*args, shared_weights=(shared[0], shared[1], shared[1]), swiglu_limit=10.0)


# --- faults ---


def test_one_tensor_scale_for_w1_and_w3_is_caught(seed: int) -> None:
    """Fault F2."""
    case = make_case(8, seed)
    w1, w3, w2 = _quantized(case)
    want = _expected(case, (w1, w3, w2)).float()
    assert_within("nvfp4_experts", _run(case, (w1, w3, w2), torch.float32), want)
    faulty = w1, dataclasses.replace(w3, tensor_scale=w1.tensor_scale), w2
    with pytest.raises(AssertionError, match="nvfp4_experts: .* first at"):
        assert_within("nvfp4_experts", _run(case, faulty, torch.float32), want)


def test_a_folded_tensor_scale_is_caught(seed: int) -> None:
    """Fault F1."""
    case = make_case(8, seed)
    w1, w3, w2 = _quantized(case)
    want = _expected(case, (w1, w3, w2)).float()
    for faulty in ((folded(w1), w3, w2), (w1, folded(w3), w2), (w1, w3, folded(w2))):
        with pytest.raises(AssertionError, match="nvfp4_experts: .* first at"):
            assert_within("nvfp4_experts", _run(case, faulty, torch.float32), want)


def test_a_missing_clamp_is_caught(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Fault F13."""
    case = make_case(8, seed)
    weights = _quantized(case)
    want = _expected(case, weights).float()
    right = swiglu.reference
    monkeypatch.setattr(swiglu, "reference", lambda g, u, limit, w, dtype: right(g, u, None, w, dtype))
    with pytest.raises(AssertionError, match="nvfp4_experts: .* first at"):
        assert_within("nvfp4_experts", _run(case, weights, torch.float32), want)


@pytest.mark.parametrize("skipped", ["x", "h"])
def test_a_missing_activation_quantization_is_caught(skipped: str, seed: int) -> None:
    case = make_case(8, seed)
    weights = _quantized(case)
    w1, w3, w2 = map(decode, weights)
    roundings = {"round_x": same if skipped == "x" else _round, "round_h": same if skipped == "h" else _round}
    with pytest.raises(AssertionError, match="nvfp4_experts: .* first at"):
        assert_within(
            "nvfp4_experts", _run(case, weights, torch.float32), expected(case, (w1, w3, w2), **roundings).float()
        )


def test_weight_only_is_another_operation(seed: int) -> None:
    case = make_case(8, seed)
    weights = _quantized(case)
    args = case.x, case.route_weights, case.expert_ids
    a, b = (op(*args, *weights, swiglu_limit=10.0) for op in (nvfp4_experts, nvfp4_weight_only_experts))
    with pytest.raises(AssertionError):
        assert_within("nvfp4_experts", a, b)


# --- refusals ---


def test_refusals() -> None:
    case = make_case(2, 0)
    w1, w3, w2 = _quantized(case)
    args = case.x, case.route_weights, case.expert_ids
    with pytest.raises(TypeError, match="nvfp4_experts: w3 must be NvFp4Tensor; got float32"):
        nvfp4_experts(*args, w1, case.w3, w2, swiglu_limit=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="nvfp4_experts: x must be bfloat16 or float32; got NvFp4Tensor"):
        nvfp4_experts(quantize_nvfp4(case.x), *args[1:], w1, w3, w2, swiglu_limit=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be finite"):
        nvfp4_experts(case.x * float("inf"), *args[1:], w1, w3, w2, swiglu_limit=None)
    with pytest.raises(ValueError, match="nvfp4_experts: expert_ids must be an expert of w1 .*; got -2"):
        nvfp4_experts(*args[:2], torch.full_like(case.expert_ids, -2), w1, w3, w2, swiglu_limit=None)
