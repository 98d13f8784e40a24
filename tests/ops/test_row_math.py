# SPDX-License-Identifier: Apache-2.0
"""row_math: right, and independent of where in a tensor an element stands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megamoe.ops.row_math import row_sum, sigmoid, silu, softplus

FUNCTIONS = {"sigmoid": sigmoid, "silu": silu, "softplus": softplus}
EXACT = {
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
}

# --- known answers ---


def test_extremes() -> None:
    x = torch.tensor([-200.0, -0.0, 0.0, 200.0])
    assert sigmoid(x).tolist() == [0.0, 0.5, 0.5, 1.0]
    assert silu(x).tolist() == [0.0, 0.0, 0.0, 200.0]
    assert softplus(x).tolist()[0] == 0.0 and softplus(x).tolist()[3] == 200.0
    assert softplus(torch.zeros(1)).item() == pytest.approx(0.6931472, rel=1e-7)
    # softplus keeps the relative precision of small results
    assert softplus(torch.tensor([-20.0])).item() == pytest.approx(2.061153620314381e-09, rel=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_close_to_fp64(name: str) -> None:
    x = torch.linspace(-30, 30, 4001)
    torch.testing.assert_close(FUNCTIONS[name](x), EXACT[name](x.double()).float(), rtol=1e-6, atol=0.0)


def test_inputs_are_left_alone() -> None:
    x = torch.randn(5)
    for function in FUNCTIONS.values():
        before = x.clone()
        function(x)
        assert torch.equal(x, before)


# --- properties ---


def _differences(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> int:
    """Count elements that change with their place: alone, at other offsets, strided."""
    full = function(x)
    count = 0
    for offset in range(20):
        count += int((function(x[offset:].clone()) != full[offset:]).sum())
        count += int((function(x[offset : offset + 1].clone()) != full[offset : offset + 1]).sum())
    return count + int((function(torch.stack((x, x), 1)[:, 0]) != full).sum())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_place_does_not_matter(name: str, seed: int) -> None:
    x = torch.randn(3001, generator=torch.Generator().manual_seed(seed)) * 4
    assert _differences(FUNCTIONS[name], x) == 0


@pytest.mark.parametrize("length", [1, 3, 4, 31, 256, 1000, 32767, 32768, 40000])
def test_row_sum_does_not_depend_on_other_rows(length: int, seed: int) -> None:
    threads = torch.get_num_threads()
    x = torch.randn(37, length, generator=torch.Generator().manual_seed(seed))
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        full = row_sum(x)
        assert full.shape == (37, 1)
        for start, stop in ((0, 1), (5, 6), (36, 37), (3, 5), (1, 30)):
            assert torch.equal(row_sum(x[start:stop]), full[start:stop])
        assert torch.equal(row_sum(x.T.contiguous().T), full)
        assert torch.equal(row_sum(x.view(37, 1, length))[:, 0], full)
    torch.set_num_threads(threads)
    torch.testing.assert_close(full, x.double().sum(-1, keepdim=True).float(), rtol=1e-4, atol=1e-3)


def test_row_sum_of_no_rows() -> None:
    assert row_sum(torch.zeros(0, 5)).shape == (0, 1)
