# SPDX-License-Identifier: Apache-2.0
"""nvfp4_weight_only_linear: decoded weights, activations untouched, and the folded tensor scale of fault F1."""

from __future__ import annotations

import pytest
import torch

from megamoe.formats.nvfp4 import dequantize, quantize
from megamoe.ops.nvfp4_linear import nvfp4_linear
from megamoe.ops.nvfp4_weight_only_linear import nvfp4_weight_only_linear
from megamoe.ops.quantize import quantize_nvfp4
from megamoe.verify.tolerance import assert_within

from .invariance import assert_row_invariant
from .nvfp4_cases import decode, folded

# --- known answers ---


def test_one_hot_inputs_return_the_decoded_weight() -> None:
    w = quantize(torch.randn(33, 48))
    got = nvfp4_weight_only_linear(torch.eye(48), w)
    assert torch.equal(got, dequantize(w).T)
    torch.testing.assert_close(got.double(), decode(w).T, rtol=1e-6, atol=0.0)


def test_activations_are_not_quantized() -> None:
    """A value that NVFP4 cannot hold beside a large one arrives unchanged."""
    x = torch.zeros(1, 16).bfloat16()
    x[0, 0], x[0, 1] = 1000.0, 0.0625
    w = quantize(torch.eye(16) * 6.0)
    assert nvfp4_weight_only_linear(x, w)[0, :2].tolist() == pytest.approx([6000.0, 0.375], rel=2**-8)
    assert nvfp4_linear(quantize_nvfp4(x), w)[0, 1].item() == 0.0


# --- properties ---


@pytest.mark.parametrize("num_tokens", [0, 1, 8, 9])
@pytest.mark.parametrize("num_out,num_in", [(1, 16), (129, 80), (256, 640)])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_an_independent_decoder(
    num_tokens: int, num_out: int, num_in: int, tiled: bool, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, num_in, generator=generator).to(dtype)
    w = quantize(torch.randn(num_out, num_in, generator=generator) * 0.05)
    want = x.double() @ decode(w).T
    w = w.tiled() if tiled else w
    assert_within("nvfp4_weight_only_linear", nvfp4_weight_only_linear(x, w), want.to(dtype))
    got = nvfp4_weight_only_linear(x, w, out_dtype=torch.float32)
    assert_within("nvfp4_weight_only_linear", got, want.float())


def test_row_invariant(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = quantize(torch.randn(65, 1024, generator=generator))
    x = torch.randn(40, 1024, generator=generator).bfloat16()
    assert_row_invariant(lambda rows: nvfp4_weight_only_linear(rows, w), x)


# --- fault F1: the fp32 tensor scale folded into the fp8 block scales ---


def test_a_folded_tensor_scale_is_caught(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 128, generator=generator)
    w = quantize(torch.randn(32, 128, generator=generator) * 0.02)
    want = (x.double() @ decode(w).T).float()
    assert_within("nvfp4_weight_only_linear", nvfp4_weight_only_linear(x, w), want)
    with pytest.raises(AssertionError, match="nvfp4_weight_only_linear: .* first at"):
        assert_within("nvfp4_weight_only_linear", nvfp4_weight_only_linear(x, folded(w)), want)


# --- refusals ---


def test_refusals() -> None:
    w = quantize(torch.ones(4, 32))
    with pytest.raises(TypeError, match="nvfp4_weight_only_linear: x must be bfloat16 or float32; got NvFp4Tensor"):
        nvfp4_weight_only_linear(quantize_nvfp4(torch.ones(2, 32)), w)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="nvfp4_weight_only_linear: w must be NvFp4Tensor; got float32"):
        nvfp4_weight_only_linear(torch.ones(2, 32), torch.ones(4, 32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"w must be \[N, K\] with T = 2, K = 16, N = 4; got NvFp4Tensor \[4, 32\]"):
        nvfp4_weight_only_linear(torch.ones(2, 16), w)
