# SPDX-License-Identifier: Apache-2.0
"""clamped_swiglu: clamps by hand, fp32 inside, and the missing or misplaced clamp of fault F13."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from megamoe.ops.swiglu import clamped_swiglu
from megamoe.verify.tolerance import assert_within

from .invariance import assert_row_invariant

LIMIT = 10.0


def _silu(value: float) -> float:
    return value / (1 + math.exp(-value))


def _expected(
    gate: torch.Tensor, up: torch.Tensor, limit: float | None, weight: torch.Tensor | None = None
) -> torch.Tensor:
    g, u = gate.double(), up.double()
    if limit is not None:
        g, u = torch.minimum(g, torch.tensor(limit, dtype=g.dtype)), u.clamp(-limit, limit)
    y = g * torch.sigmoid(g) * u
    return y if weight is None else y * weight.double()[:, None]


# --- known answers ---


def test_clamps_by_hand() -> None:
    gate = torch.tensor([[20.0, -20.0, 1.0, 1.0, 10.0, 0.0]])
    up = torch.tensor([[2.0, 2.0, 50.0, -50.0, -10.0, 7.0]])
    want = [_silu(10.0) * 2, _silu(-20.0) * 2, _silu(1.0) * 10, _silu(1.0) * -10, _silu(10.0) * -10, 0.0]
    assert clamped_swiglu(gate, up, limit=LIMIT).tolist()[0] == pytest.approx(want, rel=1e-6)


def test_no_limit_clamps_nothing() -> None:
    y = clamped_swiglu(torch.tensor([[200.0]]), torch.tensor([[-300.0]]), limit=None)
    assert y.item() == -60000.0


def test_the_row_weight_multiplies_before_rounding() -> None:
    gate, up = torch.tensor([[100.0], [100.0]]), torch.ones(2, 1)
    y = clamped_swiglu(gate, up, limit=None, row_weight=torch.tensor([0.5, 1.0078125]), out_dtype=torch.bfloat16)
    assert y.flatten().tolist() == [50.0, 101.0]  # 100.78125 rounds to 101, not 100 * bf16(1.0078125) twice rounded


def test_extremes_are_finite_and_nan_stays() -> None:
    gate = torch.tensor([[-1e30, 1e30, float("nan"), 1.0]])
    up = torch.tensor([[1e30, 1e30, 1.0, float("nan")]])
    y = clamped_swiglu(gate, up, limit=LIMIT)[0]
    assert y[0] == 0.0 and y[1].item() == pytest.approx(_silu(10.0) * 10)
    assert bool(y[2:].isnan().all())


# --- properties ---


@pytest.mark.parametrize("shape", [(0, 16), (1, 1), (9, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_fp64(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate, up = ((torch.randn(shape, generator=generator) * 8).to(dtype) for _ in range(2))
    weight = torch.rand(shape[0], generator=generator)
    got = clamped_swiglu(gate, up, limit=LIMIT, row_weight=weight, out_dtype=torch.float32)
    assert_within("clamped_swiglu", got, _expected(gate, up, LIMIT, weight).float())
    assert_within("clamped_swiglu", clamped_swiglu(gate, up, limit=LIMIT), _expected(gate, up, LIMIT).to(dtype))


def test_row_invariant(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(50, 77, generator=generator) * 8 for _ in range(2))
    weight = torch.rand(50, generator=generator)
    assert_row_invariant(lambda g, u, w: clamped_swiglu(g, u, limit=LIMIT, row_weight=w), gate, up, weight)


# --- fault F13 ---

FAULTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "no clamp": lambda g, u: _expected(g, u, None),
    "gate not clamped": lambda g, u: g.double() * g.double().sigmoid() * u.double().clamp(-LIMIT, LIMIT),
    "up not clamped": lambda g, u: _expected(g, torch.ones_like(u), LIMIT) * u.double(),
    "up clamped from above only": lambda g, u: _expected(g, torch.ones_like(u), LIMIT) * u.double().clamp(max=LIMIT),
    "gate clamped from below too": lambda g, u: _expected(g.clamp(min=-LIMIT), u, LIMIT),
    "clamp after the activation": lambda g, u: (
        torch.nn.functional.silu(g.double()).clamp(max=LIMIT) * u.double().clamp(-LIMIT, LIMIT)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_clamps_are_caught(fault: str) -> None:
    """Values on both sides of both clamps; silu(-10.5) = -2.9e-4 needs a row of its own to be seen."""
    gate = torch.tensor([[12.0, 1.0, 3.0, 10.0002], [-10.5, -12.0, -10.1, -11.0]])
    up = torch.tensor([[3.0, 14.0, -14.0, 1.0], [1.0, 2.0, 3.0, 1.0]])
    got = clamped_swiglu(gate, up, limit=LIMIT)
    for row in range(2):
        want = _expected(gate[row : row + 1], up[row : row + 1], LIMIT).float()
        assert_within("clamped_swiglu", got[row : row + 1], want)
    with pytest.raises(AssertionError, match="clamped_swiglu: .* first at"):
        for row in range(2):
            faulty = FAULTS[fault](gate[row : row + 1], up[row : row + 1]).float()
            assert_within("clamped_swiglu", faulty, got[row : row + 1])


# --- refusals ---


def test_refusals() -> None:
    x = torch.zeros(2, 3)
    for limit in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="clamped_swiglu: the SwiGLU limit must be positive; got .* Pass None"):
            clamped_swiglu(x, x, limit=limit)
    with pytest.raises(
        ValueError, match=r"clamped_swiglu: up must be \[T, F\] with T = 2, F = 3; got float32 \[2, 4\]"
    ):
        clamped_swiglu(x, torch.zeros(2, 4), limit=None)
    with pytest.raises(ValueError, match=r"row_weight must be \[T\]"):
        clamped_swiglu(x, x, limit=None, row_weight=torch.zeros(3))
    with pytest.raises(TypeError, match="row_weight must be float32; got bfloat16"):
        clamped_swiglu(x, x, limit=None, row_weight=torch.zeros(2).bfloat16())
