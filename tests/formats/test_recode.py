# SPDX-License-Identifier: Apache-2.0
"""Recoding by scales alone: the same bytes as the full conversion, and a proof that finds every planted difference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamoe.formats import fp8, mxfp4, nvfp4, recode
from megamoe.formats.mxfp4 import MxFp4Tensor, mxfp4_to_nvfp4, shared_top_exponent
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.recode import CodesOf


def weight(exponents: list[list[int]], codes: int | Tensor = 0x21) -> MxFp4Tensor:
    """An MXFP4 weight with these block exponents; every byte of its codes is `codes`."""
    scales = (torch.tensor(exponents) + 127).to(torch.uint8)
    shape = (scales.shape[0], scales.shape[1] * 16)
    packed = codes if isinstance(codes, Tensor) else torch.full(shape, codes, dtype=torch.uint8)
    return MxFp4Tensor(packed, scales.view(torch.float8_e8m0fnu))


def reader(t: MxFp4Tensor, asked: list[int] | None = None) -> CodesOf:
    def read(numbers: Tensor) -> Tensor:
        if asked is not None:
            asked.extend(numbers.tolist())
        return t.codes.reshape(-1, 16)[numbers]

    return read


def random_weight(seed: int, low: int, high: int, zeros: float = 0.0) -> MxFp4Tensor:
    """Random codes, exponents in [low, high], some blocks of zeros (+0 and -0)."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (9, 8, 16), dtype=torch.uint8, generator=generator)
    is_zero = torch.rand((9, 8), generator=generator) < zeros
    codes[is_zero] &= 0x88
    exponents = torch.randint(low, high + 1, (9, 8), generator=generator)
    return MxFp4Tensor(codes.view(9, 128), (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu))


def recoded(t: MxFp4Tensor, scan: recode.ScaleScan) -> NvFp4Tensor:
    return NvFp4Tensor(
        t.codes,
        recode.nvfp4_scales(t.scales, scan.top_exponent),
        torch.tensor(recode.tensor_scale_of(scan.top_exponent)),
    )


# known answers


def test_eighteen_powers_of_two_are_exact_and_the_nineteenth_is_not():
    t = weight([[3, 3 - 17, 3 - 18, 3 - 100]])
    scan = recode.scan_scales([t.scales], [reader(t)])
    assert scan.top_exponent == 3 and recode.tensor_scale_of(3) == 2.0**-5
    assert [numbers.tolist() for numbers in scan.inexact] == [[2, 3]]
    assert scan.spans == {0: 1, 17: 1, 18: 1, 100: 1}
    scales = recode.nvfp4_scales(t.scales, 3).float().tolist()
    assert scales == [[256.0, 256.0] + [2.0**-9] * 6]


def test_a_block_of_zeros_neither_sets_the_scale_nor_is_inexact():
    codes = torch.full((1, 3, 16), 0x21, dtype=torch.uint8)
    codes[0, 0], codes[0, 2] = 0x80, 0x08  # zeros of either sign
    t = weight([[50, 0, -60]], codes.view(1, 48))
    scan = recode.scan_scales([t.scales], [reader(t)])
    assert scan.top_exponent == 0 and not scan.inexact[0].numel()
    assert recode.differing_blocks(t, recoded(t, scan)).tolist() == []


def test_all_zeros():
    t = weight([[5, -7]], 0x88)
    scan = recode.scan_scales([t.scales], [reader(t)])
    assert scan.top_exponent == 0 and not scan.inexact[0].numel()


def test_the_smallest_and_the_largest_exponents():
    for exponents in ([[-127, -126]], [[127, 126]]):
        t = weight(exponents, 0x22)  # ones: 2^127 is finite
        scan = recode.scan_scales([t.scales], [reader(t)])
        expected, exact = mxfp4_to_nvfp4(t)
        assert torch.equal(recoded(t, scan).scales.view(torch.uint8), expected.scales.view(torch.uint8))
        assert float(expected.tensor_scale) == recode.tensor_scale_of(scan.top_exponent)
        assert not scan.inexact[0].numel() and bool(exact.all())


