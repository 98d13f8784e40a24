# SPDX-License-Identifier: Apache-2.0
"""MXFP4: every code under every scale byte, quantization by definition, the exact conversions, and the fault F20."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.formats import e2m1, mxfp4, nvfp4
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.formats.nvfp4 import NvFp4Tensor

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
ALL_CODES = list(range(16)) * 2


def from_bytes(codes, scales):
    """[..., K] from unpacked codes and scale bytes."""
    scales = torch.as_tensor(scales, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return MxFp4Tensor(e2m1.pack(torch.as_tensor(codes, dtype=torch.uint8)), scales)


def with_scales(scale_bytes, codes=ALL_CODES):
    """[N, 32 * blocks], every block holding the same 32 codes, from scale bytes [N, blocks]."""
    scale_bytes = torch.as_tensor(scale_bytes, dtype=torch.uint8)
    return from_bytes(torch.tensor(codes).repeat(*scale_bytes.shape), scale_bytes)


def same_bytes(a, b):
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales.view(torch.uint8), b.scales.view(torch.uint8))


def check_dequantize(dequantize, t):
    """The check that a function dequantizes by definition; the fault injections below must not pass it."""
    codes, scales = e2m1.unpack(t.codes).numpy(), t.scales.view(torch.uint8).numpy()
    expected = np.concatenate((E2M1, -E2M1))[codes] * np.repeat(2.0 ** (scales.astype(np.float64) - 127), 32, axis=-1)
    expected[np.abs(expected) >= 2.0**128] *= np.inf  # beyond fp32; bytes 253 and 254 only
    assert np.array_equal(dequantize(t).numpy(), expected.astype(np.float32))


# Known answers


def test_dequantize_by_hand():
    t = with_scales([[126]])
    expected = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, -0.0, -0.25, -0.5, -0.75, -1.0, -1.5, -2.0, -3.0]
    assert mxfp4.dequantize(t).tolist() == [expected * 2]
    assert torch.signbit(mxfp4.dequantize(t))[0, 8]
    assert t.codes[0, :2].tolist() == [0x10, 0x32]


@pytest.mark.parametrize(
    ("amax", "byte"),
    [(6.0, 127), (6.0000005, 128), (5.9999995, 127), (3.0, 126), (3.0000002, 127), (1.0, 125), (0.0, 1), (1e-40, 1),
     (6 * 2.0**-126, 1), (6.000001 * 2.0**-126, 2), (3e38, 253)],
)  # fmt: skip
def test_scale_by_hand(amax, byte):
    x = torch.zeros(1, 32)
    x[0, 3] = -amax
    assert mxfp4.quantize(x).scales.view(torch.uint8).tolist() == [[byte]]


def test_quantize_by_hand():
    x = torch.zeros(1, 64)
    x[0, :4] = torch.tensor([6.0, -0.25, 0.75, -0.0])
    x[0, 32:34] = torch.tensor([7.0, 5.0])  # scale 2: 3.5 ties to 4, 2.5 ties to 2
    t = mxfp4.quantize(x)
    assert t.scales.view(torch.uint8).tolist() == [[127, 128]]
    assert t.codes[0, [0, 1, 16]].tolist() == [0x87, 0x82, 0x46]


def test_conversion_by_hand():
    """Scales 2^0 .. 2^-17 under one tensor scale 2^-8: block scales 2^8 .. 2^-9, three of them subnormal in E4M3."""
    t = with_scales([[127 - k for k in range(18)]])
    converted, exact = mxfp4.mxfp4_to_nvfp4(t)
    assert exact.all()
    assert converted.tensor_scale.tolist() == 2.0**-8
    expected = [0x78, 0x70, 0x68, 0x60, 0x58, 0x50, 0x48, 0x40, 0x38, 0x30, 0x28, 0x20, 0x18, 0x10, 0x08, 4, 2, 1]
    assert converted.scales.view(torch.uint8).tolist() == [[byte for byte in expected for _ in range(2)]]
    assert torch.equal(converted.codes, t.codes)


# Properties


def test_every_code_under_every_scale_byte():
    check_dequantize(mxfp4.dequantize, with_scales(torch.arange(255)[:, None]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32))
def test_quantize_is_the_definition(values):
    t = mxfp4.quantize(torch.tensor([values]))
    mantissa, exponent = math.frexp(max(max(map(abs, values)), 6 * 2.0**-126) / 6)
    exponent -= mantissa == 0.5
    assert t.scales.view(torch.uint8).tolist() == [[exponent + 127]]
    evens_first = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    # fp64 holds the quotient by a power of two exactly.
    scaled = np.array(values) / 2.0**exponent
    codes = evens_first[np.abs(np.abs(scaled)[:, None] - E2M1[evens_first]).argmin(-1)] + 8 * np.signbit(scaled)
    assert e2m1.unpack(t.codes)[0].tolist() == codes.tolist()


def test_quantize_never_saturates_and_repeats(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 96, generator=generator) * torch.exp2(8 * torch.randn(8, 96, generator=generator))
    t = mxfp4.quantize(x)
    values = mxfp4.dequantize(t)
    step = mxfp4.dequantize(MxFp4Tensor(torch.full_like(t.codes, 0x22), t.scales))
    assert bool(((values - x).abs() <= step).all())
    assert torch.equal(mxfp4.dequantize(mxfp4.quantize(values)), values)


@pytest.mark.parametrize("shape", [(0, 32), (1, 32), (3, 0, 64), (2, 3, 96)], ids=str)
def test_shapes(shape):
    t = mxfp4.quantize(torch.ones(shape))
    assert t.shape == shape and t.ndim == len(shape) and t.device == torch.device("cpu")
    assert t.num_bytes == t.codes.numel() + t.scales.numel()
    assert torch.equal(mxfp4.dequantize(t), torch.ones(shape))
    assert torch.equal(mxfp4.dequantize(t.to("cpu"), torch.bfloat16), torch.ones(shape).bfloat16())
    converted, exact = mxfp4.mxfp4_to_nvfp4(t)
    assert torch.equal(nvfp4.dequantize(converted), torch.ones(shape)) and exact.shape == t.scales.shape
    assert torch.equal(mxfp4.dequantize(mxfp4.nvfp4_to_mxfp4(converted)[0]), torch.ones(shape))


@pytest.mark.parametrize("top_byte", range(255))
def test_lossless_at_every_exponent_over_a_span_of_17(top_byte):
    """At every top exponent, blocks 0 to 17 below it convert exactly and come back byte for byte."""
    t = with_scales([[max(top_byte - k, 0) for k in range(18)]])
    converted = mxfp4.mxfp4_to_nvfp4_lossless(t)
    assert float(converted.tensor_scale) == 2.0 ** max(top_byte - 135, -126)
    assert torch.equal(nvfp4.dequantize(converted), mxfp4.dequantize(t))
    assert torch.equal(torch.signbit(nvfp4.dequantize(converted)), torch.signbit(mxfp4.dequantize(t)))
    assert same_bytes(mxfp4.nvfp4_to_mxfp4_lossless(converted), t)


def test_a_span_of_18_is_not_exact_and_is_named():
    t = with_scales([[127, 110, 127], [120, 109, 130]])
    converted, exact = mxfp4.mxfp4_to_nvfp4(t)
    assert exact.tolist() == [[True, False, True], [True, False, True]]  # top 130: 113 is the last exact one
    t = with_scales([[127, 110, 127], [120, 109, 127]])
    converted, exact = mxfp4.mxfp4_to_nvfp4(t)
    assert exact.tolist() == [[True, True, True], [True, False, True]]
    values, expected = nvfp4.dequantize(converted), mxfp4.dequantize(t)
    assert torch.equal(values[0], expected[0]) and not torch.equal(values[1, 32:64], expected[1, 32:64])
    with pytest.raises(ValueError, match=r"block \[1, 1\] has scale 2\^-18 under a largest scale 2\^0.*1 of 6 blocks"):
        mxfp4.mxfp4_to_nvfp4_lossless(t)


def test_inexact_blocks_hold_the_rounded_values():
    """The block under 18 powers of two below the top keeps its values to the nearest the block scales allow."""
    t = with_scales([[127, 109]])
    converted, exact = mxfp4.mxfp4_to_nvfp4(t)
    rounded = nvfp4.quantize(mxfp4.dequantize(t), tensor_scale=converted.tensor_scale)
    assert exact.tolist() == [[True, False]]
    assert torch.equal(nvfp4.dequantize(converted)[:, 32:], nvfp4.dequantize(rounded)[:, 32:])
    assert nvfp4.dequantize(converted)[0, 32:40].tolist() == [
        2.0**-17 * value for value in [0.0, 0.0, 0.5, 1.0, 1.0, 1.5, 2.0, 3.0]
    ]


@pytest.mark.parametrize("byte", [0, 1, 100, 254])
@pytest.mark.parametrize("codes", [[0] * 32, [8] * 32, [0, 8] * 16], ids=["+0", "-0", "both"])
def test_zero_blocks_are_exact_under_any_scale(byte, codes):
    scales = torch.tensor([[127, byte]])
    unpacked = torch.tensor([ALL_CODES + codes])
    t = from_bytes(unpacked, scales)
    converted = mxfp4.mxfp4_to_nvfp4_lossless(t)
    assert float(converted.tensor_scale) == 2.0**-8  # a zero block's scale does not move the top
    back = mxfp4.nvfp4_to_mxfp4_lossless(converted)
    assert torch.equal(back.codes, t.codes)
    assert torch.equal(mxfp4.dequantize(back), mxfp4.dequantize(t))
    assert torch.equal(torch.signbit(mxfp4.dequantize(back)), torch.signbit(mxfp4.dequantize(t)))


def test_a_tensor_of_zeros():
    t = with_scales([[3, 250]], [0] * 32)
    assert mxfp4.shared_top_exponent(t).tolist() == 0
    assert torch.equal(nvfp4.dequantize(mxfp4.mxfp4_to_nvfp4_lossless(t)), torch.zeros(1, 64))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    top=st.integers(0, 254),
    leading=st.sampled_from([(), (1,), (3,), (2, 2)]),
    num_rows=st.integers(1, 4),
    blocks=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_round_trip_of_any_tensor_within_the_span(top, leading, num_rows, blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (*leading, num_rows, blocks)
    below = torch.randint(0, 18, shape, generator=generator)
    below[..., 0, 0] = 0
    codes = torch.randint(0, 16, (*shape, 32), dtype=torch.uint8, generator=generator)
    codes[..., 0] = 7  # no zero block, whose scale need not come back
    t = from_bytes(codes.flatten(-2), (top - below).clamp(min=0))
    converted = mxfp4.mxfp4_to_nvfp4_lossless(t)
    assert converted.tensor_scale.shape == leading
    assert torch.equal(nvfp4.dequantize(converted), mxfp4.dequantize(t))
    assert same_bytes(mxfp4.nvfp4_to_mxfp4_lossless(converted), t)
    assert same_bytes(mxfp4.nvfp4_to_mxfp4_lossless(converted.tiled()), t)


def test_each_expert_has_its_own_tensor_scale():
    t = from_bytes(torch.tensor(ALL_CODES).repeat(2, 1, 1), [[[140]], [[100]]])
    converted, exact = mxfp4.mxfp4_to_nvfp4(t)
    assert exact.all() and converted.tensor_scale.tolist() == [2.0**5, 2.0**-35]
    assert torch.equal(nvfp4.dequantize(converted), mxfp4.dequantize(t))


def test_two_projections_share_one_tensor_scale():
    w1 = from_bytes(torch.tensor(ALL_CODES).repeat(2, 1, 1), [[[127]], [[100]]])
    w3 = from_bytes(torch.tensor(ALL_CODES).repeat(2, 1, 1), [[[120]], [[110]]])
    top = mxfp4.shared_top_exponent(w1, w3)
    assert top.tolist() == [0, -17] and top.dtype == torch.int32
    for t in (w1, w3):
        converted = mxfp4.mxfp4_to_nvfp4_lossless(t, top_exponent=top)
        assert converted.tensor_scale.tolist() == [2.0**-8, 2.0**-25]
        assert torch.equal(nvfp4.dequantize(converted), mxfp4.dequantize(t))


def test_a_top_exponent_below_the_largest_scale_is_checked_not_assumed():
    t = with_scales([[127, 120]])
    _, exact = mxfp4.mxfp4_to_nvfp4(t, top_exponent=-1)
    assert exact.tolist() == [[False, True]]
    _, exact = mxfp4.mxfp4_to_nvfp4(t, top_exponent=10)
    assert exact.tolist() == [[True, True]]
    _, exact = mxfp4.mxfp4_to_nvfp4(t, top_exponent=11)
    assert exact.tolist() == [[True, False]]


def nvfp4_of(scale_bytes, tensor_scale, codes=ALL_CODES):
    scales = torch.tensor([scale_bytes], dtype=torch.uint8).view(torch.float8_e4m3fn)
    packed = e2m1.pack(torch.tensor([codes], dtype=torch.uint8))
    return NvFp4Tensor(packed, scales, torch.tensor(tensor_scale, dtype=torch.float32))


@pytest.mark.parametrize(
    ("scale_bytes", "tensor_scale", "exact"),
    [
        ([0x38, 0x38], 1.0, True),
        ([0x38, 0x40], 1.0, False),  # two scales in a pair
        ([0x3C, 0x3C], 1.0, False),  # 1.5
        ([0x38, 0x38], 0.3, False),
        ([0x3C, 0x3C], 2 / 3, False),  # 1.5 * fp32(2/3) is not 1, though it rounds to it
        ([0x03, 0x03], 1.0, False),  # 3 * 2^-9
        ([0x01, 0x01], 2.0**-118, True),  # 2^-127, the smallest
        ([0x01, 0x01], 2.0**-119, False),
        ([0x78, 0x78], 2.0**119, True),  # 2^127, the largest
        ([0x00, 0x00], 1.0, False),  # a zero scale over codes that are not zero
    ],
)
def test_what_comes_back_as_mxfp4(scale_bytes, tensor_scale, exact):
    t = nvfp4_of(scale_bytes, tensor_scale)
    converted, mask = mxfp4.nvfp4_to_mxfp4(t)
    assert mask.tolist() == [[exact]]
    if exact:
        assert torch.equal(mxfp4.dequantize(converted), nvfp4.dequantize(t))
    else:
        assert same_bytes(converted, mxfp4.quantize(nvfp4.dequantize(t)))
        with pytest.raises(
            ValueError, match=r"nvfp4_to_mxfp4_lossless: block \[0, 0\] has block scales .* 1 of 1 blocks"
        ):
            mxfp4.nvfp4_to_mxfp4_lossless(t)


def test_a_half_of_zeros_takes_the_other_halfs_scale():
    half = list(range(16))
    for codes, scale_bytes in ((half + [0, 8] * 8, [0x38, 0x7E]), ([0, 8] * 8 + half, [0x01, 0x38])):
        t = nvfp4_of(scale_bytes, 1.0, codes)
        converted = mxfp4.nvfp4_to_mxfp4_lossless(t)
        assert converted.scales.view(torch.uint8).tolist() == [[127]]
        assert torch.equal(mxfp4.dequantize(converted), nvfp4.dequantize(t))


def test_scales_per_row_convert_too():
    t = with_scales([[127, 126], [100, 99]])
    one = mxfp4.mxfp4_to_nvfp4_lossless(MxFp4Tensor(t.codes[:1], t.scales[:1]))
    two = mxfp4.mxfp4_to_nvfp4_lossless(MxFp4Tensor(t.codes[1:], t.scales[1:]))
    rows = NvFp4Tensor(
        t.codes,
        torch.cat((one.scales.view(torch.uint8), two.scales.view(torch.uint8))).view(torch.float8_e4m3fn),
        torch.stack((one.tensor_scale, two.tensor_scale)),
        scale_per="row",
    )
    assert same_bytes(mxfp4.nvfp4_to_mxfp4_lossless(rows), t)


# Faults that the checks above must catch


def test_the_check_catches_scales_cast_numerically():
    """F20: byte 120 cast to the number 120 becomes the scale 2^7 instead of 2^-7."""
    t = with_scales([[127, 120]])
    data = t.scales.view(torch.uint8)
    cast = MxFp4Tensor(t.codes, data.to(torch.float8_e8m0fnu))  # right dtype, wrong bytes: only values show it
    with pytest.raises(AssertionError):
        check_dequantize(lambda _: mxfp4.dequantize(cast), t)


@pytest.mark.parametrize("fault", ["swapped nibbles", "scales of the next block", "bias 128"])
def test_the_check_catches(fault):
    t = with_scales([[127, 120]])
    codes, data = t.codes, t.scales.view(torch.uint8)
    if fault == "swapped nibbles":
        codes = codes >> 4 | codes << 4
    else:
        data = data.roll(1, -1) if fault == "scales of the next block" else data - 1
    with pytest.raises(AssertionError):
        check_dequantize(lambda _: mxfp4.dequantize(MxFp4Tensor(codes, data.view(torch.float8_e8m0fnu))), t)


# Refusals


@pytest.mark.parametrize("cast", [torch.uint8, torch.int8, torch.float32, torch.float8_e4m3fn], ids=str)
def test_scales_of_another_dtype_are_refused(cast):
    """F20: raw bytes and numeric casts are refused at the door, with the way to reinterpret them."""
    t = with_scales([[127]])
    with pytest.raises(TypeError, match=r"MxFp4Tensor: scales must be float8_e8m0fnu.*\.view\(torch.float8_e8m0fnu\)"):
        MxFp4Tensor(t.codes, t.scales.view(torch.uint8).to(cast))


def test_other_dtypes_are_refused():
    t = with_scales([[127]])
    with pytest.raises(TypeError, match="MxFp4Tensor: codes must be uint8"):
        MxFp4Tensor(t.codes.view(torch.int8), t.scales)
    with pytest.raises(TypeError, match="mxfp4.dequantize: dtype must be"):
        mxfp4.dequantize(t, torch.float64)
    with pytest.raises(TypeError, match="mxfp4.quantize: x must be fp32, bf16 or fp16"):
        mxfp4.quantize(torch.zeros(1, 32, dtype=torch.float64))


def test_other_shapes_are_refused():
    t = mxfp4.quantize(torch.ones(3, 64, 64))
    with pytest.raises(ValueError, match=r"\[..., N, K/32\] = \[3, 64, 2\].*got \[3, 2, 64\].*transposed"):
        MxFp4Tensor(t.codes, t.scales.transpose(1, 2))
    with pytest.raises(ValueError, match="The codes are N-major"):
        MxFp4Tensor(torch.zeros(64, 64, dtype=torch.uint8), torch.ones(128, 2).to(torch.float8_e8m0fnu))
    with pytest.raises(ValueError, match="MxFp4Tensor: codes must be"):
        MxFp4Tensor(t.codes[..., :8], t.scales)
    with pytest.raises(ValueError, match="MxFp4Tensor: all parts must be on one device"):
        MxFp4Tensor(t.codes, t.scales.to("meta"))
    for shape in ((32,), (2, 0), (2, 16), (2, 33)):
        with pytest.raises(ValueError, match="mxfp4.quantize: x must be"):
            mxfp4.quantize(torch.zeros(shape))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_are_refused(value):
    x = torch.zeros(2, 64)
    x[1, 40] = value
    with pytest.raises(ValueError, match="mxfp4.quantize: x must be finite"):
        mxfp4.quantize(x)


@pytest.mark.parametrize(
    "function",
    [mxfp4.dequantize, mxfp4.mxfp4_to_nvfp4, mxfp4.shared_top_exponent, mxfp4.mxfp4_to_nvfp4_lossless],
)
def test_nan_scales_are_refused(function):
    for codes in (ALL_CODES, [0] * 32):
        with pytest.raises(ValueError, match="scales must not be NaN; got byte 255"):
            function(with_scales([[127, 255]], codes))


def test_top_exponents_are_refused():
    t = with_scales([[127]])
    with pytest.raises(ValueError, match=r"top_exponent must be in -127..127; got 128"):
        mxfp4.mxfp4_to_nvfp4(t, top_exponent=128)
    with pytest.raises(ValueError, match=r"top_exponent must be \[\] or \[\]; got \[2\]"):
        mxfp4.mxfp4_to_nvfp4(t, top_exponent=torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="top_exponent must be an integer; got torch.float32"):
        mxfp4.mxfp4_to_nvfp4(t, top_exponent=torch.tensor(1.0))
    with pytest.raises(ValueError, match="shared_top_exponent: needs one or more tensors with equal leading"):
        mxfp4.shared_top_exponent()
    with pytest.raises(ValueError, match="shared_top_exponent: needs one or more tensors with equal leading"):
        mxfp4.shared_top_exponent(t, mxfp4.quantize(torch.ones(2, 1, 32)))


def test_nvfp4_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="nvfp4_to_mxfp4: K must be a multiple of 32"):
        mxfp4.nvfp4_to_mxfp4(nvfp4.quantize(torch.ones(1, 48)))
    with pytest.raises(ValueError, match="block scales must be unsigned E4M3"):
        mxfp4.nvfp4_to_mxfp4(nvfp4_of([0x38, 0xB8], 1.0))
