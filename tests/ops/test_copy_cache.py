# SPDX-License-Identifier: Apache-2.0
"""copy_cache: bytes move between pools of any stride, and nothing else does."""

from __future__ import annotations

import pytest
import torch

from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.ops.copy_cache import copy_cache
from megamoe.ops.read_cache import read_cache
from megamoe.ops.write_cache import write_cache

WIDTHS = {
    RowFormat.FP8_ROPE_BF16: 192,
    RowFormat.BF16: 24,
    RowFormat.FP32: 6,
    RowFormat.INDEX_FP8: 32,
    RowFormat.INDEX_FP4: 64,
}


def slots(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def filled(num_blocks: int, rows: int, row_format: RowFormat, seed: int, stride: int | None = None) -> CachePool:
    pool = CachePool.allocate(num_blocks, rows, row_format, WIDTHS[row_format], block_stride_bytes=stride)
    values = torch.randn(pool.num_slots, pool.width, generator=torch.Generator().manual_seed(seed))
    write_cache(values, pool, torch.arange(pool.num_slots))
    return pool


# --- known answers ---


def test_rows_go_where_they_are_sent() -> None:
    source, target = (CachePool.allocate(2, 2, RowFormat.FP32, 1) for _ in range(2))
    write_cache(torch.tensor([[1.0], [2.0], [3.0], [-0.0]]), source, slots(0, 1, 2, 3))
    copy_cache(source, slots(3, 0, 2, -1), target, slots(0, 3, -1, 1))
    assert read_cache(target, slots(0, 1, 2, 3))[:, 0].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert str(read_cache(target, slots(0)).item()) == "-0.0"


def test_no_rows() -> None:
    pool = CachePool.allocate(1, 1, RowFormat.BF16, 2)
    copy_cache(pool, slots(), pool, slots())
    copy_cache(pool, slots(-1), pool, slots(0))
    assert int(pool.storage.count_nonzero()) == 0


# --- properties ---


@pytest.mark.parametrize("row_format", list(RowFormat), ids=lambda one: one.value)
@pytest.mark.parametrize("spare", [0, 4, 20, 64])
def test_a_copy_is_the_same_bytes_at_any_stride(row_format: RowFormat, spare: int, seed: int) -> None:
    source = filled(3, 5, row_format, seed)
    target = CachePool.allocate(2, 7, row_format, source.width, block_stride_bytes=0 or _bytes(row_format, 7) + spare)
    guard = target.storage.untyped_storage()
    whole = torch.empty(0, dtype=torch.uint8).set_(guard)
    whole.fill_(0xA5)
    at = torch.randperm(14, generator=torch.Generator().manual_seed(seed))[:9]
    source_slots = slots(0, 4, 5, 9, 14, 3, 7, 7, 1)
    copy_cache(source, source_slots, target, at)
    for rows, copied in ((source.data_rows, target.data_rows), (source.scale_rows, target.scale_rows)):
        assert torch.equal(copied[at // 7, at % 7], rows[source_slots // 5, source_slots % 5])
    written = CachePool.allocate(2, 7, row_format, source.width, block_stride_bytes=target.block_stride_bytes)
    for rows in (written.data_rows, written.scale_rows):
        rows[at // 7, at % 7] = 1
    untouched = torch.empty(0, dtype=torch.uint8).set_(written.storage.untyped_storage()) == 0
    assert bool((whole[untouched] == 0xA5).all()), "bytes outside the named rows changed"


def _bytes(row_format: RowFormat, rows: int) -> int:
    return -(-CachePool.allocate(1, rows, row_format, WIDTHS[row_format]).page_bytes // 4) * 4


# --- refusals ---


def test_refusals(seed: int) -> None:
    source, other = filled(1, 4, RowFormat.BF16, seed), filled(1, 4, RowFormat.FP32, seed)
    with pytest.raises(ValueError, match=r"same rows; got BF16 of width 24 and FP32 of width 6"):
        copy_cache(source, slots(0), other, slots(0))
    with pytest.raises(ValueError, match="source_slots must be -1 or in 0 .. 3; got 4"):
        copy_cache(source, slots(4), source, slots(0))
    with pytest.raises(ValueError, match="target_slots must be -1 or in 0 .. 3; got -2"):
        copy_cache(source, slots(0), source, slots(-2))
    with pytest.raises(ValueError, match="target_slots must be distinct; slot 2 appears twice"):
        copy_cache(source, slots(0, 1, 3), source, slots(2, -1, 2))
    copy_cache(source, slots(0, -1), source, slots(2, 2))  # one of them is not copied
    with pytest.raises(ValueError, match=r"target_slots must be \[T\] with T = 1"):
        copy_cache(source, slots(0), source, slots(0, 1))
    with pytest.raises(TypeError, match="source must be a CachePool"):
        copy_cache(source.storage, slots(0), source, slots(0))
    with pytest.raises(TypeError, match="source_slots must be int64"):
        copy_cache(source, slots(0).int(), source, slots(0))
