# SPDX-License-Identifier: Apache-2.0
"""linear: numbers by hand, fp32 accumulation, one rounding, row invariance."""

from __future__ import annotations

import pytest
import torch

from megamoe.ops.linear import linear
from megamoe.verify.tolerance import assert_within

from .invariance import assert_row_invariant

# --- known answers ---


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    w = torch.tensor([[1.0, 0.0], [10.0, -1.0], [0.0, 4.0]])
    assert linear(x, w).tolist() == [[1.0, 8.0, 8.0], [-3.0, -30.5, 2.0]]


def test_one_hot_inputs_return_columns() -> None:
    w = torch.randn(5, 7).bfloat16()
    assert torch.equal(linear(torch.eye(7).bfloat16(), w), w.T)


def test_the_sum_is_not_rounded_on_the_way() -> None:
    """256 + 1 - 256: in bf16 the 1 would be lost."""
    x = torch.tensor([[256.0, 1.0, -256.0]]).bfloat16()
    assert linear(x, torch.ones(1, 3).bfloat16()).item() == 1.0


def test_one_rounding_at_the_end() -> None:
    x, w = torch.tensor([[1.0, 2.0**-9]]), torch.ones(1, 2)
    assert linear(x, w).item() == 1.0 + 2.0**-9
    assert linear(x, w, out_dtype=torch.bfloat16).item() == 1.0
    assert linear(x.bfloat16(), w.bfloat16(), out_dtype=torch.float32).item() == 1.0 + 2.0**-9


# --- properties ---


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 8, 9])
@pytest.mark.parametrize("num_out,num_in", [(1, 1), (33, 100), (64, 1500)])
def test_agrees_with_fp64(num_tokens: int, num_out: int, num_in: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, num_in, generator=generator).bfloat16()
    w = torch.randn(num_out, num_in, generator=generator).bfloat16()
    want = x.double() @ w.double().T
    got = linear(x, w, out_dtype=torch.float32)
    assert got.shape == (num_tokens, num_out) and got.is_contiguous()
    assert_within("linear", got, want.float())
    assert_within("linear", linear(x, w), want.bfloat16())


def test_row_invariant(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(24, 1024, generator=generator)
    assert_row_invariant(lambda x: linear(x, w), torch.randn(40, 1024, generator=generator))


def test_a_weight_changed_in_place_is_used_as_it_is_now() -> None:
    x, w = torch.ones(1, 4).bfloat16(), torch.ones(2, 4).bfloat16()
    assert linear(x, w).tolist() == [[4.0, 4.0]]
    w[0] = 2.0
    assert linear(x, w).tolist() == [[8.0, 4.0]]


# --- refusals ---


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"linear: w must be \[N, K\] with T = 2, K = 3, N = 4; got float32 \[4, 5\]"):
        linear(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"linear: x must be \[T, K\]; got float32 \[3\]"):
        linear(torch.zeros(3), torch.zeros(4, 3))
    with pytest.raises(TypeError, match="linear: w must be bfloat16 or float32; got int64"):
        linear(torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="linear: out_dtype must be"):
        linear(torch.zeros(2, 3), torch.zeros(4, 3), out_dtype=torch.float64)