# properties


@pytest.mark.parametrize(("low", "high", "zeros"), [(-9, 3, 0.0), (-14, 3, 0.3), (-40, 20, 0.2), (-127, 120, 0.5)])
def test_scan_agrees_with_the_full_conversion(seed, low, high, zeros):
    for offset in range(20):
        pair = [random_weight(seed + offset, low, high, zeros), random_weight(seed + offset + 1000, low, high, zeros)]
        scan = recode.scan_scales([t.scales for t in pair], [reader(t) for t in pair])
        assert scan.top_exponent == int(shared_top_exponent(*pair))
        assert sum(scan.spans.values()) == 2 * 72
        for t, numbers in zip(pair, scan.inexact, strict=True):
            expected, exact = mxfp4_to_nvfp4(t, top_exponent=scan.top_exponent)
            assert numbers.tolist() == (~exact).flatten().nonzero().flatten().tolist()
            ours = recoded(t, scan)
            same = exact.flatten().repeat_interleave(2)
            assert torch.equal(
                ours.scales.view(torch.uint8).flatten()[same], expected.scales.view(torch.uint8).flatten()[same]
            )
            if not numbers.numel() and high < 100:
                assert not recode.differing_blocks(t, ours).numel()
                assert torch.equal(mxfp4.dequantize(t), nvfp4.dequantize(ours))


def test_codes_are_read_only_where_they_decide():
    asked: list[int] = []
    t = weight([[0, -1, -2], [0, -17, -3]])
    recode.scan_scales([t.scales], [reader(t, asked)])
    assert asked == [0]  # one block with the largest scale
    t = weight([[0, -18, -2]])
    asked.clear()
    recode.scan_scales([t.scales], [reader(t, asked)])
    assert asked == [0, 1]


def test_the_way_back_gives_the_scales_back(seed):
    t = random_weight(seed, -12, 4)
    scan = recode.scan_scales([t.scales], [reader(t)])
    nv = recoded(t, scan)
    back = recode.mxfp4_scales_of(nv.scales, nv.tensor_scale, 256)
    assert back is not None and torch.equal(back.view(torch.uint8), t.scales.view(torch.uint8))
    odd = nv.scales.view(torch.uint8).clone()
    odd[4, 3] ^= 0x08  # half of a pair
    assert recode.mxfp4_scales_of(odd.view(torch.float8_e4m3fn), nv.tensor_scale, 256) is None
    odd[4, 2:4] = 0x39  # 1.125: a pair, but no power of two
    assert recode.mxfp4_scales_of(odd.view(torch.float8_e4m3fn), nv.tensor_scale, 256) is None
    assert recode.mxfp4_scales_of(nv.scales, torch.tensor(0.3), 256) is None
    assert recode.mxfp4_scales_of(nv.scales[:, :1], nv.tensor_scale, 16) is None


def test_what_surely_fits_fp8_blocks_does(seed):
    for offset, (low, high, expected) in enumerate(
        [(-20, -6, True), (-20, -5, False), (-31, -30, False), (121, 122, False)]
    ):
        t = random_weight(seed + offset, low, high)
        scales = t.scales.view(torch.uint8).clone()
        scales[0, 0], scales[0, 1] = low + 127, high + 127
        t = MxFp4Tensor(t.codes, scales.view(torch.float8_e8m0fnu))
        assert recode.fits_fp8_blocks(t.scales) is expected
        if expected:
            values = mxfp4.dequantize(t)
            assert torch.equal(fp8.dequantize(fp8.quantize_blocks(values)), values)
    far = weight([[0] * 4 + [-40] * 4])  # two blocks of 128 columns: each spans nothing, but one is below the floor
    assert not recode.fits_fp8_blocks(far.scales)
    assert recode.fits_fp8_blocks(weight([[0] * 4 + [-20] * 4]).scales)


# the proof finds planted faults


@pytest.fixture
def exact_pair(seed: int) -> tuple[MxFp4Tensor, NvFp4Tensor]:
    t = random_weight(seed, -12, 4, zeros=0.2)
    return t, recoded(t, recode.scan_scales([t.scales], [reader(t)]))


