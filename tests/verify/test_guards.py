# SPDX-License-Identifier: Apache-2.0
"""Guarded outputs: poison shows in what is not written, fences in what is written too much."""

from __future__ import annotations

import pytest
import torch

from megamoe.verify.guards import GuardedOutputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (1,), ()], ids=str)
def test_outputs_have_shape_dtype_and_poison(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with GuardedOutputs(0xFF) as guards:
        y = torch.empty(shape, dtype=dtype)
    assert y.shape == shape and y.dtype == dtype and y.is_contiguous() and y.data_ptr() % 16 == 0
    assert (y.reshape(-1).view(torch.uint8) == 0xFF).all()
    if dtype.is_floating_point:
        assert y.isnan().all()
    assert guards.num_outputs == 1
    guards.check("op")


def test_the_ways_to_name_a_size() -> None:
    with GuardedOutputs():
        assert torch.empty(2, 3).shape == torch.empty((2, 3)).shape == torch.empty(torch.Size([2, 3])).shape == (2, 3)


@pytest.mark.parametrize(("offset", "side"), [(-1, "before"), (6, "after")])
def test_a_write_beside_an_output_is_found(offset: int, side: str) -> None:
    with GuardedOutputs(0x5A) as guards:
        torch.empty(4)
        y = torch.empty(6)
    y.as_strided((1,), (1,), y.storage_offset() + offset).fill_(1.0)
    with pytest.raises(AssertionError, match=rf"op: wrote \d bytes {side} output 1"):
        guards.check("op")


def test_torch_empty_is_put_back_even_after_an_error() -> None:
    original = torch.empty
    with pytest.raises(RuntimeError), GuardedOutputs():
        assert torch.empty is not original
        raise RuntimeError
    assert torch.empty is original
