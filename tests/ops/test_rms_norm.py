# SPDX-License-Identifier: Apache-2.0
"""rms_norm: known answers, row invariance, and the bf16 statistics of fault F21."""

from __future__ import annotations

import math

import pytest
import torch

from megamoe.ops.rms_norm import rms_norm
from megamoe.verify.tolerance import assert_within

from .invariance import assert_row_invariant


def _expected(x: torch.Tensor, weight: torch.Tensor | None, eps: float, dtype: torch.dtype) -> torch.Tensor:
    values = x.double()
    y = values / (values.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()
    return (y if weight is None else y * weight.double()).to(dtype)


# --- known answers ---


def test_three_four() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-0.0, 5.0]])
    y = rms_norm(x, None, eps=0.5)
    root = math.sqrt(12.5 + 0.5)
    torch.testing.assert_close(y[0], torch.tensor([3 / root, 4 / root]))
    assert y[1].tolist() == [0.0, 0.0]
    assert math.copysign(1.0, y[2, 0].item()) == -1.0


def test_the_weight_multiplies_and_is_not_offset() -> None:
    x = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    y = rms_norm(x, torch.tensor([2.0, 0.5, 0.0, -1.0]), eps=0.0)
    assert y.tolist() == [[2.0, -0.5, 0.0, -1.0]]


def test_eps_keeps_tiny_rows_finite() -> None:
    y = rms_norm(torch.full((1, 4), 1e-30), None, eps=1e-6)
    assert y[0, 0].item() == pytest.approx(1e-27, rel=1e-5)


def test_one_rounding_to_the_output_dtype() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]])
    exact = rms_norm(x, None)
    assert torch.equal(rms_norm(x, None, out_dtype=torch.bfloat16), exact.bfloat16())
    assert torch.equal(rms_norm(x.bfloat16(), None, out_dtype=torch.float32), exact)
    assert rms_norm(x.bfloat16(), None).dtype == torch.bfloat16


# --- properties ---


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 3, 64), (2, 512)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_fp64(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * 5).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).bfloat16()
    for w in (None, weight):
        assert_within("rms_norm", rms_norm(x, w, out_dtype=torch.float32), _expected(x, w, 1e-6, torch.float32))
        assert_within("rms_norm", rms_norm(x, w), _expected(x, w, 1e-6, dtype))


@pytest.mark.parametrize("width", [1, 64, 512])
def test_row_invariant(width: int, seed: int) -> None:
    x = torch.randn(70, width, generator=torch.Generator().manual_seed(seed))
    assert_row_invariant(lambda rows: rms_norm(rows, None), x)
    heads = x.view(35, 2, width)
    assert_row_invariant(lambda rows: rms_norm(rows, None), heads)
    assert torch.equal(rms_norm(heads.transpose(0, 1), None), rms_norm(heads, None).transpose(0, 1))


def test_scaling_a_row_changes_nothing_but_rounding(seed: int) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(rms_norm(x * 1024, None, eps=0.0), rms_norm(x, None, eps=0.0))


# --- fault F21: the mean of squares taken in bf16 ---


def test_bf16_statistics_are_caught(seed: int) -> None:
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(seed)).bfloat16()
    want = _expected(x, None, 1e-6, torch.float32)
    assert_within("rms_norm", rms_norm(x, None, out_dtype=torch.float32), want)
    faulty = x.float() * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6).float()
    with pytest.raises(AssertionError, match="rms_norm: .* first at"):
        assert_within("rms_norm", faulty, want)


# --- refusals ---


def test_refusals() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"rms_norm: weight must be \[K\] with K = 4; got float32 \[3\]"):
        rms_norm(x, torch.zeros(3))
    with pytest.raises(TypeError, match="rms_norm: x must be bfloat16 or float32; got float64"):
        rms_norm(x.double(), None)
    with pytest.raises(ValueError, match="rms_norm: out_dtype must be .*; got float16"):
        rms_norm(x, None, out_dtype=torch.float16)
