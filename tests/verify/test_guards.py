# SPDX-License-Identifier: Apache-2.0
"""Guarded outputs: poison shows in what is not written, fences in what is written too much."""

from __future__ import annotations

import pytest
import torch

from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.verify.guards import FENCE, FENCE_BYTES, GuardedOutputs, check_fences, fenced
from megamoe.verify.values import whole_storage


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


# --- what is written in place ---


def pool() -> CachePool:
    """Return the second page of each block of a wider storage, as layers share blocks."""
    storage = torch.arange(5 * 512, dtype=torch.int64).to(torch.uint8).view(5, 512)
    return CachePool(storage[:, 128:384], 2, RowFormat.BF16, 64)


def test_a_fenced_pool_has_the_same_bytes_at_the_same_strides() -> None:
    original = pool()
    copy = fenced(original, "cpu")
    assert torch.equal(copy.storage, original.storage) and copy.storage.stride() == original.storage.stride()
    whole = whole_storage(copy.storage)
    assert torch.equal(whole[FENCE_BYTES:-FENCE_BYTES], whole_storage(original.storage))
    assert (whole[:FENCE_BYTES] == FENCE).all() and (whole[-FENCE_BYTES:] == FENCE).all()
    check_fences("op", "pool", copy)
    copy.storage.fill_(0)
    assert original.storage.any(), "it is a copy"


def test_a_fenced_tensor_keeps_its_strides() -> None:
    original = torch.randn(4, 10)[:, 2:7]
    copy = fenced(original, "cpu")
    assert torch.equal(copy, original) and copy.stride() == original.stride()
    check_fences("op", "logits", copy)


@pytest.mark.parametrize(("place", "side"), [(FENCE_BYTES - 1, "before"), (-FENCE_BYTES, "behind")])
def test_a_write_beside_what_is_changed_in_place_is_found(place: int, side: str) -> None:
    for original in (pool(), torch.zeros(3, 5)):
        copy = fenced(original, "cpu")
        whole_storage(copy.storage if isinstance(copy, CachePool) else copy)[place] = 0
        with pytest.raises(AssertionError, match=f"op: wrote 1 bytes {side} pool, which it changes in place"):
            check_fences("op", "pool", copy)
