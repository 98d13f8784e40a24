# SPDX-License-Identifier: Apache-2.0
"""Rows shared out to threads: every value has exactly one owner.

F9: a loop that takes one tile twice and another never.
"""

from __future__ import annotations

import pytest
import torch

from megamoe.formats.scale_layout import to_tiled_128x4
from megamoe.kernels.parts.launch import MAX_WIDTH, as_rows, as_vector, require_width
from megamoe.kernels.parts.rows import row_tile, tiled_place

WIDTHS = [8, 16, 128, 256, 512, 1000, 1024, 1032, 1040, 1536, 2048, 3072, 4096, 7168, 8192, 16384, 20000, 32768]


@pytest.mark.parametrize(
    ("width", "min_lanes", "size"),
    [(width, *one) for width in WIDTHS for one in ((2, 8), (16, 8), (1, 16)) if width % one[1] == 0],
)
def test_f9_every_vector_belongs_to_one_thread(width: int, min_lanes: int, size: int) -> None:
    tile = row_tile(width, min_lanes, size)
    owners = [0] * (width // size)
    for lane in range(tile.lanes):
        for index in range(tile.vectors):
            vector = index * tile.lanes + lane
            if vector < width // size:
                owners[vector] += 1
            else:
                assert not tile.exact
    assert owners == [1] * (width // size)


@pytest.mark.parametrize(("min_lanes", "size"), [(2, 8), (1, 16)])
@pytest.mark.parametrize("width", WIDTHS)
def test_tiles_fit_blocks_and_shuffles(width: int, min_lanes: int, size: int) -> None:
    tile = row_tile(width, min_lanes, size)
    assert tile.threads <= 1024 and tile.threads % 32 == 0
    assert tile.lanes % 32 == 0 or tile.lanes & (tile.lanes - 1) == 0, "rows inside a warp are powers of two"
    assert tile.warps * 32 >= tile.lanes and (tile.rows == 1 or tile.warps == 1)
    assert tile.vectors * tile.lanes < width // size + tile.lanes, "no thread without work for a whole turn"


def test_models_sizes_divide_without_remainder() -> None:
    for width in (128, 256, 512, 1024, 1536, 2048, 3072, 4096, 7168, 8192, 16384):
        assert row_tile(width).exact and row_tile(width).vectors <= 4
        assert row_tile(width, 1, 16).exact and row_tile(width, 1, 16).vectors <= 2


def test_widths_are_refused() -> None:
    for width in (0, 4, 12, MAX_WIDTH + 8):
        with pytest.raises(NotImplementedError, match=rf"op: the kernel takes rows of 8 to 32768 .*; got {width}\."):
            require_width("op", width)
    with pytest.raises(NotImplementedError, match="a multiple of 16; got 24"):
        require_width("op", 24, 16)


@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 1), (130, 5), (300, 8), (128, 4)])
def test_tiled_place_is_the_formats_order(num_rows: int, num_columns: int) -> None:
    scales = torch.arange(1, num_rows * num_columns + 1).remainder(251).add(1).to(torch.uint8)
    scales = scales.view(num_rows, num_columns)
    tiled = to_tiled_128x4(scales)
    placed = torch.zeros_like(tiled)
    for row in range(num_rows):
        for column in range(num_columns):
            placed[tiled_place(row, column, num_columns)] = scales[row, column]
    assert torch.equal(placed, tiled)


# tensors as rows


def test_aligned_rows_are_views() -> None:
    x = torch.zeros(6, 5, 64, dtype=torch.bfloat16)
    for view in (x, x[:, 0], x[2:], x[..., 8:40], x.select(1, 2)):
        rows = as_rows(view)
        assert rows.dim() == 2 and rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() or view is not x
        assert torch.equal(rows.reshape(view.shape), view)
    assert as_rows(x[:, 0]).data_ptr() == x.data_ptr() and as_rows(x[:, 0]).stride(0) == 5 * 64


@pytest.mark.parametrize("cut", [slice(1, 9), slice(0, 8, 2)])
def test_unaligned_rows_become_one_contiguous_copy(cut: slice) -> None:
    x = torch.arange(4 * 64, dtype=torch.float32).view(4, 64).bfloat16()
    rows = as_rows(x[:, cut])
    assert rows.is_contiguous() and rows.data_ptr() % 16 == 0 and torch.equal(rows, x[:, cut])


def test_vectors() -> None:
    x = torch.arange(64, dtype=torch.float32)
    assert as_vector(x).data_ptr() == x.data_ptr()
    for view in (x[1:9], x[::2]):
        assert as_vector(view).data_ptr() % 16 == 0 and as_vector(view).stride() == (1,)
        assert torch.equal(as_vector(view), view)
