# SPDX-License-Identifier: Apache-2.0
"""write_latent: bit for bit the norms, the rotation and write_cache."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch

from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.ops.rms_norm import rms_norm
from megamoe.ops.rope import rope, rope_table
from megamoe.ops.write_cache import write_cache
from megamoe.ops.write_latent import write_latent
from megamoe.verify.tolerance import assert_within
from megamoe.verify.values import copied, moved, whole_storage

FORMATS = [(RowFormat.FP8_ROPE_BF16, 128), (RowFormat.BF16, 24), (RowFormat.FP32, 16)]
TABLE = rope_table(8, 10000.0)
NONE = torch.empty(0, dtype=torch.int64)
PER_TOKEN = ("query_latent", "kv", "slots", "pos")


def pool_of(row_format: RowFormat, width: int) -> CachePool:
    pool = CachePool.allocate(6, 8, row_format, width)
    pool.storage.fill_(0xAA)
    return pool


def inputs(num_tokens: int, width: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """Return query latent, latent rows, both norms and positions."""
    generator = torch.Generator().manual_seed(seed)
    latent, kv = (2.0 * torch.randn(num_tokens, size, generator=generator) for size in (40, width))
    norms = ((1.0 + 0.2 * torch.randn(size, generator=generator)).bfloat16() for size in (40, width))
    return latent.to(dtype), kv.to(dtype), *norms, torch.randint(10**6, (num_tokens,), generator=generator)


# --- known answers ---


def test_a_row_by_hand() -> None:
    """Root mean squares of 2 and of 1; at position 0 nothing turns."""
    pool = CachePool.allocate(1, 2, RowFormat.FP32, 2)
    y = write_latent(
        torch.tensor([[2.0, -2.0]]),
        torch.tensor([[1.0, -1.0]]),
        torch.tensor([3.0, 0.5]),
        torch.tensor([1.0, 4.0]),
        pool,
        torch.tensor([1]),
        torch.tensor([0]),
        rope_table(2, 10000.0),
        eps=0.0,
    )
    assert y is not None and y.tolist() == [[3.0, -0.5]]
    assert bytes(pool.storage[0, :16].tolist()) == bytes(8) + struct.pack("<ff", 1.0, -4.0)


# --- properties ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("row_format, width", FORMATS)
def test_is_the_composition_bit_for_bit(row_format: RowFormat, width: int, dtype: torch.dtype, seed: int) -> None:
    latent, kv, q_norm, kv_norm, pos = inputs(33, width, seed, dtype)
    slots = torch.randperm(48, generator=torch.Generator().manual_seed(seed))[:33]
    slots[[2, 17]] = -1
    got, want = pool_of(row_format, width), pool_of(row_format, width)
    y = write_latent(latent, kv, q_norm, kv_norm, got, slots, pos, TABLE, eps=1e-5)
    write_cache(rope(rms_norm(kv, kv_norm, eps=1e-5), pos, TABLE), want, slots)
    assert y is not None and torch.equal(y, rms_norm(latent, q_norm, eps=1e-5)) and y.dtype == dtype
    assert torch.equal(got.storage, want.storage)


@pytest.mark.parametrize("row_format, width", FORMATS)
def test_one_by_one_as_columns_of_one_tensor_and_without_queries(row_format: RowFormat, width: int, seed: int) -> None:
    latent, kv, q_norm, kv_norm, pos = inputs(9, width, seed)
    both = torch.cat((latent, kv, latent), dim=1)
    slots = torch.arange(9) * 5
    whole, alone, rows = (pool_of(row_format, width) for _ in range(3))
    y = write_latent(latent, kv, q_norm, kv_norm, whole, slots, pos, TABLE)
    assert y is not None
    for token in range(9):
        part = slice(token, token + 1)
        columns = both[part, :40], both[part, 40 : 40 + width]
        got = write_latent(*columns, q_norm, kv_norm, alone, slots[part], pos[part], TABLE)
        assert got is not None and got.is_contiguous() and torch.equal(got, y[part])
    strided = both[:, :40], both[:, 40 : 40 + width]
    again = write_latent(*strided, q_norm, kv_norm, alone, slots, pos, TABLE)
    assert again is not None and torch.equal(again, y)
    assert write_latent(None, kv, None, kv_norm, rows, slots, pos, TABLE) is None
    assert torch.equal(whole.storage, alone.storage) and torch.equal(whole.storage, rows.storage)


def test_nobody_writes_nothing_and_changes_nobody(seed: int) -> None:
    latent, kv, q_norm, kv_norm, pos = inputs(4, 128, seed)
    real, slots = torch.tensor([0, 2, 3]), torch.tensor([7, 9, 0])
    alone, padded = pool_of(RowFormat.FP8_ROPE_BF16, 128), pool_of(RowFormat.FP8_ROPE_BF16, 128)
    want = write_latent(latent[real], kv[real], q_norm, kv_norm, alone, slots, pos[real], TABLE)
    kv[1], latent[1], pos[1] = torch.nan, torch.nan, -1
    got = write_latent(latent, kv, q_norm, kv_norm, padded, torch.tensor([7, -1, 9, 0]), pos, TABLE)
    assert got is not None and want is not None and torch.equal(got[real], want)
    assert torch.equal(alone.storage, padded.storage)


def test_no_tokens() -> None:
    pool = pool_of(RowFormat.FP32, 16)
    y = write_latent(torch.empty(0, 40), torch.empty(0, 16), torch.ones(40), torch.ones(16), pool, NONE, NONE, TABLE)
    assert y is not None and y.shape == (0, 40) and pool.storage.unique().tolist() == [0xAA]


# --- kernel ---


def on_gpu(
    num_tokens: int, query_width: int | None, seed: int, row_stride: int = 0
) -> tuple[dict[str, Any], CachePool]:
    """Return arguments as a model calls it, columns of one linear, and the pool, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(num_tokens, (query_width or 0) + 512 + row_stride, generator=generator).bfloat16()
    pool = CachePool.allocate(40, 11, RowFormat.FP8_ROPE_BF16, 512)
    pool.storage.fill_(0xAA)
    slots = torch.randperm(440, generator=generator)[:num_tokens]
    slots[1::5] = -1
    given = {
        "query_latent": None if query_width is None else both[:, :query_width],
        "kv": both[:, (query_width or 0) :][:, :512],
        "q_norm": None
        if query_width is None
        else (1.0 + 0.2 * torch.randn(query_width, generator=generator)).bfloat16(),
        "kv_norm": (1.0 + 0.2 * torch.randn(512, generator=generator)).bfloat16(),
        "slots": slots,
        "pos": torch.randint(2**20, (num_tokens,), generator=generator).masked_fill(slots < 0, -1),
        "table": rope_table(64, 10000.0),
    }
    return given, pool


