# SPDX-License-Identifier: Apache-2.0
"""fp8_linear: scales per 128 by hand, partial blocks, row invariance."""

from __future__ import annotations

import pytest
import torch

from megamoe.formats.fp8 import Fp8BlockTensor, dequantize, quantize_blocks
from megamoe.ops.fp8_linear import fp8_linear
from megamoe.ops.quantize import quantize_fp8_rows
from megamoe.verify.tolerance import assert_within

from .invariance import assert_row_invariant

# --- known answers ---


def test_every_block_uses_its_own_two_scales() -> None:
    """Two 128-blocks along K: 128 * (1 * 2) * (2 * 4) + 128 * (1 * 1) * (2 * 0.5)."""
    x = quantize_fp8_rows(torch.cat((torch.full((1, 128), 448.0 * 2), torch.full((1, 128), 448.0)), -1))
    assert x.scales.float().tolist() == [[2.0, 1.0]]
    codes = torch.full((1, 256), 2.0).to(torch.float8_e4m3fn)
    w = Fp8BlockTensor(codes, torch.tensor([[4.0, 0.5]]).to(torch.float8_e8m0fnu))
    assert fp8_linear(x, w, out_dtype=torch.float32).tolist() == [[448.0 * 128 * (2 * 8 + 1 * 1)]]


def test_one_hot_inputs_return_the_decoded_weight() -> None:
    w = quantize_blocks(torch.randn(130, 140))
    assert torch.equal(fp8_linear(quantize_fp8_rows(torch.eye(140)), w, out_dtype=torch.float32), dequantize(w).T)


# --- properties ---


@pytest.mark.parametrize("num_tokens", [0, 1, 8, 9])
@pytest.mark.parametrize("num_out,num_in", [(1, 1), (127, 129), (256, 640)])
@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.float32], ids=str)
def test_agrees_with_fp64(num_tokens: int, num_out: int, num_in: int, scale_dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = quantize_fp8_rows(torch.randn(num_tokens, num_in, generator=generator))
    w = quantize_blocks(torch.randn(num_out, num_in, generator=generator), scale_dtype)
    want = dequantize(x).double() @ dequantize(w).double().T
    assert_within("fp8_linear", fp8_linear(x, w, out_dtype=torch.float32), want.float())
    assert_within("fp8_linear", fp8_linear(x, w), want.bfloat16())


def test_row_invariant(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = quantize_blocks(torch.randn(65, 1024, generator=generator))
    x = torch.randn(40, 1024, generator=generator).bfloat16()
    assert_row_invariant(lambda rows: fp8_linear(quantize_fp8_rows(rows), w), x)


# --- refusals ---


def test_refusals() -> None:
    x, w = quantize_fp8_rows(torch.ones(2, 128)), quantize_blocks(torch.ones(4, 128))
    with pytest.raises(ValueError, match=r"fp8_linear: w must be \[N, K\].*; got Fp8BlockTensor \[4, 64\]"):
        fp8_linear(x, quantize_blocks(torch.ones(4, 64)))
    with pytest.raises(TypeError, match="fp8_linear: x must be Fp8RowTensor; got float32"):
        fp8_linear(torch.ones(2, 128), w)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fp8_linear: w must be Fp8BlockTensor; got Fp8RowTensor"):
        fp8_linear(x, x)  # type: ignore[arg-type]
