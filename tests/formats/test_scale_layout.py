# SPDX-License-Identifier: Apache-2.0
"""Tiled 128x4 scales: the offsets by hand and by formula, the inverse, padding, and the refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.formats.scale_layout import from_tiled_128x4, tiled_128x4_bytes, to_tiled_128x4


def offset_of(row, column, num_columns):
    column_tiles = (num_columns + 3) // 4
    tile = (row // 128) * column_tiles + column // 4
    row, column = row % 128, column % 4
    return tile * 512 + (row % 32) * 16 + (row // 32) * 4 + column


def check_layout(to_tiled, num_rows, num_columns):
    """The check that a function tiles by the formula; the fault injections below must not pass it."""
    scales = (torch.arange(num_rows * num_columns) % 251 + 1).to(torch.uint8).view(num_rows, num_columns)
    expected = [0] * (-(-num_rows // 128) * -(-num_columns // 4) * 512)
    for row in range(num_rows):
        for column in range(num_columns):
            expected[offset_of(row, column, num_columns)] = int(scales[row, column])
    assert to_tiled(scales).tolist() == expected


# Known answers


@pytest.mark.parametrize(
    ("row", "column", "offset"),
    [(0, 0, 0), (0, 1, 1), (0, 3, 3), (1, 0, 16), (31, 3, 499), (32, 0, 4), (64, 0, 8), (96, 0, 12), (33, 2, 22),
     (127, 3, 511), (0, 4, 512), (127, 4, 1020), (128, 0, 1024), (128, 4, 1536)],
)  # fmt: skip
def test_offsets_worked_by_hand(row, column, offset):
    scales = torch.zeros(129, 5, dtype=torch.uint8)  # 2 x 2 tiles
    scales[row, column] = 7
    flat = to_tiled_128x4(scales)
    assert flat.shape == (2048,)
    assert flat.nonzero().tolist() == [[offset]]


def test_start_of_a_tile_worked_by_hand():
    scales = torch.arange(128, dtype=torch.uint8)[:, None].expand(128, 4).contiguous()
    flat = to_tiled_128x4(scales)
    assert flat[:20].tolist() == [0] * 4 + [32] * 4 + [64] * 4 + [96] * 4 + [1] * 4


# Properties


@pytest.mark.parametrize("num_rows", [1, 31, 32, 127, 128, 129, 257])
@pytest.mark.parametrize("num_columns", [1, 3, 4, 5, 9])
def test_formula_and_inverse(num_rows, num_columns):
    check_layout(to_tiled_128x4, num_rows, num_columns)
    scales = (torch.arange(num_rows * num_columns) % 127).to(torch.uint8).view(num_rows, num_columns)
    flat = to_tiled_128x4(scales)
    assert torch.equal(from_tiled_128x4(flat, num_rows, num_columns), scales)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    leading=st.lists(st.integers(0, 3), max_size=2),
    num_rows=st.integers(0, 300),
    num_columns=st.integers(0, 12),
    dtype=st.sampled_from([torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu]),
    seed=st.integers(0, 2**31),
)
def test_round_trip_keeps_bytes_leading_dimensions_and_dtype(leading, num_rows, num_columns, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (*leading, num_rows, num_columns), dtype=torch.uint8, generator=generator)
    flat = to_tiled_128x4(data.view(dtype))
    assert flat.dtype == dtype and flat.shape == (*leading, tiled_128x4_bytes(num_rows, num_columns))
    back = from_tiled_128x4(flat, num_rows, num_columns)
    assert back.dtype == dtype and back.is_contiguous() and torch.equal(back.view(torch.uint8), data)
    if leading and leading[0]:
        assert torch.equal(to_tiled_128x4(data[0].view(dtype)).view(torch.uint8), flat[0].view(torch.uint8))


def test_padding_is_zero_on_the_way_in_and_ignored_on_the_way_out():
    scales = torch.full((129, 5), 9, dtype=torch.uint8)
    flat = to_tiled_128x4(scales)
    assert int((flat != 0).sum()) == scales.numel()
    dirty = torch.where(flat == 0, 255, flat)
    assert torch.equal(from_tiled_128x4(dirty, 129, 5), scales)


@pytest.mark.parametrize(
    "fault",
    [
        lambda scales: to_tiled_128x4(scales.roll(1, 0)),
        lambda scales: torch.nn.functional.pad(scales, (0, 3, 0, 127)).flatten(),  # left row-major
        lambda scales: to_tiled_128x4(scales).view(2, 2, 512).transpose(0, 1).flatten(),  # tiles column-major
        lambda scales: to_tiled_128x4(scales).view(4, 32, 4, 4).transpose(1, 2).flatten(),  # rows in plain order
    ],
    ids=["rolled", "row-major", "tile order", "row order"],
)
def test_the_check_catches(fault):
    with pytest.raises(AssertionError):
        check_layout(fault, 129, 5)


# Refusals


def test_wide_dtypes_are_refused():
    with pytest.raises(TypeError, match="to_tiled_128x4: scales must have a one-byte dtype"):
        to_tiled_128x4(torch.zeros(4, 4))
    with pytest.raises(TypeError, match="from_tiled_128x4: scales must have a one-byte dtype"):
        from_tiled_128x4(torch.zeros(512), 4, 4)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"to_tiled_128x4: scales must be \[..., R, C\]"):
        to_tiled_128x4(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="129 x 4 scales take 1024 bytes in 128x4 tiles; got"):
        from_tiled_128x4(torch.zeros(512, dtype=torch.uint8), 129, 4)
    with pytest.raises(ValueError, match="still row-major"):
        from_tiled_128x4(torch.zeros(129, 4, dtype=torch.uint8), 129, 4)
