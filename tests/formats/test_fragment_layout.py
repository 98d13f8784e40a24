# SPDX-License-Identifier: Apache-2.0
"""The fragment layout: known places, what a lane finds in its words, and that it is undone exactly."""

from __future__ import annotations

import pytest
import torch

from megamoe.formats import nvfp4
from megamoe.formats.e2m1 import decode_packed
from megamoe.formats.fragment_layout import (
    CodeLayout,
    codes_from_fragments,
    codes_to_fragments,
    fits_fragments,
    scales_from_fragments,
    scales_to_fragments,
)
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_layout import ScaleLayout


def lone_code(row: int, column: int, code: int, num_rows: int = 16, num_columns: int = 64) -> torch.Tensor:
    """Return row-major codes that are zero but for one."""
    codes = torch.zeros(num_rows, num_columns // 2, dtype=torch.uint8)
    codes[row, column // 2] = code << (4 * (column % 2))
    return codes


# Known answers.


@pytest.mark.parametrize(
    ("row", "column", "lane", "word", "bits"),
    [
        # code 0b1111: all four bits, worked by hand from the table in the docstring
        (0, 0, 0, 0, 0x000081C0),  # row g, column 2t: low half of pair 0
        (0, 1, 0, 0, 0x81C00000),  # column 2t + 1: high half
        (8, 0, 0, 0, 0x00001038),  # row g + 8: pair 1
        (0, 8, 0, 0, 0x00002007),  # columns 2t + 8: pair 2
        (8, 9, 0, 0, 0x4E000000),  # pair 3, high half
        (3, 6, 15, 0, 0x000081C0),  # g = 3, t = 3
        (15, 63, 31, 3, 0x4E000000),  # the last of the tile
        (1, 18, 5, 1, 0x000081C0),  # columns 16..31 are word 1
    ],
)
def test_a_code_lies_where_the_table_says(row: int, column: int, lane: int, word: int, bits: int) -> None:
    words = codes_to_fragments(lone_code(row, column, 0b1111)).view(torch.int32).view(32, 4)
    expected = torch.zeros(32, 4, dtype=torch.int64)
    expected[lane, word] = bits
    assert torch.equal(words.long() & 0xFFFFFFFF, expected)


def test_tiles_follow_each_other_row_major() -> None:
    codes = codes_to_fragments(lone_code(16, 64, 0b0001, 32, 192)).view(-1)
    assert codes.nonzero().squeeze().tolist() == (1 * 3 + 1) * 512 + 0
    scales = torch.zeros(32, 12, dtype=torch.uint8)
    scales[16 + 11, 4 + 2] = 1
    assert scales_to_fragments(scales).view(-1).nonzero().squeeze().tolist() == (1 * 3 + 1) * 64 + 8 * 3 + 4 + 2


def test_signs_and_magnitudes_keep_their_place() -> None:
    sign = codes_to_fragments(lone_code(0, 0, 0b1000)).view(torch.int32)[0, 0]
    assert int(sign) & 0xFFFFFFFF == 0x8000
    assert int(codes_to_fragments(lone_code(0, 0, 0b0001)).view(torch.int32)[0, 0]) == 0x40


# Properties.


def a_fragment(words: torch.Tensor) -> torch.Tensor:
    """Return codes [rows, columns] of one tile by the definition of the m16n8k16 A operand, from 32 x 4 words."""
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    magnitude_bit, sign_bit = (6, 3, 0, 9), (15, 12, 13, 14)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for step in range(4):
            word = int(words[lane, step]) & 0xFFFFFFFF
            for element in range(8):  # a0 .. a7 of the PTX manual
                row = g if element in (0, 1, 4, 5) else g + 8
                column = 2 * t + (element & 1) + (8 if element >= 4 else 0)
                half = word >> (16 * (element & 1)) & 0xFFFF
                pair = element // 2
                code = (half >> magnitude_bit[pair] & 7) | (half >> sign_bit[pair] & 1) << 3
                codes[row, 16 * step + column] = code
    return codes


def test_a_lane_finds_its_operand(seed: int) -> None:
    packed = torch.randint(0, 256, (16, 32), dtype=torch.uint8)
    words = codes_to_fragments(packed).view(torch.int32).view(32, 4)
    assert torch.equal(a_fragment(words), torch.stack((packed & 15, packed >> 4), -1).view(16, 64))


@pytest.mark.parametrize("shape", [(16, 64), (48, 64), (16, 448), (3, 32, 128), (2, 2, 16, 64), (0, 16, 64)])
def test_it_is_undone_exactly(seed: int, shape: tuple[int, ...]) -> None:
    *leading, rows, columns = shape
    codes = torch.randint(0, 256, (*leading, rows, columns // 2), dtype=torch.uint8)
    scales = torch.randint(0, 127, (*leading, rows, columns // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(codes_from_fragments(codes_to_fragments(codes)), codes)
    back = scales_from_fragments(scales_to_fragments(scales))
    assert back.dtype == scales.dtype and torch.equal(back.view(torch.uint8), scales.view(torch.uint8))
    if codes.numel() > 64:
        assert not torch.equal(codes_to_fragments(codes), codes)


def test_the_container_converts_both_ways(seed: int) -> None:
    plain = nvfp4.quantize(torch.randn(3, 32, 128))
    fragments = plain.fragments()
    assert fragments.code_layout is CodeLayout.FRAGMENT_16X64 and fragments.shape == plain.shape
    assert fragments.fragments() is fragments
    assert torch.equal(nvfp4.dequantize(fragments), nvfp4.dequantize(plain))
    assert torch.equal(nvfp4.dequantize(fragments[1]), nvfp4.dequantize(plain[1]))
    assert torch.equal(nvfp4.dequantize(plain.tiled().fragments().tiled()), nvfp4.dequantize(plain))
    assert not torch.equal(decode_packed(fragments.codes), decode_packed(plain.codes))


# Refusals.


def test_sizes_that_do_not_fit() -> None:
    assert fits_fragments(16, 64) and not fits_fragments(8, 64) and not fits_fragments(16, 32)
    with pytest.raises(ValueError, match="N a multiple of 16 and K of 64; got N 8, K 64"):
        nvfp4.quantize(torch.ones(8, 64)).fragments()
    with pytest.raises(ValueError, match="got N 16, K 32"):
        nvfp4.quantize(torch.ones(16, 32)).fragments()
    for undo in (codes_from_fragments, scales_from_fragments):
        with pytest.raises(ValueError, match="fragment layout needs"):
            undo(torch.zeros(8, 4, dtype=torch.uint8))


def test_a_container_of_two_layouts() -> None:
    plain = nvfp4.quantize(torch.ones(16, 64))
    with pytest.raises(ValueError, match=r"both be in fragment order or neither; got codes fragment_16x64"):
        NvFp4Tensor(plain.codes, plain.scales, plain.tensor_scale, code_layout=CodeLayout.FRAGMENT_16X64)
    small = nvfp4.quantize(torch.ones(8, 64))
    with pytest.raises(ValueError, match=r"fragment order needs N a multiple of 16 and K of 64; got N 8"):
        NvFp4Tensor(
            small.codes,
            small.scales,
            small.tensor_scale,
            ScaleLayout.FRAGMENT_16X64,
            code_layout=CodeLayout.FRAGMENT_16X64,
        )
