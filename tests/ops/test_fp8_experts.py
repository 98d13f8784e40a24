# SPDX-License-Identifier: Apache-2.0
"""fp8_experts: x and h in FP8 rows, weights in FP8 blocks, and fault F13."""

from __future__ import annotations

import pytest
import torch

from megamoe.formats.fp8 import Fp8BlockTensor, dequantize, quantize_blocks, quantize_rows
from megamoe.ops import swiglu
from megamoe.ops.fp8_experts import fp8_experts
from megamoe.verify.tolerance import assert_within

from .expert_cases import ExpertCase, expected, make_case, same
from .invariance import assert_row_invariant

Weights = tuple[Fp8BlockTensor, Fp8BlockTensor, Fp8BlockTensor]


def _quantized(case: ExpertCase) -> Weights:
    return quantize_blocks(case.w1), quantize_blocks(case.w3), quantize_blocks(case.w2)


def _run(case: ExpertCase, weights: Weights, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    return fp8_experts(
        *(case.x, case.route_weights, case.expert_ids, *weights),
        shared_output=case.shared_output,
        swiglu_limit=10.0,
        out_dtype=out_dtype,
    )


def _round(values: torch.Tensor) -> torch.Tensor:
    return dequantize(quantize_rows(values.float())).double()


def _expected(case: ExpertCase, weights: Weights) -> torch.Tensor:
    w1, w3, w2 = (dequantize(weight).double() for weight in weights)
    return expected(case, (w1, w3, w2), round_x=_round, round_h=_round)


# --- known answers ---


def test_one_expert_by_hand() -> None:
    """silu(8) * 8 * 0.5 = 31.989 in FP8 at scale 2^-3: 255.9 rounds to 256, so h = 32 and the output 64."""
    eye = quantize_blocks((torch.eye(16) * 2.0)[None])
    x = torch.zeros(1, 16)
    x[0, 5] = 4.0
    ids = torch.zeros(1, 1, dtype=torch.int64)
    got = fp8_experts(x, torch.full((1, 1), 0.5), ids, eye, eye, eye, swiglu_limit=10.0)
    assert got[0, 5].item() == 64.0 and int((got != 0).sum()) == 1


# --- properties ---


@pytest.mark.parametrize("num_tokens", [0, 1, 8, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_one_token_at_a_time(num_tokens: int, dtype: torch.dtype, seed: int) -> None:
    case = make_case(num_tokens, seed, dtype, width=160)  # 160 leaves a partial group of 32
    weights = _quantized(case)
    assert_within("fp8_experts", _run(case, weights), _expected(case, weights).to(dtype))


def test_row_invariant(seed: int) -> None:
    case = make_case(70, seed)
    weights = _quantized(case)

    def run(x: torch.Tensor, route: torch.Tensor, ids: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        return fp8_experts(x, route, ids, *weights, shared_output=shared, swiglu_limit=10.0)

    assert_row_invariant(run, case.x, case.route_weights, case.expert_ids, case.shared_output)


# --- faults ---


def test_a_missing_clamp_is_caught(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Fault F13."""
    case = make_case(8, seed)
    weights = _quantized(case)
    want = _expected(case, weights).float()
    assert_within("fp8_experts", _run(case, weights, torch.float32), want)
    right = swiglu.reference
    monkeypatch.setattr(swiglu, "reference", lambda g, u, limit, w, dtype: right(g, u, None, w, dtype))
    with pytest.raises(AssertionError, match="fp8_experts: .* first at"):
        assert_within("fp8_experts", _run(case, weights, torch.float32), want)


@pytest.mark.parametrize("skipped", ["x", "h"])
def test_a_missing_activation_quantization_is_caught(skipped: str, seed: int) -> None:
    case = make_case(8, seed)
    weights = _quantized(case)
    w1, w3, w2 = (dequantize(weight).double() for weight in weights)
    roundings = {"round_x": same if skipped == "x" else _round, "round_h": same if skipped == "h" else _round}
    with pytest.raises(AssertionError, match="fp8_experts: .* first at"):
        assert_within(
            "fp8_experts", _run(case, weights, torch.float32), expected(case, (w1, w3, w2), **roundings).float()
        )


# --- refusals ---


def test_refusals() -> None:
    case = make_case(2, 0)
    w1, w3, w2 = _quantized(case)
    args = case.x, case.route_weights, case.expert_ids
    with pytest.raises(TypeError, match="fp8_experts: w2 must be Fp8BlockTensor; got float32"):
        fp8_experts(*args, w1, w3, case.w2, swiglu_limit=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fp8_experts: w2 must be \[E, D, F\]"):
        fp8_experts(*args, w1, w3, w1, swiglu_limit=None)
    with pytest.raises(ValueError, match="fp8_experts: expert_ids must be an expert of w1 .*; got -2"):
        fp8_experts(*args[:2], torch.full_like(case.expert_ids, -2), w1, w3, w2, swiglu_limit=None)
