# SPDX-License-Identifier: Apache-2.0
"""Operations cut over ranks, for every weight format: against the uncut operation, and what a wrong cut would do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megamoe.formats import fp8, nvfp4
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.ops.cut import add_ranks, cut_experts, cut_inputs, cut_outputs, input_cut_linear
from megamoe.ops.experts import experts
from megamoe.ops.fp8_linear import fp8_linear
from megamoe.ops.linear import linear
from megamoe.ops.nvfp4_experts import nvfp4_experts
from megamoe.ops.nvfp4_linear import nvfp4_linear
from megamoe.ops.nvfp4_weight_only_experts import nvfp4_weight_only_experts
from megamoe.ops.nvfp4_weight_only_linear import nvfp4_weight_only_linear
from megamoe.ops.quantize import quantize_fp8_rows, quantize_nvfp4
from megamoe.verify.tolerance import assert_within

from .expert_cases import ExpertCase, make_case

FP32 = torch.float32
Times = Callable[[torch.Tensor, Any], torch.Tensor]


def w4a4(x: torch.Tensor, w: NvFp4Tensor) -> torch.Tensor:
    return nvfp4_linear(quantize_nvfp4(x), w, out_dtype=FP32)


def static_w4a4(x: torch.Tensor, w: NvFp4Tensor) -> torch.Tensor:
    return nvfp4_linear(quantize_nvfp4(x, tensor_scale=torch.tensor(0.002)), w, out_dtype=FP32)


LINEARS: dict[str, tuple[Callable[[torch.Tensor], Any], Times]] = {
    "bf16": (torch.Tensor.bfloat16, lambda x, w: linear(x, w, out_dtype=FP32)),
    "fp8": (fp8.quantize_blocks, lambda x, w: fp8_linear(quantize_fp8_rows(x), w, out_dtype=FP32)),
    "w4a16": (nvfp4.quantize, lambda x, w: nvfp4_weight_only_linear(x, w, out_dtype=FP32)),
    "static w4a4": (nvfp4.quantize, static_w4a4),
    "w4a4": (nvfp4.quantize, w4a4),
}
FORMATS = pytest.mark.parametrize("name", LINEARS)


def example(seed: int, num_tokens: int = 5, size: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations whose parts differ in size, as those of a model's channels do, and a weight."""
    torch.manual_seed(seed)
    x = torch.randn(num_tokens, size) * torch.linspace(0.2, 2.0, size)
    return x.bfloat16(), torch.randn(512, size) * 0.05


# --- known answers ---


def test_parts_are_added_in_rank_order_and_rounded_once() -> None:
    """In fp32 1 is lost beside 2^24, from the other end it is not; bf16 parts would lose both small ones."""
    parts = [torch.tensor([value]) for value in (2.0**24, 1.0, -(2.0**24), 0.25)]
    assert add_ranks(parts, FP32).tolist() == [0.25]
    assert add_ranks([parts[0], parts[2], parts[1], parts[3]], FP32).tolist() == [1.25]
    thirds = [torch.tensor([1.0 + 2.0**-9]), torch.tensor([2.0**-9]), torch.tensor([2.0**-9])]
    assert add_ranks(thirds, torch.bfloat16).tolist() == [1.0 + 2.0**-7]
    assert parts[0].tolist() == [2.0**24]


def test_a_share_keeps_codes_and_scales() -> None:
    w = nvfp4.quantize(torch.randn(3, 32, 64))
    whole = nvfp4.dequantize(w)
    for cut, dim in ((cut_outputs, -2), (cut_inputs, -1)):
        shares = cut(w, 2)
        assert all(share.tensor_scale is w.tensor_scale for share in shares)
        assert torch.equal(torch.cat([nvfp4.dequantize(share) for share in shares], dim), whole)
    w = fp8.quantize_blocks(torch.randn(256, 384))
    whole = fp8.dequantize(w)
    assert torch.equal(torch.cat([fp8.dequantize(share) for share in cut_inputs(w, 3)], -1), whole)
    assert torch.equal(torch.cat([fp8.dequantize(share) for share in cut_outputs(w, 2)], -2), whole)


def test_the_scale_of_a_cut_activation_is_that_of_the_part() -> None:
    """Part 0 has an amax of 6 and a scale of 6 / 2688; beside part 1 with 2688 its values would be coarser."""
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 1], x[0, 16] = 6.0, 0.001, 2688.0
    w = nvfp4.quantize(torch.ones(16, 32))
    seen: list[float] = []

    def times(part: torch.Tensor, share: NvFp4Tensor) -> torch.Tensor:
        seen.append(float(quantize_nvfp4(part).tensor_scale))
        return w4a4(part, share)

    input_cut_linear(x, w, 2, times, FP32)
    assert seen == [float(torch.tensor(6.0) / 2688), 1.0]


# --- properties ---


@FORMATS
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_cut_outputs_have_the_bits_of_the_whole(name: str, num_ranks: int, seed: int) -> None:
    x, w = example(seed)
    quantize, times = LINEARS[name]
    weight = quantize(w)
    parts = [times(x, share) for share in cut_outputs(weight, num_ranks)]
    assert torch.equal(torch.cat(parts, -1), times(x, weight))