def test_proof_finds_every_flipped_bit_of_a_scale(exact_pair):
    t, nv = exact_pair
    is_zero = ((t.codes & 0x77).view(-1, 16).amax(-1) == 0).tolist()
    assert True in is_zero and False in is_zero
    for position in range(0, nv.scales.numel(), 7):
        for bit in range(7):
            damaged = nv.scales.view(torch.uint8).clone().flatten()
            damaged[position] ^= 1 << bit
            if int(damaged[position]) == 0x7F:
                continue
            other = NvFp4Tensor(t.codes, damaged.view(torch.float8_e4m3fn).view(nv.scales.shape), nv.tensor_scale)
            expected = [] if is_zero[position // 2] else [position // 2]
            if expected:  # another half is changed: it may hold zeros alone
                half = t.codes.reshape(-1, 8)[position]
                expected = expected if int((half & 0x77).amax()) else []
            assert recode.differing_blocks(t, other).tolist() == expected, (position, bit)


def test_proof_finds_every_flipped_bit_of_a_code(exact_pair):
    t, nv = exact_pair
    for position in range(0, t.codes.numel(), 13):
        for bit in range(8):
            codes = t.codes.clone().flatten()
            codes[position] ^= 1 << bit
            other = NvFp4Tensor(codes.view(t.codes.shape), nv.scales, nv.tensor_scale)
            assert recode.differing_blocks(t, other).tolist() == [position // 16]  # the sign of zero counts


def test_proof_finds_another_tensor_scale_and_swapped_blocks(exact_pair):
    t, nv = exact_pair
    doubled = NvFp4Tensor(nv.codes, nv.scales, nv.tensor_scale * 2)
    nonzero = ((t.codes & 0x77).view(-1, 16).amax(-1) != 0).nonzero().flatten().tolist()
    assert recode.differing_blocks(t, doubled).tolist() == nonzero
    nudged = NvFp4Tensor(nv.codes, nv.scales, torch.nextafter(nv.tensor_scale, torch.tensor(1.0)))
    assert recode.differing_blocks(t, nudged).tolist() == nonzero
    rolled = NvFp4Tensor(nv.codes, nv.scales.view(torch.uint8).roll(1, 1).view(torch.float8_e4m3fn), nv.tensor_scale)
    assert recode.differing_blocks(t, rolled).numel()


def test_unequal_scales_lists_zero_blocks_too():
    t = weight([[0, -60]], torch.tensor([[0x21] * 16 + [0] * 16], dtype=torch.uint8))
    nv = recoded(t, recode.scan_scales([t.scales], [reader(t)]))
    assert recode.unequal_scales(t.scales, nv.scales, nv.tensor_scale).tolist() == [1]
    assert recode.differing_blocks(t, nv).tolist() == []


def test_values_that_overflow_are_not_called_equal():
    t = weight([[126, 127]], 0x77)  # sixes: 6 * 2^126 is infinite
    nv = recoded(t, recode.scan_scales([t.scales], [reader(t)]))
    assert recode.differing_blocks(t, nv).tolist() == [0, 1]


# refusals


def test_refusals():
    t = weight([[0, 1]])
    damaged = t.scales.view(torch.uint8).clone()
    damaged[0, 1] = 255
    with pytest.raises(ValueError, match=r"got byte 255 1 time\(s\)"):
        recode.scan_scales([damaged.view(torch.float8_e8m0fnu)], [reader(t)])
    with pytest.raises(ValueError, match="at least one; got 0"):
        recode.scan_scales([], [])
    nv, _ = mxfp4_to_nvfp4(t)
    with pytest.raises(ValueError, match=r"got \[1, 64\] and \[1, 32\]"):
        recode.differing_blocks(t, NvFp4Tensor(nv.codes[:, :16], nv.scales[:, :2], nv.tensor_scale))
    assert recode.unequal_scales(damaged.view(torch.float8_e8m0fnu), nv.scales, nv.tensor_scale).tolist() == [1]
