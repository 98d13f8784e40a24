# SPDX-License-Identifier: Apache-2.0
"""rope: known angles, the frequencies of V4, and exact fp32 angles at long positions (fault F21)."""

from __future__ import annotations

import math

import pytest
import torch

from megamoe.ops.rope import RopeTable, YarnScaling, rope, rope_table
from megamoe.verify.tolerance import assert_within

from .invariance import assert_row_invariant

YARN = YarnScaling(factor=16, beta_fast=32, beta_slow=1, original_max_pos=65536)
LONG = torch.tensor([0, 1, 127, 65_535, 999_983, 1_048_575])


def _rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of the last channels by fp64 angles [T, R/2]."""
    rope_dim = 2 * angles.shape[1]
    cos, sin = (f(angles.double()).view(len(x), *(1,) * (x.dim() - 2), -1) for f in (torch.cos, torch.sin))
    y = x.double()
    even, odd = y[..., -rope_dim::2].clone(), y[..., y.shape[-1] - rope_dim + 1 :: 2].clone()
    y[..., -rope_dim::2] = even * cos - odd * sin
    y[..., y.shape[-1] - rope_dim + 1 :: 2] = odd * cos + even * sin
    return y.to(x.dtype)


def _fp32_angles(pos: torch.Tensor, table: RopeTable) -> torch.Tensor:
    return torch.stack([torch.tensor(float(p), dtype=torch.float32) * table.inv_freq for p in pos.tolist()])


# --- known answers ---


def test_a_quarter_turn_and_its_inverse() -> None:
    table = RopeTable(torch.tensor([math.pi / 2, 0.0]))
    x = torch.tensor([[9.0, 1.0, 0.0, 5.0, 7.0], [9.0, 1.0, 2.0, 5.0, 7.0]])
    y = rope(x, torch.tensor([1, 2]), table)
    torch.testing.assert_close(y, torch.tensor([[9.0, 0.0, 1.0, 5.0, 7.0], [9.0, -1.0, -2.0, 5.0, 7.0]]))
    y = rope(x, torch.tensor([1, 2]), table, inverse=True)
    torch.testing.assert_close(y, torch.tensor([[9.0, 0.0, -1.0, 5.0, 7.0], [9.0, -1.0, -2.0, 5.0, 7.0]]))


def test_position_zero_changes_nothing() -> None:
    x = torch.randn(1, 3, 16)
    assert torch.equal(rope(x, torch.tensor([0]), rope_table(8, 10000.0)), x)


def test_plain_frequencies() -> None:
    inv_freq = rope_table(64, 10000.0).inv_freq
    want = torch.tensor([10000.0 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    torch.testing.assert_close(inv_freq.double(), want, rtol=2e-7, atol=0.0)
    assert inv_freq[0] == 1.0 and inv_freq.dtype == torch.float32


def test_yarn_keeps_fast_pairs_and_divides_slow_ones_by_the_factor() -> None:
    plain, stretched = rope_table(64, 160000.0).inv_freq, rope_table(64, 160000.0, YARN).inv_freq
    assert torch.equal(stretched[:16], plain[:16])
    assert torch.equal(stretched[25:], plain[25:] / 16)
    torch.testing.assert_close(stretched[20], plain[20] * (0.5 / 16 + 0.5))  # half-way up the ramp from 15 to 25


# --- properties ---


@pytest.mark.parametrize("shape", [(6, 64), (6, 3, 80), (6, 2, 3, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_agrees_with_fp64_rotation_by_the_fp32_angle(
    shape: tuple[int, ...], dtype: torch.dtype, inverse: bool, seed: int
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    table = rope_table(64, 160000.0, YARN)
    angles = _fp32_angles(LONG, table)
    before = x.clone()
    assert_within("rope", rope(x, LONG, table, inverse=inverse), _rotated(x, -angles if inverse else angles))
    assert torch.equal(x, before)


def test_the_inverse_undoes_the_rotation(seed: int) -> None:
    x = torch.randn(6, 4, 128, generator=torch.Generator().manual_seed(seed))
    table = rope_table(64, 10000.0)
    torch.testing.assert_close(rope(rope(x, LONG, table), LONG, table, inverse=True), x, rtol=1e-5, atol=1e-5)


def test_row_invariant(seed: int) -> None:
    x = torch.randn(37, 3, 72, generator=torch.Generator().manual_seed(seed))
    pos = torch.arange(37) * 26_003
    table = rope_table(64, 160000.0, YARN)
    assert_row_invariant(lambda rows, positions: rope(rows, positions, table), x, pos)
    assert torch.equal(rope(x.transpose(1, 2).contiguous().transpose(1, 2), pos, table), rope(x, pos, table))


# --- fault F21: the angle "improved" to fp64, and rounded cos and sin ---


def test_fp64_angles_are_caught_at_long_positions(seed: int) -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed))
    table = rope_table(64, 160000.0, YARN)
    want = _rotated(x, _fp32_angles(LONG, table))
    assert_within("rope", rope(x, LONG, table), want)
    with pytest.raises(AssertionError, match="rope: .* first at"):
        assert_within("rope", _rotated(x, LONG.double()[:, None] * table.inv_freq.double()), want)


def test_bf16_cos_and_sin_are_caught(seed: int) -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed))
    table = rope_table(64, 10000.0)
    angles = _fp32_angles(LONG, table)
    cos, sin = angles.cos().bfloat16().float(), angles.sin().bfloat16().float()
    faulty = torch.stack((x[:, ::2] * cos - x[:, 1::2] * sin, x[:, 1::2] * cos + x[:, ::2] * sin), -1).flatten(-2)
    with pytest.raises(AssertionError, match="rope: .* first at"):
        assert_within("rope", faulty, _rotated(x, angles))


def test_split_halves_are_caught(seed: int) -> None:
    """Pairs (i, i + R/2) instead of (2i, 2i + 1)."""
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed))
    table = rope_table(64, 10000.0)
    interleaved = torch.stack((x[:, :32], x[:, 32:]), -1).flatten(-2)
    turned = rope(interleaved, LONG, table)
    faulty = torch.cat((turned[:, ::2], turned[:, 1::2]), -1)
    with pytest.raises(AssertionError, match="rope: .* first at"):
        assert_within("rope", faulty, rope(x, LONG, table))


# --- refusals ---


def test_refusals() -> None:
    table = rope_table(8, 10000.0)
    with pytest.raises(
        ValueError, match=r"rope: x must be \[T, \.\.\., C\] with T = 3 .* and C >= 8 .*; got \[2, 16\]"
    ):
        rope(torch.zeros(2, 16), torch.zeros(3, dtype=torch.int64), table)
    with pytest.raises(ValueError, match=r"got \[3, 4\]"):
        rope(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), table)
    with pytest.raises(ValueError, match=r"got \[8\]"):
        rope(torch.zeros(8), torch.zeros(8, dtype=torch.int64), table)
    with pytest.raises(TypeError, match="rope: pos must be int64; got int32"):
        rope(torch.zeros(3, 8), torch.zeros(3, dtype=torch.int32), table)
    with pytest.raises(ValueError, match="rope_dim must be even and positive; got 7"):
        rope_table(7, 10000.0)
    with pytest.raises(TypeError, match="RopeTable: inv_freq must be float32; got float64"):
        RopeTable(torch.zeros(4, dtype=torch.float64))
