# SPDX-License-Identifier: Apache-2.0
"""Slots, block tables and copies of rows: what the cases of verify do not reach.

Addresses beyond 2^31, layers of any number of kinds, saves and changes of nobody, rows that the kernels refuse.
"""

from __future__ import annotations

import pytest
import torch

from megamoe.formats.cache_rows import CachePool, RowFormat, page_bytes
from megamoe.kernels.cache import copy_cache as host_half
from megamoe.kernels.parts.pool import as_pool
from megamoe.ops import plan_slots as planning
from megamoe.ops.copy_cache import copy_cache
from megamoe.ops.plan_slots import EntryTables, RowTables, StepSlots, plan_slots
from megamoe.ops.save_rows import save_rows
from megamoe.ops.write_block_tables import write_block_tables
from megamoe.verify.values import moved, plain

FAR = 2**31 + 2**20
LATENT = RowFormat.FP8_ROPE_BF16


def test_rows_that_are_not_made_of_vectors_and_words_are_refused() -> None:
    def pieces(row_format: RowFormat, width: int) -> tuple[int, int]:
        return host_half.row_pieces("copy_cache", CachePool.allocate(1, 1, row_format, width))

    assert pieces(LATENT, 512) == (36, 2) and pieces(RowFormat.FP32, 2048) == (512, 0)
    assert pieces(RowFormat.INDEX_FP8, 128) == (8, 1) and pieces(RowFormat.INDEX_FP4, 128) == (4, 1)
    with pytest.raises(NotImplementedError, match=r"copy_cache: .* got 256 and 3 bytes \(FP8_ROPE_BF16 of width 192\)"):
        pieces(LATENT, 192)
    with pytest.raises(NotImplementedError, match="got 24 and 0 bytes"):
        pieces(RowFormat.FP32, 6)


