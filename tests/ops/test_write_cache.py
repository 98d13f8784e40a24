# SPDX-License-Identifier: Apache-2.0
"""write_cache: rows to bytes, in place, by slot. Every format is read back in test_read_cache."""

from __future__ import annotations

import struct

import pytest
import torch

from megamoe.formats.cache_rows import CachePool, RowFormat, encode_rows, row_bytes
from megamoe.ops.read_cache import read_cache
from megamoe.ops.write_cache import write_cache

FORMATS = [
    (RowFormat.FP8_ROPE_BF16, 512),
    (RowFormat.FP8_ROPE_BF16, 128),
    (RowFormat.BF16, 16),
    (RowFormat.FP32, 5),
    (RowFormat.INDEX_FP8, 128),
    (RowFormat.INDEX_FP4, 128),
    (RowFormat.INDEX_FP4, 32),
]


def filled(num_blocks: int, rows: int, row_format: RowFormat, width: int, stride: int | None = None) -> CachePool:
    """A pool whose every byte, between pages too, is 0xAA."""
    pool = CachePool.allocate(num_blocks, rows, row_format, width, block_stride_bytes=stride)
    whole_storage(pool).fill_(0xAA)
    return pool


def whole_storage(pool: CachePool) -> torch.Tensor:
    """All bytes of the allocation behind a pool, those between pages included."""
    return pool.storage.new_empty(0).set_(pool.storage.untyped_storage())


# --- known answers ---


def test_bytes_of_an_fp8_row():
    """Slot 3 of pages of 2 rows is row 1 of block 1: data at byte 192 of the page, scales at byte 2 * 192 + 2."""
    pool = filled(2, 2, RowFormat.FP8_ROPE_BF16, 128, stride=400)
    row = torch.zeros(1, 128)
    row[0, 0], row[0, 1], row[0, 2], row[0, 64], row[0, 127] = 448.0, -1.0, 2.0**-9, 1.0, -2.0
    write_cache(row, pool, torch.tensor([3]))
    page = pool.storage[1]
    assert pool.page_bytes == 2 * (64 + 128) + 2 * 2
    assert page[192:195].tolist() == [0x7E, 0xB8, 0x01]  # 448, -1, the smallest subnormal: scale 1
    assert int(page[195:256].count_nonzero()) == 0
    assert bytes(page[256:258].tolist()) == b"\x80\x3f"  # 1.0 as bf16
    assert bytes(page[382:384].tolist()) == b"\x00\xc0"  # -2.0
    assert page[384 + 2 : 384 + 4].tolist() == [127, 0]  # exponent 0, then the zero pad
    assert pool.storage[0].unique().tolist() == [0xAA] and page[:192].unique().tolist() == [0xAA]
    assert page[384:386].tolist() == [0xAA, 0xAA]


def test_bytes_of_an_fp4_key_of_68_bytes():
    pool = filled(1, 2, RowFormat.INDEX_FP4, 128)
    key = torch.zeros(1, 128)
    key[0, :4] = torch.tensor([6.0, -0.5, 1.0, -6.0])  # group 0: amax 6, scale 1
    key[0, 32:34] = torch.tensor([12.0, 2.0])  # group 1: amax 12, scale 2
    key[0, 64] = 6.5  # group 2: amax beyond 6, scale 2: 3.25 rounds to 3
    write_cache(key, pool, torch.tensor([1]))
    page = pool.storage[0]
    assert pool.page_bytes == 2 * 68
    assert page[64:66].tolist() == [0x97, 0xF2]  # low nibble first: 7 = 6.0, 9 = -0.5; 2 = 1.0, 15 = -6.0
    assert page[64 + 16].item() == 0x27  # 6 and 1
    assert page[64 + 32].item() == 0x05  # 3
    assert page[128 + 4 : 128 + 8].tolist() == [127, 128, 128, 1]  # an empty group takes the smallest scale, 2^-126
    assert page[128:132].tolist() == [0xAA] * 4


