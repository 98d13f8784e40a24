# SPDX-License-Identifier: Apache-2.0
"""mean_of_streams and add_to_streams: fp32 sums, rounded once."""

from __future__ import annotations

import pytest
import torch

from megamoe.ops.streams import add_to_streams, mean_of_streams

from .invariance import assert_row_invariant

# --- known answers ---


def test_means_by_hand() -> None:
    x = torch.tensor([[[1.0, -0.0], [2.0, -0.0], [6.0, -0.0]]])
    assert mean_of_streams(x).tolist() == [[3.0, -0.0]] and mean_of_streams(x)[0, 1].signbit()
    one = torch.tensor([[[1.0], [2.0**-8], [2.0**-8], [0.0]]]).bfloat16()
    assert mean_of_streams(one).item() == (1.0 + 2.0**-7) / 4.0  # rounding after every addition loses both


def test_sums_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0], [2.0**-9, 0.0]]]).bfloat16()
    got = add_to_streams(x, torch.tensor([[2.0**-9 + 2.0**-8, -1.0]]))  # the row is not rounded before it is added
    assert got.tolist() == [[[1.0 + 2.0**-7, 1.0], [2.0**-7, -1.0]]]


# --- properties ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_agree_with_fp64_and_are_row_invariant(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, e = torch.randn(35, 4, 24, generator=generator).to(dtype), torch.randn(35, 24, generator=generator).to(dtype)
    step = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-22
    torch.testing.assert_close(mean_of_streams(x).double(), x.double().mean(1), rtol=step, atol=step)
    want = e.double()[:, None] + x.double()
    torch.testing.assert_close(add_to_streams(x, e).double(), want, rtol=step, atol=step)
    assert_row_invariant(lambda streams, rows: (mean_of_streams(streams), add_to_streams(streams, rows)), x, e)


def test_the_mean_goes_where_it_is_wanted(seed: int) -> None:
    x = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(seed))
    beside = torch.full((5, 24), 7.0)
    part = beside[:, 8:16]
    assert mean_of_streams(x, out=part) is part
    assert torch.equal(part, mean_of_streams(x))
    assert beside[:, :8].unique().tolist() == [7.0] and beside[:, 16:].unique().tolist() == [7.0]


def test_no_tokens() -> None:
    assert mean_of_streams(torch.empty(0, 4, 8)).shape == (0, 8)
    assert add_to_streams(torch.empty(0, 4, 8), torch.empty(0, 8)).shape == (0, 4, 8)


# --- refusals ---


def test_refusals() -> None:
    x = torch.zeros(3, 4, 8)
    with pytest.raises(ValueError, match=r"mean_of_streams: x must have at least one stream; got \[3, 0, 8\]"):
        mean_of_streams(x[:, :0])
    with pytest.raises(ValueError, match=r"mean_of_streams: out must be \[T, D\]"):
        mean_of_streams(x, out=torch.zeros(3, 9))
    with pytest.raises(TypeError, match="mean_of_streams: out must be float32; got bfloat16"):
        mean_of_streams(x, out=torch.zeros(3, 8).bfloat16())
    with pytest.raises(TypeError, match="mean_of_streams: x must be bfloat16 or float32"):
        mean_of_streams(x.half())
    with pytest.raises(ValueError, match=r"add_to_streams: e must be \[T, D\]"):
        add_to_streams(x, torch.zeros(3, 7))
    with pytest.raises(TypeError, match="add_to_streams: e must be bfloat16 or float32"):
        add_to_streams(x, torch.zeros(3, 8).half())