def test_pages_of_2_gib_and_pages_between_multiples_of_16_bytes_are_refused() -> None:
    long = CachePool.allocate(1, 2**31 // 8192, RowFormat.FP32, 2048, "meta")
    with pytest.raises(
        NotImplementedError, match=r"copy_cache: .* less than 2147483648 bytes; got 2147483648 in source"
    ):
        as_pool("copy_cache", "source", long)
    odd = CachePool.allocate(2, 1, RowFormat.FP32, 1, block_stride_bytes=20)
    with pytest.raises(NotImplementedError, match=r"multiples of 16 bytes; got a block stride of 20"):
        as_pool("copy_cache", "source", odd)
    as_pool("copy_cache", "source", CachePool.allocate(2, 1, RowFormat.FP32, 1))


def random_pool(num_blocks: int, rows: int, row_format: RowFormat, width: int, stride: int | None = None) -> CachePool:
    """Return a pool on the GPU; of one whose blocks lie far apart the first and last row of each block are written."""
    size = page_bytes(row_format, rows, width)
    stride = -(-size // 16) * 16 if stride is None else stride
    whole = torch.empty((num_blocks - 1) * stride + size, dtype=torch.uint8, device="cuda")
    pool = CachePool(whole.as_strided((num_blocks, size), (stride, 1)), rows, row_format, width)
    for part in (pool.data_rows, pool.scale_rows):
        for row in {0, rows - 1} if whole.numel() > 2**30 else range(rows):
            part[:, row] = torch.randint(256, part[:, row].shape, dtype=torch.uint8, device="cuda")
    return pool


def bytes_at(pool: CachePool, slots: torch.Tensor) -> torch.Tensor:
    block, row = slots // pool.rows_per_block, slots % pool.rows_per_block
    return torch.cat([pool.data_rows[block, row], pool.scale_rows[block, row]], dim=1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_blocks", "rows", "row_format", "width", "stride"),
    [(3, 128, LATENT, 512, FAR), (3, 3_000_000, LATENT, 512, None), (3, 200_000, RowFormat.FP32, 2048, None)],
    ids=["blocks far apart", "long blocks with scales", "long blocks of data"],
)
def test_rows_beyond_2_gib(num_blocks: int, rows: int, row_format: RowFormat, width: int, stride: int | None) -> None:
    far = random_pool(num_blocks, rows, row_format, width, stride)
    near = random_pool(num_blocks, 2, row_format, width)
    ends = torch.tensor([end for block in range(num_blocks) for end in (block * rows, block * rows + rows - 1)]).cuda()
    places = torch.arange(2 * num_blocks, device="cuda")
    copy_cache(far, ends, near, places)
    assert torch.equal(bytes_at(near, places), bytes_at(far, ends))
    fresh = random_pool(num_blocks, 2, row_format, width)
    copy_cache(fresh, places, far, ends)
    assert torch.equal(bytes_at(far, ends), bytes_at(fresh, places))
    saves = torch.tensor([(block, rows, 0, 0, block) for block in range(num_blocks)], dtype=torch.int32).cuda()
    saved = random_pool(num_blocks, 1, row_format, width)
    save_rows(far, None, saved, saves, torch.arange(num_blocks, dtype=torch.int32, device="cuda")[:, None])
    assert torch.equal(bytes_at(saved, places[:num_blocks]), bytes_at(far, ends[1::2]))  # the last row of each ring


@pytest.mark.gpu
@pytest.mark.parametrize("in_rings", [True, False])
@pytest.mark.parametrize("num_kinds", [0, 1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 1000])
def test_slots_of_any_number_of_kinds(num_tokens: int, num_kinds: int, in_rings: bool) -> None:
    """Two requests and padding; a window of two blocks, which a long step overwrites."""
    split = num_tokens // 3
    number = torch.arange(num_tokens, dtype=torch.int32)
    is_first = (number < split).int()
    first = split * (1 - is_first)
    tokens = torch.stack([number + 7, number - first + 3 * is_first, is_first, first])
    nobody = number >= num_tokens - num_tokens // 8
    tokens[:3, nobody] = -1
    tokens[3] = torch.where(nobody, number, first)
    rings = torch.tensor([[3, 0], [2, 1]], dtype=torch.int32)
    rows = 8 if not in_rings else num_tokens + 8
    pages = torch.randperm(2 * 1100, generator=torch.Generator().manual_seed(3)).view(2, -1).int()
    kinds = tuple(
        EntryTables(ratio, RowTables(rings[:, :1], 2 * rows), RowTables(pages, 4)) for ratio in (4, 128, 1)[:num_kinds]
    )
    want = StepSlots.empty(num_tokens, num_kinds, torch.device("cpu"))
    planning.reference(tokens, RowTables(rings, rows), kinds, want, in_rings)
    got = StepSlots.empty(num_tokens, num_kinds, torch.device("cuda"))
    plan_slots(tokens.cuda(), moved(RowTables(rings, rows), "cuda"), moved(kinds, "cuda"), got, in_rings=in_rings)
    wanted = plain(want)
    for name, part in plain(got).items():
        assert torch.equal(part.cpu(), wanted[name]), name


@pytest.mark.gpu
def test_saves_and_changes_of_nobody_change_nothing() -> None:
    ring, step, target = (random_pool(2, 5, RowFormat.FP32, 8) for _ in range(3))
    before = target.storage.clone()
    nobody = [
        (-1, 7, 6, 0, 1),
        (0, 0, 0, 0, 0),
        (-1, -1, -1, -1, -1),
        (0, 9, 0, 0, -1),
    ]  # the reference refuses the last
    saves = torch.tensor(nobody, dtype=torch.int32)
    for of_step in (None, step):
        save_rows(ring, of_step, target, saves.cuda(), torch.zeros(2, 1, dtype=torch.int32, device="cuda"))
    assert torch.equal(target.storage, before)
    tables = torch.arange(12, dtype=torch.int32, device="cuda").view(3, 4)
    changes = torch.tensor([(-1, 0, 99), (3, 0, 99), (0, 4, 99), (0, -1, 99), (2, 3, 50)], dtype=torch.int32)
    write_block_tables(tables, changes.cuda())
    assert tables.flatten().tolist() == [*range(11), 50]