def test_bytes_of_an_fp8_key_of_132_bytes():
    pool = filled(1, 2, RowFormat.INDEX_FP8, 128)
    key = torch.zeros(1, 128)
    key[0, 0], key[0, 1] = 449.0, 2.0  # amax beyond 448: scale 2, 224.5 rounds to 224
    write_cache(key, pool, torch.tensor([0]))
    page = pool.storage[0]
    assert pool.page_bytes == 2 * 132
    assert page[0:2].tolist() == [0x76, 0x38]
    assert bytes(page[256:260].tolist()) == struct.pack("<f", 2.0)
    assert page[128:256].unique().tolist() == [0xAA] and page[260:264].tolist() == [0xAA] * 4


def test_plain_rows_are_their_bytes():
    pool = filled(1, 1, RowFormat.FP32, 2)
    write_cache(torch.tensor([[1.0, -0.0]]), pool, torch.tensor([0]))
    assert bytes(pool.storage[0].tolist()) == struct.pack("<ff", 1.0, -0.0)
    pool = filled(1, 1, RowFormat.BF16, 2)
    write_cache(torch.tensor([[1.0 + 2.0**-8, -1.5]]), pool, torch.tensor([0]))  # a tie goes to even: 1.0
    assert pool.storage[0].tolist() == [0x80, 0x3F, 0xC0, 0xBF]


# --- properties ---


