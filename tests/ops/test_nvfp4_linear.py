# SPDX-License-Identifier: Apache-2.0
"""nvfp4_linear: three scales by hand, an independent computation, and the folded tensor scale of fault F1."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megamoe.formats.nvfp4 import NvFp4Tensor, quantize
from megamoe.ops.nvfp4_linear import nvfp4_linear
from megamoe.ops.nvfp4_weight_only_linear import nvfp4_weight_only_linear
from megamoe.ops.quantize import quantize_nvfp4
from megamoe.verify.tolerance import assert_within

from .invariance import assert_row_invariant
from .nvfp4_cases import decode, folded

# --- known answers ---


def test_all_scales_multiply() -> None:
    """Codes 0.5 and 1.5, block scales 2 and 4, tensor scales 8 and 0.25, 16 terms: 16 * (0.5*2*8) * (1.5*4*0.25)."""
    x = NvFp4Tensor(
        torch.full((1, 8), 0x11, dtype=torch.uint8),
        torch.tensor([[2.0]]).to(torch.float8_e4m3fn),
        torch.tensor([8.0]),
        scale_per="row",
    )
    w = NvFp4Tensor(
        torch.full((1, 8), 0x33, dtype=torch.uint8),
        torch.tensor([[4.0]]).to(torch.float8_e4m3fn),
        torch.tensor(0.25),
    )
    assert nvfp4_linear(x, w, out_dtype=torch.float32).item() == 16 * 8.0 * 1.5


def test_the_low_nibble_is_the_even_column() -> None:
    codes = torch.zeros(1, 8, dtype=torch.uint8)
    codes[0, 0] = 0x42  # column 0: 1.0, column 1: 2.0
    w = NvFp4Tensor(codes, torch.ones(1, 1).to(torch.float8_e4m3fn), torch.tensor(1.0))
    assert nvfp4_linear(quantize_nvfp4(torch.eye(16)), w, out_dtype=torch.float32)[:3, 0].tolist() == pytest.approx(
        [1.0, 2.0, 0.0], rel=1e-6
    )


# --- properties ---


@pytest.mark.parametrize("num_tokens", [0, 1, 8, 9])
@pytest.mark.parametrize("num_out,num_in", [(1, 16), (129, 80), (256, 640)])
@pytest.mark.parametrize("tiled", [False, True])
def test_agrees_with_an_independent_decoder(num_tokens: int, num_out: int, num_in: int, tiled: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = quantize_nvfp4(torch.randn(num_tokens, num_in, generator=generator))
    w = quantize(torch.randn(num_out, num_in, generator=generator) * 0.05)
    want = decode(x) @ decode(w).T
    w = w.tiled() if tiled else w
    assert_within("nvfp4_linear", nvfp4_linear(x, w, out_dtype=torch.float32), want.float())
    assert_within("nvfp4_linear", nvfp4_linear(x, w), want.bfloat16())


def test_row_invariant(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = quantize(torch.randn(65, 1024, generator=generator))
    x = (torch.randn(40, 1024, generator=generator) * torch.logspace(-2, 2, 40)[:, None]).bfloat16()
    assert_row_invariant(lambda rows: nvfp4_linear(quantize_nvfp4(rows), w), x)


def test_a_calibrated_scale_is_applied_once(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(4, 64, generator=generator), quantize(torch.randn(8, 64, generator=generator))
    quantized = quantize_nvfp4(x, tensor_scale=x.abs().max() / 2688)
    want = (decode(quantized) @ decode(w).T).float()
    assert_within("nvfp4_linear", nvfp4_linear(quantized, w, out_dtype=torch.float32), want)
    exact = nvfp4_weight_only_linear(x, w)
    assert float((want - exact).norm() / exact.norm()) < 0.2


# --- fault F1: the fp32 tensor scale folded into the fp8 block scales ---


def test_a_folded_tensor_scale_is_caught(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = quantize_nvfp4(torch.randn(4, 128, generator=generator))
    w = quantize(torch.randn(32, 128, generator=generator) * 0.02)
    want = (decode(x) @ decode(w).T).float()
    assert_within("nvfp4_linear", nvfp4_linear(x, w, out_dtype=torch.float32), want)
    with pytest.raises(AssertionError, match="nvfp4_linear: .* first at"):
        assert_within("nvfp4_linear", nvfp4_linear(x, folded(w), out_dtype=torch.float32), want)


def test_a_dropped_tensor_scale_is_caught(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = quantize_nvfp4(torch.randn(4, 128, generator=generator))
    w = quantize(torch.randn(32, 128, generator=generator))
    want = (decode(x) @ decode(w).T).float()
    for part in (x, w):
        bare = dataclasses.replace(part, tensor_scale=torch.ones_like(part.tensor_scale))
        got = nvfp4_linear(bare if part is x else x, bare if part is w else w, out_dtype=torch.float32)
        with pytest.raises(AssertionError, match="nvfp4_linear: .* first at"):
            assert_within("nvfp4_linear", got, want)


# --- refusals ---


def test_refusals() -> None:
    x, w = quantize_nvfp4(torch.ones(2, 32)), quantize(torch.ones(4, 32))
    with pytest.raises(ValueError, match=r"nvfp4_linear: w must be \[N, K\].*; got NvFp4Tensor \[4, 16\]"):
        nvfp4_linear(x, quantize(torch.ones(4, 16)))
    with pytest.raises(TypeError, match="nvfp4_linear: x must be NvFp4Tensor; got float32 .*call the operation that"):
        nvfp4_linear(torch.ones(2, 32), w)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nvfp4_linear: out_dtype must be bfloat16 or float32; got float16"):
        nvfp4_linear(x, w, out_dtype=torch.float16)
