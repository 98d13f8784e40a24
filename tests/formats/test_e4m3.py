# SPDX-License-Identifier: Apache-2.0
"""E4M3: every byte, every bf16 value, and the refusals."""

import numpy as np
import pytest
import torch

from megamoe.formats.e4m3 import decode_e4m3, encode_e4m3


def value_of(byte):
    exponent, mantissa = byte >> 3 & 15, byte & 7
    magnitude = mantissa / 512 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if byte & 0x80 else magnitude


FINITE = [byte for byte in range(256) if byte & 0x7F != 0x7F]


def codes_of(bytes_):
    return torch.tensor(bytes_, dtype=torch.uint8).view(torch.float8_e4m3fn)


# Known answers


@pytest.mark.parametrize(
    ("byte", "value"),
    [(0x00, 0.0), (0x01, 2.0**-9), (0x07, 7 * 2.0**-9), (0x08, 2.0**-6), (0x38, 1.0), (0x78, 256.0), (0x7E, 448.0),
     (0xFE, -448.0), (0xB8, -1.0)],
)  # fmt: skip
def test_known_bytes(byte, value):
    assert decode_e4m3(codes_of([byte])).tolist() == [value]
    assert encode_e4m3(torch.tensor([value])).view(torch.uint8).tolist() == [byte]


@pytest.mark.parametrize(
    ("value", "byte"),
    [(-0.0, 0x80), (2.0**-10, 0x00), (3 * 2.0**-10, 0x02), (1.0625, 0x38), (1.1875, 0x3A), (449.0, 0x7E), (1e30, 0x7E),
     (-1e30, 0xFE), (464.0, 0x7E), (480.0, 0x7E), (-(2.0**-11), 0x80)],
)  # fmt: skip
def test_known_roundings(value, byte):
    assert encode_e4m3(torch.tensor([value])).view(torch.uint8).tolist() == [byte]


# Properties


def test_every_byte():
    decoded = decode_e4m3(codes_of(FINITE))
    assert decoded.tolist() == [value_of(byte) for byte in FINITE]
    assert torch.equal(decoded, codes_of(FINITE).float())
    assert torch.equal(encode_e4m3(decoded).view(torch.uint8), codes_of(FINITE).view(torch.uint8))
    assert torch.signbit(decoded[FINITE.index(0x80)])


def test_every_bf16_value_rounds_to_nearest_even():
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[values.isfinite()].float()
    magnitudes = np.array([value_of(byte) for byte in range(0x7F)])
    evens_first = np.array([*range(0, 0x7F, 2), *range(1, 0x7F, 2)])
    absolute = np.minimum(np.abs(values.double().numpy()), 448.0)
    nearest = evens_first[np.abs(absolute[:, None] - magnitudes[evens_first]).argmin(-1)]
    expected = nearest + 128 * np.signbit(values.numpy())
    assert np.array_equal(encode_e4m3(values).view(torch.uint8).numpy(), expected)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (1,), (2, 3)], ids=str)
def test_shapes(shape):
    assert decode_e4m3(encode_e4m3(torch.ones(shape))).tolist() == torch.ones(shape).tolist()


# Refusals


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_nan_bytes_are_refused(byte):
    with pytest.raises(ValueError, match="decode_e4m3: codes must not be NaN; got byte 0x7F or 0xFF 1 time"):
        decode_e4m3(codes_of([0x7E] * 5000 + [byte] + [0xFE] * 5000))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_are_refused(value):
    with pytest.raises(ValueError, match="encode_e4m3: x must be finite"):
        encode_e4m3(torch.tensor([0.0, value]))


def test_raw_bytes_are_refused():
    with pytest.raises(TypeError, match=r"decode_e4m3: codes must be float8_e4m3fn.*\.view\(torch.float8_e4m3fn\)"):
        decode_e4m3(torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(TypeError, match="encode_e4m3: x must be fp32, bf16 or fp16"):
        encode_e4m3(torch.zeros(2, dtype=torch.float64))
