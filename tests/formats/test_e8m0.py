# SPDX-License-Identifier: Apache-2.0
"""E8M0: every byte, exact ceilings, and the refusals (F20: scale bytes cast numerically)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.formats.e8m0 import ceil_to_e8m0, decode_e8m0, e8m0_from_bytes, encode_e8m0, pow2_ceil

ALL_BYTES = torch.arange(255, dtype=torch.uint8)


def ceiling_of(value):
    """The smallest power of two in E8M0's range that is at least value, by integer arithmetic on the mantissa."""
    if value <= 2.0**-127:
        return 2.0**-127
    mantissa, exponent = math.frexp(value)  # value = mantissa * 2^exponent, 0.5 <= mantissa < 1
    return 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)


# Known answers


@pytest.mark.parametrize(
    ("byte", "value"), [(0, 2.0**-127), (1, 2.0**-126), (126, 0.5), (127, 1.0), (128, 2.0), (254, 2.0**127)]
)
def test_known_bytes(byte, value):
    scales = torch.tensor([byte], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert decode_e8m0(scales).tolist() == [value]
    assert encode_e8m0(torch.tensor([value])).view(torch.uint8).tolist() == [byte]


@pytest.mark.parametrize(
    ("value", "ceiling"),
    [(0.0, 2.0**-127), (1e-45, 2.0**-127), (2.0**-127, 2.0**-127), (1.5 * 2.0**-127, 2.0**-126), (1.0, 1.0),
     (1.0000001, 2.0), (0.99999994, 1.0), (3.0, 4.0), (2.0**127, 2.0**127)],
)  # fmt: skip
def test_known_ceilings(value, ceiling):
    assert pow2_ceil(torch.tensor([value])).tolist() == [ceiling]


# Properties


def test_every_byte():
    scales = ALL_BYTES.view(torch.float8_e8m0fnu)
    decoded = decode_e8m0(scales)
    assert decoded.tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert torch.equal(decoded, scales.float())
    assert torch.equal(encode_e8m0(decoded).view(torch.uint8), ALL_BYTES)
    assert torch.equal(e8m0_from_bytes(ALL_BYTES).view(torch.uint8), ALL_BYTES)
    assert torch.equal(e8m0_from_bytes(ALL_BYTES.view(torch.int8)).view(torch.uint8), ALL_BYTES)


def test_ceiling_around_every_power_of_two():
    powers = decode_e8m0(ALL_BYTES.view(torch.float8_e8m0fnu))
    zero, infinity = torch.zeros(()), torch.full((), torch.inf)
    below, above = torch.nextafter(powers, zero), torch.nextafter(powers[:-1], infinity)
    assert torch.equal(pow2_ceil(powers), powers)
    assert torch.equal(pow2_ceil(below), powers)
    assert torch.equal(pow2_ceil(above), powers[1:])
    normal = torch.cat((powers[1:], below[2:], above[1:]))
    ceiling, scales = ceil_to_e8m0(normal)
    assert torch.equal(ceiling, pow2_ceil(normal)) and torch.equal(decode_e8m0(scales), ceiling)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(min_value=0.0, max_value=2.0**127, width=32), min_size=1, max_size=10))
def test_any_ceiling(values):
    assert pow2_ceil(torch.tensor(values)).tolist() == [ceiling_of(value) for value in values]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (), (2, 3)], ids=str)
def test_shapes(shape):
    ones = torch.ones(shape)
    assert torch.equal(decode_e8m0(encode_e8m0(pow2_ceil(ones))), ones)


# Refusals


def test_nan_byte_is_refused():
    scales = torch.tensor([1, 255, 3], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(ValueError, match="decode_e8m0: scales must not be NaN; got byte 255 1 time"):
        decode_e8m0(scales)


@pytest.mark.parametrize("value", [0.0, -1.0, 3.0, 1.5 * 2.0**-127, 1e-45, torch.inf, torch.nan, 1.0000001])
def test_values_that_are_no_scale_are_refused(value):
    with pytest.raises(ValueError, match="encode_e8m0: x must be powers of two"):
        encode_e8m0(torch.tensor([1.0, value]))


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf, 2.0**127 * 1.5])
def test_ceiling_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match="pow2_ceil: x must be in"):
        pow2_ceil(torch.tensor([1.0, value]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.float8_e8m0fnu, torch.bfloat16], ids=str)
def test_cast_bytes_are_refused(dtype):
    """F20: once cast, the bytes are no longer the file's, so no dtype but a raw byte is taken."""
    with pytest.raises(TypeError, match="e8m0_from_bytes: data must be raw bytes.*A numeric cast destroys"):
        e8m0_from_bytes(torch.tensor([127, 120], dtype=torch.uint8).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int8], ids=str)
def test_scales_of_another_dtype_are_refused(dtype):
    with pytest.raises(TypeError, match=r"scales must be float8_e8m0fnu.*\.view\(torch.float8_e8m0fnu\)"):
        decode_e8m0(torch.ones(2, dtype=dtype))


def test_fp64_is_refused():
    with pytest.raises(TypeError, match="pow2_ceil: x must be fp32"):
        pow2_ceil(torch.ones(2, dtype=torch.float64))
    with pytest.raises(TypeError, match="encode_e8m0: x must be fp32"):
        encode_e8m0(torch.ones(2, dtype=torch.float64))
