# SPDX-License-Identifier: Apache-2.0
"""hadamard: the orthonormal Sylvester matrix in natural order."""

from __future__ import annotations

import pytest
import torch

from megamoe.ops.hadamard import hadamard

SIZES = [1, 2, 4, 64, 128, 256]


def matrix(n: int) -> torch.Tensor:
    """Signs by the definition: entry (i, j) is -1 to the number of ones that i and j share."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)])


# --- known answers ---


def test_four_values_by_hand():
    # 1+2+3+4, 1-2+3-4, 1+2-3-4, 1-2-3+4, each times 4^-0.5
    assert hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [5.0, -1.0, -2.0, 0.0]


def test_one_value_is_unchanged_and_copied():
    x = torch.tensor([[3.0]])
    y = hadamard(x)
    assert torch.equal(x, y) and y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("n", SIZES)
def test_unit_vectors_give_the_columns(n):
    assert torch.equal(hadamard(torch.eye(n)), matrix(n) * torch.tensor(n**-0.5, dtype=torch.float32))


def test_constant_goes_to_the_first_channel():
    y = hadamard(torch.full((1, 128), 2.0**-3))
    assert y[0, 0].item() == pytest.approx(128**0.5 / 8, rel=1e-7)
    assert int(y[0, 1:].count_nonzero()) == 0


def test_bf16_is_rounded_once():
    """1 + 2^-8 + 2^-12 halves to just above a tie of bf16; rounding between the steps falls on the tie and loses it."""
    x = torch.tensor([1.0, 2.0**-8, 2.0**-12, 0.0])
    assert hadamard(x, out_dtype=torch.bfloat16)[0].item() == 0.5 + 2.0**-8
    a, b, c, d = x.bfloat16()
    assert (((a + c) + (b + d)) * 0.5).item() == 0.5


def test_signed_zero_and_infinity():
    assert hadamard(torch.tensor([torch.inf, 1.0])).tolist() == [torch.inf, torch.inf]
    assert hadamard(torch.zeros(4)).tolist() == [0.0] * 4


# --- properties ---


@pytest.mark.parametrize("n", SIZES)
def test_is_its_own_inverse_and_keeps_products(n, seed):
    torch.manual_seed(seed)
    x, y = torch.randn(2, 5, n)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((hadamard(x) * hadamard(y)).sum(-1), (x * y).sum(-1), rtol=1e-5, atol=1e-4)


def test_matches_the_matrix_in_fp64(seed):
    torch.manual_seed(seed)
    x = torch.randn(7, 3, 128)
    expected = x.double() @ matrix(128).double() * 128**-0.5
    torch.testing.assert_close(hadamard(x).double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_do_not_depend_on_each_other(dtype, seed):
    torch.manual_seed(seed)
    x = torch.randn(300, 128).to(dtype)
    whole = hadamard(x)
    assert whole.dtype == dtype
    for rows in (slice(0, 1), slice(7, 22), slice(299, 300)):
        assert torch.equal(hadamard(x[rows]), whole[rows])
    assert torch.equal(hadamard(x.view(3, 100, 128)).view(300, 128), whole)
    assert torch.equal(hadamard(x.t().contiguous().t()), whole)


def test_bf16_input_is_widened_first(seed):
    torch.manual_seed(seed)
    x = torch.randn(9, 128).bfloat16()
    assert torch.equal(hadamard(x), hadamard(x.float()).bfloat16())


@pytest.mark.parametrize("shape", [(0, 128), (3, 0, 4)])
def test_empty(shape):
    assert hadamard(torch.empty(shape)).shape == shape


# --- refusals ---


@pytest.mark.parametrize("n", [0, 3, 96])
def test_length_must_be_a_power_of_two(n):
    with pytest.raises(ValueError, match=f"power of two; got {n}"):
        hadamard(torch.zeros(2, n))


def test_dtypes():
    with pytest.raises(TypeError, match="hadamard: x must be bfloat16 or float32"):
        hadamard(torch.zeros(4, dtype=torch.float16))
    with pytest.raises(ValueError, match="out_dtype must be"):
        hadamard(torch.zeros(4), out_dtype=torch.float64)