def written(given: dict[str, Any], pool: CachePool) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Run the kernel on copies; return what it returns and the bytes of the pool."""
    there = copied(pool, "cuda")
    y = write_latent(pool=there, **{name: moved(one, "cuda") for name, one in given.items()})
    return None if y is None else y.cpu(), whole_storage(there.storage).cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("query_width", [None, 128, 1024, 1536])
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 131])
def test_the_kernel_gives_a_token_the_same_bytes_whatever_shares_its_call(
    query_width: int | None, num_tokens: int, seed: int
) -> None:
    given, pool = on_gpu(num_tokens, query_width, seed, row_stride=64)
    y, stored = written(given, pool)
    want = copied(pool, "cpu")
    expected = write_latent(pool=want, **given)
    if y is not None and expected is not None:
        assert_within("write_latent", y, expected)
    touched = whole_storage(want.storage) != whole_storage(pool.storage)
    assert not bool(((stored != whole_storage(pool.storage)) & ~touched).any())
    alone = pool
    for token in range(num_tokens):
        part = slice(token, token + 1)
        few = {name: one[part] if name in PER_TOKEN and one is not None else one for name, one in given.items()}
        row, bytes_after = written(few, alone)
        alone = copied(alone, "cpu")
        whole_storage(alone.storage).copy_(bytes_after)
        assert y is None or row is None or torch.equal(row[0], y[token])
    assert torch.equal(whole_storage(alone.storage), stored)


@pytest.mark.gpu
def test_the_kernel_reaches_pages_beyond_4_gib(seed: int) -> None:
    """Pages so far apart that 32 bits do not hold the distance."""
    given, _ = on_gpu(3, None, seed)
    given["slots"] = torch.tensor([12, -1, 21])
    near = CachePool.allocate(2, 11, RowFormat.FP8_ROPE_BF16, 512)
    stride = 2**32 + 4096
    whole = torch.zeros(stride + near.page_bytes, dtype=torch.uint8, device="cuda")
    far = CachePool(whole.as_strided((2, near.page_bytes), (stride, 1)), 11, RowFormat.FP8_ROPE_BF16, 512)
    _, stored = written(given, near)
    write_latent(pool=far, **{name: moved(one, "cuda") for name, one in given.items()})
    assert torch.equal(far.storage[1].cpu(), stored.view(2, -1)[1, : near.page_bytes])
    assert not bool(whole[: 2**32].any())


# --- refusals ---


def test_refusals() -> None:
    pool = pool_of(RowFormat.FP32, 16)
    latent, kv, q_norm, kv_norm = torch.zeros(2, 40), torch.zeros(2, 16), torch.ones(40), torch.ones(16)
    slots = pos = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="query_latent and q_norm go together; got one of them"):
        write_latent(latent, kv, None, kv_norm, pool, slots, pos, TABLE)
    with pytest.raises(ValueError, match="query_latent and q_norm go together"):
        write_latent(None, kv, q_norm, kv_norm, pool, slots, pos, TABLE)
    with pytest.raises(ValueError, match=r"kv must be \[T, 16\] for this pool.*; got \[2, 8\]"):
        write_latent(latent, kv[:, :8], q_norm, kv_norm[:8], pool, slots, pos, TABLE)
    with pytest.raises(ValueError, match="at least the 64 channels of the table"):
        write_latent(latent, kv, q_norm, kv_norm, pool, slots, pos, rope_table(64, 10000.0))
    with pytest.raises(ValueError, match=r"q_norm must be \[Q\]"):
        write_latent(latent, kv, q_norm[:3], kv_norm, pool, slots, pos, TABLE)
    with pytest.raises(ValueError, match=r"slots must be \[T\]"):
        write_latent(latent, kv, q_norm, kv_norm, pool, slots[:1], pos, TABLE)
    with pytest.raises(TypeError, match="pos must be int64; got int32"):
        write_latent(latent, kv, q_norm, kv_norm, pool, slots, pos.int(), TABLE)
    with pytest.raises(TypeError, match="pool must be a CachePool; got Tensor"):
        write_latent(latent, kv, q_norm, kv_norm, pool.storage, slots, pos, TABLE)