@pytest.mark.parametrize("row_format, width", FORMATS)
def test_only_the_named_rows_change(row_format, width, seed):
    torch.manual_seed(seed)
    data_bytes, scale_bytes = row_bytes(row_format, width)
    stride = 3 * (data_bytes + scale_bytes) + 64
    pool = filled(4, 3, row_format, width, stride=stride - stride % 8)
    rows = torch.randn(4, width)
    slots = torch.tensor([7, -1, 2, 11])
    write_cache(rows, pool, slots)
    encoded = encode_rows(rows, row_format)
    for slot in range(12):
        data, scales = pool.data_rows[slot // 3, slot % 3], pool.scale_rows[slot // 3, slot % 3]
        if slot in (7, 2, 11):
            source = slots.tolist().index(slot)
            assert torch.equal(data, encoded.data[source]) and torch.equal(scales, encoded.scales[source])
        else:
            assert data.unique().tolist() in ([0xAA], []) and scales.unique().tolist() in ([0xAA], [])
    whole = whole_storage(pool).view(4, -1)
    assert whole[:, pool.page_bytes :].unique().tolist() == [0xAA]


@pytest.mark.parametrize("row_format, width", FORMATS)
def test_one_by_one_equals_all_at_once(row_format, width, seed):
    torch.manual_seed(seed)
    rows = torch.randn(37, width).bfloat16()
    slots = torch.randperm(40)[:37]
    together, alone = filled(5, 8, row_format, width), filled(5, 8, row_format, width)
    write_cache(rows, together, slots)
    for row, slot in zip(rows.split(1), slots.split(1), strict=True):
        write_cache(row, alone, slot)
    assert torch.equal(whole_storage(together), whole_storage(alone))


@pytest.mark.parametrize("offset, extra", [(0, 1), (1, 0), (1, 3), (4, 12)])
def test_pages_at_any_byte(offset, extra, seed):
    """FP4 pages may lie at odd bytes of a larger block, where no wider word fits."""
    torch.manual_seed(seed)
    block = torch.full((3, 2 * 68 + offset + extra), 0xAA, dtype=torch.uint8)
    pool = CachePool(block[:, offset : offset + 2 * 68], 2, RowFormat.INDEX_FP4, 128)
    keys = torch.randn(6, 128)
    write_cache(keys, pool, torch.arange(6))
    plain = CachePool.allocate(3, 2, RowFormat.INDEX_FP4, 128)
    write_cache(keys, plain, torch.arange(6))
    assert torch.equal(pool.storage, plain.storage)
    assert torch.equal(read_cache(pool, torch.arange(6)), read_cache(plain, torch.arange(6)))
    assert block[:, :offset].unique().tolist() == ([0xAA] if offset else [])


@pytest.mark.parametrize(("row_format", "width"), FORMATS)
def test_rows_at_any_address(row_format, width, seed):
    """One row of a wider tensor is contiguous and may start between two words of the pool."""
    wide = torch.randn(1, width + 1, generator=torch.Generator().manual_seed(seed)).bfloat16()
    pools = [CachePool.allocate(2, 3, row_format, width, block_stride_bytes=8192) for _ in range(2)]
    for rows, pool in zip((wide[:, 1:], wide[:, 1:].clone()), pools, strict=True):
        write_cache(rows, pool, torch.tensor([4]))
    assert torch.equal(pools[0].storage, pools[1].storage)


def test_nothing_to_write():
    pool = filled(1, 2, RowFormat.FP8_ROPE_BF16, 128)
    write_cache(torch.empty(0, 128), pool, torch.empty(0, dtype=torch.int64))
    write_cache(torch.full((2, 128), torch.nan), pool, torch.tensor([-1, -1]))
    assert whole_storage(pool).unique().tolist() == [0xAA]
    empty = CachePool.allocate(0, 2, RowFormat.BF16, 8)
    write_cache(torch.ones(1, 8), empty, torch.tensor([-1]))


def test_values_at_the_edges_survive(seed):
    """Saturation, zeros of both signs and tiny values: what comes back is what the format says."""
    pool = CachePool.allocate(1, 4, RowFormat.FP8_ROPE_BF16, 128)
    rows = torch.zeros(4, 128)
    rows[0, :64] = 3.0e38
    rows[1, :64] = -0.0
    rows[2, 0] = 1e-30
    rows[3, 0] = 1e-4
    write_cache(rows, pool, torch.arange(4))
    back = read_cache(pool, torch.arange(4))
    assert back[0, :64].unique().tolist() == [57344.0]  # 448 * 2^7
    assert back[1, :64].tolist() == [0.0] * 64 and bool(back[1, :64].signbit().all())
    assert back[2, 0].item() == 0.0
    assert abs(back[3, 0].item() / 1e-4 - 1) < 2.0**-4


# --- refusals ---


def test_refusals():
    pool = CachePool.allocate(2, 4, RowFormat.BF16, 16)
    rows = torch.zeros(2, 16)
    with pytest.raises(ValueError, match=r"slots must be -1 or in 0 .. 7; got 8"):
        write_cache(rows, pool, torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="got -2"):
        write_cache(rows, pool, torch.tensor([0, -2]))
    with pytest.raises(ValueError, match="slot 5 appears twice"):
        write_cache(rows, pool, torch.tensor([5, 5]))
    with pytest.raises(ValueError, match=r"rows must be \[T, 16\] for this pool"):
        write_cache(torch.zeros(2, 8), pool, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="slots must be"):
        write_cache(rows, pool, torch.tensor([0, 1, 2]))
    with pytest.raises(TypeError, match="slots must be int64"):
        write_cache(rows, pool, torch.tensor([0, 1], dtype=torch.int32))
    with pytest.raises(TypeError, match="rows must be bfloat16 or float32"):
        write_cache(rows.half(), pool, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="pool must be a CachePool; got Tensor"):
        write_cache(rows, pool.storage, torch.tensor([0, 1]))
    write_cache(rows, pool, torch.tensor([-1, -1]))  # -1 may appear any number of times


def test_a_refused_call_writes_nothing():
    pool = filled(1, 4, RowFormat.BF16, 16)
    for rows, slots in (
        (torch.zeros(2, 16), torch.tensor([0, 4])),
        (torch.zeros(2, 16), torch.tensor([1, 1])),
    ):
        with pytest.raises(ValueError):
            write_cache(rows, pool, slots)
    assert whole_storage(pool).unique().tolist() == [0xAA]


def test_values_that_cannot_be_quantized_are_refused():
    pool = CachePool.allocate(1, 4, RowFormat.INDEX_FP4, 128)
    with pytest.raises(ValueError, match="encode_rows"):
        write_cache(torch.full((1, 128), torch.nan), pool, torch.tensor([0]))
