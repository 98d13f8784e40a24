# SPDX-License-Identifier: Apache-2.0
"""E2M1: every bf16 value, every byte, ties, signs of zero, and the refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.formats import e2m1

MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
THRESHOLDS = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]


def nearest_codes(values):
    """Codes by definition, in fp64: the nearest magnitude, the even code of two equally near, the sign bit on top."""
    values = np.asarray(values, dtype=np.float64)
    evens_first = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    distance = np.abs(np.minimum(np.abs(values), 6.0)[..., None] - MAGNITUDES[evens_first])
    return evens_first[distance.argmin(-1)] + 8 * np.signbit(values)


def all_bf16():
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def near_thresholds():
    """Each threshold and code value with its two fp32 neighbours on either side, in both signs."""
    centres = torch.tensor([*THRESHOLDS, *MAGNITUDES.tolist()], dtype=torch.float32)
    bits = centres.view(torch.int32)[:, None] + torch.arange(-2, 3, dtype=torch.int32)
    values = bits[bits >= 0].view(torch.float32)
    return torch.cat((values, -values))


def check_encode(encode):
    """The check that an encoder is E2M1; the fault injections below must not pass it."""
    finite = all_bf16()[all_bf16().isfinite()]
    for values in (finite.float(), near_thresholds()):
        codes = encode(values)
        wrong = codes.numpy() != nearest_codes(values.numpy())
        assert not wrong.any(), f"first wrong value {values[torch.from_numpy(wrong)][0]}"


# Known answers


def test_values_of_the_sixteen_codes():
    expected = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
    decoded = e2m1.decode_e2m1(torch.arange(16, dtype=torch.uint8))
    assert decoded.tolist() == expected
    assert torch.signbit(decoded).tolist() == [False] * 8 + [True] * 8


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0.0, 0), (-0.0, 8),  # the sign of zero
        (0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6),  # ties to the even code
        (-0.25, 8), (-0.75, 10), (-5.0, 14),
        (0.2500001, 1), (0.7499999, 1), (5.0000005, 7), (4.9999995, 6),
        (6.0, 7), (6.0000005, 7), (1e38, 7), (-1e38, 15),  # saturation
        (1e-45, 0), (-1e-45, 8), (-0.1, 8),  # subnormals; a value that rounds to zero keeps its sign
    ],
)  # fmt: skip
def test_known_codes(value, code):
    assert e2m1.encode_e2m1(torch.tensor([value])).tolist() == [code]


def test_low_nibble_is_the_even_column():
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert e2m1.pack(codes).tolist() == [[0x21, 0x0F]]
    assert e2m1.unpack(torch.tensor([[0x21, 0x0F]], dtype=torch.uint8)).tolist() == [[1, 2, 15, 0]]
    assert e2m1.decode_packed(torch.tensor([0x21, 0x9F], dtype=torch.uint8)).tolist() == [0.5, 1.0, -6.0, -0.5]


# Properties


def test_every_bf16_value_and_every_threshold():
    check_encode(e2m1.encode_e2m1)


def test_bf16_and_fp16_input_equal_fp32_input():
    finite = all_bf16()[all_bf16().isfinite()]
    assert torch.equal(e2m1.encode_e2m1(finite), e2m1.encode_e2m1(finite.float()))
    half = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    half = half[half.isfinite()]
    assert e2m1.encode_e2m1(half).tolist() == nearest_codes(half.double().numpy()).tolist()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_any_fp32_value(values):
    assert e2m1.encode_e2m1(torch.tensor(values)).tolist() == nearest_codes(values).tolist()


def test_every_code_encodes_to_itself():
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(e2m1.encode_e2m1(e2m1.decode_e2m1(codes)), codes)


def test_every_byte_packs_to_itself():
    packed = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(e2m1.pack(e2m1.unpack(packed)), packed)
    assert torch.equal(e2m1.decode_packed(packed), e2m1.decode_e2m1(e2m1.unpack(packed)))
    expected = [value for byte in range(256) for value in (byte & 15, byte >> 4)]
    assert e2m1.unpack(packed).tolist() == expected


@pytest.mark.parametrize("shape", [(0,), (0, 16), (3, 0), (1, 2), (2, 3, 4)], ids=str)
def test_shapes(shape):
    x = torch.ones(shape)
    codes = e2m1.encode_e2m1(x)
    assert codes.shape == x.shape and codes.dtype == torch.uint8
    packed = e2m1.pack(codes)
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    assert e2m1.unpack(packed).shape == x.shape
    assert torch.equal(e2m1.decode_packed(packed), x)


def test_strided_input_and_input_left_alone(seed):
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
    before = x.clone()
    assert torch.equal(e2m1.encode_e2m1(x.T), e2m1.encode_e2m1(x).T)
    codes = e2m1.encode_e2m1(x)
    assert torch.equal(e2m1.pack(codes.T.contiguous().T), e2m1.pack(codes))
    assert torch.equal(e2m1.pack(codes.flatten()[1:33]), e2m1.pack(codes.flatten()[1:33].clone()))  # an odd address
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: e2m1.round_to_e2m1(
            torch.nextafter(x, torch.full_like(x, torch.inf).copysign(x))
        ),  # ties away from zero
        lambda x: e2m1.round_to_e2m1(x.bfloat16().float()),  # rounded twice
        lambda x: e2m1.round_to_e2m1(x + 0.0),  # -0 lost
        lambda x: torch.where(e2m1.round_to_e2m1(x) == 8, 0, e2m1.round_to_e2m1(x)),  # small negatives lose their sign
        lambda x: torch.where(x.abs() > 6, e2m1.round_to_e2m1(x) ^ 1, e2m1.round_to_e2m1(x)),  # no saturation
    ],
    ids=["ties away", "double rounding", "zero sign", "underflow sign", "saturation"],
)
def test_the_check_catches(fault):
    with pytest.raises(AssertionError, match="first wrong value"):
        check_encode(fault)


# Refusals


def test_every_bf16_nan_and_infinity_is_refused():
    values = all_bf16()
    values = values[~values.isfinite()]
    assert values.numel() == 256
    for value in values:
        with pytest.raises(ValueError, match="encode_e2m1: x must be finite"):
            e2m1.encode_e2m1(torch.stack((torch.zeros_like(value), value)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="encode_e2m1: x must be fp32, bf16 or fp16"):
        e2m1.encode_e2m1(torch.zeros(2, dtype=dtype))


def test_codes_out_of_range_are_refused():
    with pytest.raises(ValueError, match="decode_e2m1: a code is 0..15; got 16"):
        e2m1.decode_e2m1(torch.tensor([3, 16], dtype=torch.uint8))
    with pytest.raises(ValueError, match="pack: K must be even"):
        e2m1.pack(torch.zeros(2, 3, dtype=torch.uint8))


@pytest.mark.parametrize("function", [e2m1.decode_e2m1, e2m1.decode_packed, e2m1.pack, e2m1.unpack])
def test_codes_of_another_dtype_are_refused(function):
    with pytest.raises(TypeError, match=f"{function.__name__}: codes must be uint8"):
        function(torch.zeros(2, dtype=torch.int8))
