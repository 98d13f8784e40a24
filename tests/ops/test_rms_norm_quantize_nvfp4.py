# SPDX-License-Identifier: Apache-2.0
"""rms_norm_quantize_nvfp4: the two operations one after the other, on the rounded result of the first."""

from __future__ import annotations

import pytest
import torch

from megamoe.formats.nvfp4 import dequantize
from megamoe.ops.quantize import quantize_nvfp4
from megamoe.ops.rms_norm import rms_norm
from megamoe.ops.rms_norm_quantize_nvfp4 import rms_norm_quantize_nvfp4

from .invariance import assert_row_invariant

# --- known answers ---


def test_a_row_of_threes_and_fours() -> None:
    """The root mean square of 3 and 4 alternating is 5 / sqrt(2); the weight makes the largest value 2688."""
    x = torch.tensor([[3.0, 4.0] * 8]).bfloat16()
    weight = torch.full((16,), 2688.0 / (4.0 * 2.0**0.5 / 5.0))
    y, q = rms_norm_quantize_nvfp4(x, weight, eps=0.0)
    assert y.dtype == torch.bfloat16 and y[0, 1].item() == 2688.0
    assert q.tensor_scale.tolist() == [1.0] and q.scales.float().tolist() == [[448.0]] and q.scale_per == "row"
    assert dequantize(q)[0, :2].tolist() == [4.0 * 448, 6.0 * 448]  # 2016 / 448 = 4.5 is nearer to 4 than to 6


def test_the_codes_are_those_of_the_rounded_norm() -> None:
    """Quantizing the fp32 norm, before its rounding to bf16, gives another tensor scale."""
    x = torch.tensor([[1.0, 2.0, 3.0] + [0.5] * 13]).bfloat16()
    weight = torch.ones(16)
    y, q = rms_norm_quantize_nvfp4(x, weight)
    assert torch.equal(q.tensor_scale, y.float().abs().amax(-1) / 2688.0)
    unrounded = rms_norm(x, weight, out_dtype=torch.float32)
    assert not torch.equal(q.tensor_scale, unrounded.abs().amax(-1) / 2688.0)


# --- properties ---


@pytest.mark.parametrize("shape", [(0, 16), (1, 16), (5, 3, 64), (2, 512)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_one_after_the_other(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).bfloat16()
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    y, q = rms_norm_quantize_nvfp4(x, weight)
    assert torch.equal(y, rms_norm(x, weight))
    want = quantize_nvfp4(y)
    assert torch.equal(q.codes, want.codes) and torch.equal(q.tensor_scale, want.tensor_scale)
    assert torch.equal(q.scales.view(torch.uint8), want.scales.view(torch.uint8))


def test_row_invariant(seed: int) -> None:
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(seed)).bfloat16()
    weight = torch.ones(128)
    assert_row_invariant(lambda rows: rms_norm_quantize_nvfp4(rows, weight)[0], x)
    assert_row_invariant(lambda rows: rms_norm_quantize_nvfp4(rows, weight)[1].codes, x)


# --- refusals ---


def test_refusals() -> None:
    weight = torch.ones(16)
    with pytest.raises(TypeError, match="rms_norm_quantize_nvfp4: x must be bfloat16; got float32"):
        rms_norm_quantize_nvfp4(torch.zeros(2, 16), weight)
    with pytest.raises(ValueError, match="weight must be .*K.* = 32.*; got float32 .16."):
        rms_norm_quantize_nvfp4(torch.zeros(2, 32).bfloat16(), weight)
    with pytest.raises(ValueError, match="K must be a positive multiple of 16; got x .2, 24."):
        rms_norm_quantize_nvfp4(torch.zeros(2, 24).bfloat16(), torch.ones(24))
    with pytest.raises(ValueError, match="must be finite"):
        rms_norm_quantize_nvfp4(torch.full((1, 16), float("nan")).bfloat16(), weight)
