# SPDX-License-Identifier: Apache-2.0
"""grouped_linear and its NVFP4 forms: every group meets its own weight and its own tensor scale."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megamoe.formats import fp8
from megamoe.formats.fp8 import Fp8BlockTensor, Fp8RowTensor
from megamoe.formats.nvfp4 import quantize
from megamoe.ops.grouped_linear import (
    fp8_grouped_linear,
    grouped_linear,
    nvfp4_grouped_linear,
    nvfp4_weight_only_grouped_linear,
)
from megamoe.ops.quantize import quantize_fp8_rows, quantize_nvfp4
from megamoe.verify.tolerance import assert_within

from .invariance import assert_row_invariant
from .nvfp4_cases import decode

# --- known answers ---


def test_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    w = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[10.0, 0.0], [0.0, -1.0]]])
    assert grouped_linear(x, w).tolist() == [[[1.0, 2.0], [30.0, -4.0]]]


def test_fp8_by_hand() -> None:
    """Groups of two 128-blocks: 128 * (1 * 2) * (2 * 4) + 128 * (1 * 1) * (2 * 0.5), then other scales."""
    codes = torch.ones(1, 2, 256).to(torch.float8_e4m3fn)
    x = Fp8RowTensor(codes, torch.tensor([[[2.0, 1.0], [1.0, 4.0]]]).to(torch.float8_e8m0fnu), 128)
    codes = torch.tensor([2.0, 1.0])[:, None, None].expand(2, 1, 256).to(torch.float8_e4m3fn)
    w = Fp8BlockTensor(codes, torch.tensor([[[4.0, 0.5]], [[1.0, 1.0]]]).to(torch.float8_e8m0fnu))
    assert fp8_grouped_linear(x, w, out_dtype=torch.float32).tolist() == [[[128.0 * (16 + 1)], [128.0 * (1 + 4)]]]


# --- properties ---


def _case(num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, 3, 80, generator=generator).bfloat16()
    w = torch.randn(3, 20, 80, generator=generator) * torch.tensor([1.0, 0.1, 7.0])[:, None, None]
    return x, w


@pytest.mark.parametrize("num_tokens", [0, 1, 8, 9])
def test_agree_with_fp64(num_tokens: int, seed: int) -> None:
    x, w = _case(num_tokens, seed)
    want = torch.einsum("tgk,gnk->tgn", x.double(), w.double())
    got = grouped_linear(x, w, out_dtype=torch.float32)
    assert got.is_contiguous()
    assert_within("grouped_linear", got, want.float())
    assert_within("grouped_linear", grouped_linear(x, w), want.bfloat16())
    w4, x4 = quantize(w), quantize_nvfp4(x)
    assert w4.tensor_scale.unique().numel() == 3
    want = torch.einsum("tgk,gnk->tgn", x.double(), decode(w4))
    for weights in (w4, w4.tiled()):
        op, got = "nvfp4_weight_only_grouped_linear", nvfp4_weight_only_grouped_linear(x, weights)
        assert_within(op, got, want.bfloat16())
    want = torch.einsum("tgk,gnk->tgn", decode(x4), decode(w4))
    assert_within("nvfp4_grouped_linear", nvfp4_grouped_linear(x4, w4), want.bfloat16())
    for scale_dtype in (torch.float8_e8m0fnu, torch.float32):
        x8, w8 = quantize_fp8_rows(x), fp8.quantize_blocks(w, scale_dtype)
        want = torch.einsum("tgk,gnk->tgn", fp8.dequantize(x8).double(), fp8.dequantize(w8).double())
        got = fp8_grouped_linear(x8, w8, out_dtype=torch.float32)
        assert got.is_contiguous()
        assert_within("fp8_grouped_linear", got, want.float())
        assert_within("fp8_grouped_linear", fp8_grouped_linear(x8, w8), want.bfloat16())


def test_row_invariant(seed: int) -> None:
    x, w = _case(40, seed)
    w4, w8 = quantize(w), fp8.quantize_blocks(w)

    def all_four(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            grouped_linear(rows, w),
            nvfp4_weight_only_grouped_linear(rows, w4),
            nvfp4_grouped_linear(quantize_nvfp4(rows), w4),
            fp8_grouped_linear(quantize_fp8_rows(rows), w8),
        )

    assert_row_invariant(all_four, x)


def test_one_tensor_scale_for_all_groups_is_caught(seed: int) -> None:
    x, w = _case(4, seed)
    w4 = quantize(w)
    want = torch.einsum("tgk,gnk->tgn", x.double(), decode(w4)).bfloat16()
    faulty = dataclasses.replace(w4, tensor_scale=w4.tensor_scale[:1].expand(3))
    with pytest.raises(AssertionError, match="nvfp4_weight_only_grouped_linear: .* first at"):
        op, got = "nvfp4_weight_only_grouped_linear", nvfp4_weight_only_grouped_linear(x, faulty)
        assert_within(op, got, want)


# --- refusals ---


def test_refusals() -> None:
    x, w = _case(2, 0)
    with pytest.raises(
        ValueError, match=r"grouped_linear: w must be \[G, N, K\] with T = 2, G = 3, K = 80; got .*\[2, 20"
    ):
        grouped_linear(x, w[:2])
    with pytest.raises(ValueError, match=r"grouped_linear: x must be \[T, G, K\]; got bfloat16 \[2, 240\]"):
        grouped_linear(x.flatten(1), w)
    with pytest.raises(TypeError, match="fp8_grouped_linear: x must be Fp8RowTensor; got bfloat16"):
        fp8_grouped_linear(x, fp8.quantize_blocks(w))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fp8_grouped_linear: w must be \[G, N, K\] .*; got Fp8BlockTensor \[2, 20"):
        fp8_grouped_linear(quantize_fp8_rows(x), fp8.quantize_blocks(w[:2]))
    with pytest.raises(TypeError, match="nvfp4_grouped_linear: x must be NvFp4Tensor; got bfloat16"):
        nvfp4_grouped_linear(x, quantize(w))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="nvfp4_weight_only_grouped_linear: w must be NvFp4Tensor; got float32"):
        nvfp4_weight_only_grouped_linear(x, w)  # type: ignore[arg-type]