@FORMATS
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("out_dtype", [FP32, torch.bfloat16])
def test_cut_inputs_against_the_whole(name: str, num_ranks: int, out_dtype: torch.dtype, seed: int) -> None:
    """All but dynamic W4A4 differ by fp32 sums; that one rounds activations with other scales, no worse ones."""
    x, w = example(seed)
    quantize, times = LINEARS[name]
    weight = quantize(w)
    got, want = input_cut_linear(x, weight, num_ranks, times, out_dtype), times(x, weight)
    if num_ranks == 1 or name != "w4a4":
        assert_within("linear", got, want.to(out_dtype))
        return
    exact = nvfp4_weight_only_linear(x, weight, out_dtype=FP32)

    def error(y: torch.Tensor) -> float:
        return float((y.float() - exact).norm() / exact.norm())

    assert error(got) < 1.05 * error(want)
    assert error(want.to(out_dtype)) < 0.2 and float((got.float() - want).norm() / want.norm()) < 1.5 * error(want)


@FORMATS
def test_a_token_of_a_cut_linear_does_not_depend_on_the_others(name: str, seed: int) -> None:
    x, w = example(seed, num_tokens=9)
    quantize, times = LINEARS[name]
    weight = quantize(w)
    whole = input_cut_linear(x, weight, 4, times, torch.bfloat16)
    assert torch.equal(input_cut_linear(x[3:4], weight, 4, times, torch.bfloat16), whole[3:4])


EXPERTS: dict[str, tuple[Callable[[torch.Tensor], Any], Any, float]] = {
    "bf16": (torch.Tensor.bfloat16, experts, 4e-3),
    "w4a16": (nvfp4.quantize, nvfp4_weight_only_experts, 4e-3),
    "w4a4": (nvfp4.quantize, nvfp4_experts, 0.12),
}


def expert_parts(name: str, case: ExpertCase) -> tuple[tuple[Any, Any, Any], Callable[..., torch.Tensor]]:
    """Return the weights in a format, and the operation that a rank calls on its share."""
    quantize, op, _ = EXPERTS[name]

    def run(w1: Any, w3: Any, w2: Any, route_weights: torch.Tensor = case.route_weights) -> torch.Tensor:
        got: torch.Tensor = op(case.x, route_weights, case.expert_ids, w1, w3, w2, swiglu_limit=10.0, out_dtype=FP32)
        return got

    return (quantize(case.w1), quantize(case.w3), quantize(case.w2)), run


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_experts_cut_along_their_inner_size(name: str, num_ranks: int, seed: int) -> None:
    """Gate, up and h are the same numbers; every rank rounds its slots, and W4A4 rounds h with the part's scales."""
    case = make_case(7, seed, width=128)
    weights, run = expert_parts(name, case)
    got, want = cut_experts(run, weights, num_ranks, FP32), run(*weights)
    error = float((got - want).norm() / want.norm())
    assert 0.0 < error < EXPERTS[name][2]
    if name == "w4a4":  # h cut against h whole, both against h as it is
        plain = nvfp4_weight_only_experts(
            case.x, case.route_weights, case.expert_ids, *weights, swiglu_limit=10.0, out_dtype=FP32
        )
        assert float((got - plain).norm()) < 1.1 * float((want - plain).norm())


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_dealt_out_whole(name: str, seed: int) -> None:
    """Every slot is computed by one rank: only the order of fp32 sums differs. Here others' slots weigh 0."""
    case = make_case(7, seed, width=128)
    weights, run = expert_parts(name, case)
    parts = [run(*weights, case.route_weights * (case.expert_ids % 2 == rank)) for rank in range(2)]
    torch.testing.assert_close(add_ranks(parts, FP32), run(*weights), rtol=1e-6, atol=1e-6)


# --- faults ---


def test_a_cut_through_a_block_is_refused() -> None:
    w = nvfp4.quantize(torch.randn(32, 48))
    with pytest.raises(ValueError, match="cut: a size of 48 has no 2 equal shares of whole blocks of 16"):
        cut_inputs(w, 2)
    with pytest.raises(ValueError, match="cut: a size of 384 has no 2 equal shares of whole blocks of 128"):
        cut_outputs(fp8.quantize_blocks(torch.randn(384, 128)), 2)
    with pytest.raises(ValueError, match="cut: a size of 9 has no 2 equal shares. Use fewer ranks"):
        cut_outputs(torch.zeros(9, 4), 2)


def test_tiled_and_fragment_weights_are_refused() -> None:
    w = nvfp4.quantize(torch.randn(128, 128))
    for moved in (w.tiled(), w.fragments()):
        with pytest.raises(ValueError, match="must be row-major"):
            cut_outputs(moved, 2)


def test_rounded_parts_are_refused() -> None:
    with pytest.raises(TypeError, match="the part of rank 1 must be float32; got torch.bfloat16"):
        add_ranks([torch.zeros(2), torch.zeros(2).bfloat16()], torch.bfloat16)


def test_a_tensor_scale_per_share_would_be_noticed(seed: int) -> None:
    """A loader that quantizes each share anew gives weights that differ from the whole checkpoint's."""
    _, w = example(seed)
    w[:, 512:] *= 30.0
    whole = nvfp4.quantize(w)
    anew = nvfp4.quantize(w[:, :512])
    share = cut_inputs(whole, 2)[0]
    assert not torch.equal(nvfp4.dequantize(anew), nvfp4.dequantize(share))
    wrong = dataclasses.replace(share, tensor_scale=anew.tensor_scale)
    assert float((nvfp4.dequantize(wrong) - w[:, :512]).norm() / w[:, :512].norm()) > 0.5
