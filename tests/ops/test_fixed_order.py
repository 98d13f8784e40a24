# SPDX-License-Identifier: Apache-2.0
"""Sums and products that do not depend on what else is in the call."""

from __future__ import annotations

import pytest
import torch

from megamoe.ops.fixed_order import batched_matmul, sum_by_halves

# --- known answers ---


def test_the_order_of_a_sum():
    """Five terms: (a + c) and (b + d), e waits; ((a + c) + (b + d)), e waits; then the last two."""
    big = 2.0**24
    x = torch.tensor([big, 1.0, -big, 1.0, 0.5])
    assert sum_by_halves(x, 0).item() == 2.5  # from left to right the first 1.0 would be lost against 2^24
    assert sum_by_halves(torch.tensor([big, -big, 1.0, 1.0]), 0).item() == 1.0  # 2^24 + 1 rounds to 2^24


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 100])
def test_every_term_counts_once(length):
    x = (2.0 ** torch.arange(20))[:, None].expand(-1, length) * torch.arange(1, length + 1)
    assert torch.equal(sum_by_halves(x, 1), x.sum(1))


def test_products():
    x = torch.tensor([[[1.0, 2.0, 3.0]], [[0.0, 1.0, 0.0]]])
    y = torch.arange(24.0).view(2, 4, 3).mT
    assert batched_matmul(x, y).tolist() == [[[8.0, 26.0, 44.0, 62.0]], [[13.0, 16.0, 19.0, 22.0]]]


# --- properties ---


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_sums_along_any_dimension(dim, seed):
    torch.manual_seed(seed)
    x = torch.randn(6, 5, 7)
    torch.testing.assert_close(sum_by_halves(x, dim), x.sum(dim))
    assert torch.equal(sum_by_halves(x, dim), sum_by_halves(x.movedim(dim, 0).contiguous(), 0))


@pytest.fixture(params=[1, 2])
def num_threads(request):
    """Run with this many threads: some matrix products are split between them."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_rows", [1, 4, 12])
@pytest.mark.parametrize("inner", [1, 64, 384, 508, 1100])
@pytest.mark.parametrize("num_columns", [1, 64, 128])
def test_a_product_does_not_depend_on_its_batch(num_rows, inner, num_columns, num_threads, seed):
    torch.manual_seed(seed)
    x, y = torch.randn(9, num_rows, inner), torch.randn(9, num_columns, inner).mT
    whole = batched_matmul(x, y)
    torch.testing.assert_close(whole, x @ y, rtol=1e-4, atol=1e-3)
    for batch in (slice(0, 1), slice(8, 9), slice(2, 4), slice(1, 9)):
        assert torch.equal(batched_matmul(x[batch], y[batch]), whole[batch])
    assert torch.equal(batched_matmul(x, y[3].expand(9, -1, -1))[3], whole[3])
    row_major = y.contiguous()
    assert torch.equal(batched_matmul(x[:1], row_major[:1]), batched_matmul(x, row_major)[:1])


def test_empty_batch():
    assert batched_matmul(torch.empty(0, 3, 8), torch.empty(0, 8, 5)).shape == (0, 3, 5)


# --- refusals ---


def test_no_terms():
    with pytest.raises(ValueError, match="has no terms"):
        sum_by_halves(torch.empty(3, 0), 1)
