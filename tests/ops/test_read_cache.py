# SPDX-License-Identifier: Apache-2.0
"""read_cache: bytes back to values, by slot."""

from __future__ import annotations

import struct

import pytest
import torch

from megamoe.formats.cache_rows import CachePool, RowFormat, decode_rows, encode_rows
from megamoe.ops.read_cache import read_cache
from megamoe.ops.write_cache import write_cache

FORMATS = [
    (RowFormat.FP8_ROPE_BF16, 512),
    (RowFormat.FP8_ROPE_BF16, 128),
    (RowFormat.BF16, 16),
    (RowFormat.FP32, 5),
    (RowFormat.INDEX_FP8, 128),
    (RowFormat.INDEX_FP4, 128),
]

# --- known answers ---


def test_values_of_hand_made_bytes():
    """A page of two FP4 keys, written byte by byte."""
    pool = CachePool.allocate(1, 2, RowFormat.INDEX_FP4, 128)
    page = pool.storage[0]
    page[64] = 0x97  # 6.0, -0.5
    page[64 + 63] = 0xF0  # 0.0, -6.0
    page[128 + 4 : 128 + 8] = torch.tensor([127, 127, 127, 130], dtype=torch.uint8)
    row = read_cache(pool, torch.tensor([1]))[0]
    assert row[:2].tolist() == [6.0, -0.5] and row[126:].tolist() == [0.0, -48.0]
    assert int(row.count_nonzero()) == 3


def test_values_of_hand_made_fp8_bytes():
    pool = CachePool.allocate(1, 2, RowFormat.INDEX_FP8, 128)
    page = pool.storage[0]
    page[128:130] = torch.tensor([0x7E, 0x81], dtype=torch.uint8)  # 448, -2^-9
    page[256 + 4 : 256 + 8] = torch.tensor(list(struct.pack("<f", 0.5)), dtype=torch.uint8)
    assert read_cache(pool, torch.tensor([1]))[0, :3].tolist() == [224.0, -(2.0**-10), 0.0]


def test_minus_one_is_zeros_anywhere():
    pool = CachePool.allocate(2, 2, RowFormat.FP32, 3)
    write_cache(torch.arange(12.0).view(4, 3) + 1, pool, torch.arange(4))
    rows = read_cache(pool, torch.tensor([[-1, 3], [0, -1]]))
    assert rows.tolist() == [[[0, 0, 0], [10, 11, 12]], [[1, 2, 3], [0, 0, 0]]]


# --- properties ---


@pytest.mark.parametrize("row_format, width", FORMATS)
def test_round_trip_is_the_formats_own(row_format, width, seed):
    torch.manual_seed(seed)
    rows = torch.randn(24, width) * 10.0 ** torch.randint(-4, 4, (24, 1))
    slots = torch.randperm(32)[:24]
    pool = CachePool.allocate(4, 8, row_format, width)
    write_cache(rows, pool, slots)
    expected = decode_rows(*encode_rows(rows, row_format), row_format, width)
    assert torch.equal(read_cache(pool, slots), expected)
    again = CachePool.allocate(4, 8, row_format, width)
    write_cache(expected, again, slots)
    assert torch.equal(read_cache(again, slots), expected)  # stored values are fixed points of their format


@pytest.mark.parametrize("row_format, width", FORMATS)
@pytest.mark.parametrize("page", [1, 3, 16, 64])
def test_pages_change_nothing(row_format, width, page, seed):
    """Page size, order of pages and space between them do not reach the values."""
    torch.manual_seed(seed)
    rows = torch.randn(50, width)
    plain = CachePool.allocate(1, 50, row_format, width)
    write_cache(rows, plain, torch.arange(50))
    num_blocks = -(-50 // page)
    small = CachePool.allocate(num_blocks, page, row_format, width)
    pool = CachePool.allocate(num_blocks, page, row_format, width, block_stride_bytes=small.block_stride_bytes + 48)
    order = torch.randperm(num_blocks)
    slots = order[torch.arange(50) // page] * page + torch.arange(50) % page
    write_cache(rows, pool, slots)
    assert torch.equal(read_cache(pool, slots), read_cache(plain, torch.arange(50)))


def test_any_shape_of_slots_and_repeats(seed):
    torch.manual_seed(seed)
    pool = CachePool.allocate(2, 4, RowFormat.BF16, 8)
    write_cache(torch.randn(8, 8), pool, torch.arange(8))
    slots = torch.tensor([[[1, 1, -1], [7, 0, 1]]])
    rows = read_cache(pool, slots)
    assert rows.shape == (1, 2, 3, 8) and rows.dtype == torch.float32 and rows.is_contiguous()
    assert torch.equal(rows[0, 0, 0], rows[0, 1, 2])
    assert read_cache(pool, torch.tensor(3)).shape == (8,)
    assert read_cache(pool, torch.empty(0, 5, dtype=torch.int64)).shape == (0, 5, 8)


def test_what_is_not_read_may_be_anything():
    """Unwritten rows hold bytes that are NaN; reading others, or -1, is not disturbed."""
    pool = CachePool.allocate(1, 3, RowFormat.FP8_ROPE_BF16, 128)
    pool.storage.fill_(0xFF)
    write_cache(torch.ones(1, 128), pool, torch.tensor([1]))
    rows = read_cache(pool, torch.tensor([-1, 1, -1]))
    assert rows.sum(-1).tolist() == [0.0, 128.0, 0.0]


def test_the_result_is_the_callers_own():
    pool = CachePool.allocate(1, 1, RowFormat.FP32, 2)
    rows = read_cache(pool, torch.tensor([0]))
    rows.fill_(5.0)
    assert int(pool.storage.count_nonzero()) == 0


def test_a_pool_without_blocks():
    pool = CachePool.allocate(0, 4, RowFormat.BF16, 8)
    assert read_cache(pool, torch.tensor([-1, -1])).tolist() == [[0.0] * 8] * 2


# --- refusals ---


def test_refusals():
    pool = CachePool.allocate(2, 4, RowFormat.BF16, 16)
    with pytest.raises(ValueError, match=r"read_cache: slots must be -1 or in 0 .. 7; got 8 for a pool of 2 blocks"):
        read_cache(pool, torch.tensor([8]))
    with pytest.raises(ValueError, match="got -2"):
        read_cache(pool, torch.tensor([-2]))
    with pytest.raises(TypeError, match="slots must be int64"):
        read_cache(pool, torch.tensor([0], dtype=torch.int32))
    with pytest.raises(TypeError, match="pool must be a CachePool"):
        read_cache(pool.storage, torch.tensor([0]))


def test_damaged_rows_are_refused():
    pool = CachePool.allocate(1, 1, RowFormat.FP8_ROPE_BF16, 128)
    pool.storage.fill_(0xFF)
    with pytest.raises(ValueError, match="NaN"):
        read_cache(pool, torch.tensor([0]))
