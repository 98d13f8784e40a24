# SPDX-License-Identifier: Apache-2.0
"""FP8 blocks and rows: scale rules by hand, partial tiles, and the refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.formats import fp8
from megamoe.formats.fp8 import Fp8BlockTensor, Fp8RowTensor

E8M0, F32 = torch.float8_e8m0fnu, torch.float32


def scale_of(amax, scale_dtype):
    """The scale rule, by mantissa and exponent for E8M0."""
    quotient = np.float32(max(np.float32(amax), np.float32(1e-4))) / np.float32(448)
    if scale_dtype == F32:
        return float(quotient)
    mantissa, exponent = math.frexp(quotient)
    return 2.0 ** (exponent - (mantissa == 0.5))


def check_tiles(t, x, tile_rows, tile_columns):
    """The check that every tile of [N, K], partial or not, has the rule's scale and the codes nearest to its values."""
    values = fp8.dequantize(t)
    for row in range(0, x.shape[0], tile_rows):
        for column in range(0, x.shape[1], tile_columns):
            tile = (slice(row, row + tile_rows), slice(column, column + tile_columns))
            scale = scale_of(float(x[tile].abs().max()), t.scales.dtype)
            assert float(t.scales[row // tile_rows, column // tile_columns].float()) == scale
            codes = (x[tile] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert torch.equal(t.codes[tile].view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(values[tile], codes.float() * scale)


def random_values(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp2(4 * torch.randn(shape, generator=generator))


# Known answers


@pytest.mark.parametrize(
    ("amax", "byte"),
    [(448.0, 127), (448.00003, 128), (447.99997, 127), (224.0, 126), (1.0, 119), (896.0, 128), (0.0, 105), (1e-4, 105),
     (1e-5, 105), (3e38, 247)],
)  # fmt: skip
def test_power_of_two_scale_by_hand(amax, byte):
    """1 / 448 lies between 2^-9 and 2^-8, so amax 1 takes 2^-8 = byte 119; the floor 1e-4 takes 2^-22 = byte 105."""
    x = torch.zeros(1, 128)
    x[0, 5] = -amax
    assert fp8.quantize_rows(x).scales.view(torch.uint8).tolist() == [[byte]]
    assert fp8.quantize_blocks(x).scales.view(torch.uint8).tolist() == [[byte]]


def test_codes_by_hand():
    x = torch.zeros(1, 128)
    x[0, :5] = torch.tensor([1.0, -0.5, 2.0**-20, -0.0, 0.515625])  # scale 2^-8: 256, -128, 2^-12, -0, 132 (tie to 128)
    t = fp8.quantize_rows(x)
    assert t.codes.view(torch.uint8)[0, :5].tolist() == [0x78, 0xF0, 0x00, 0x80, 0x70]
    assert fp8.dequantize(t)[0, :5].tolist() == [1.0, -0.5, 0.0, -0.0, 0.5]


def test_fp32_scale_by_hand():
    x = torch.zeros(1, 128)
    x[0, 0] = 1.0
    t = fp8.quantize_rows(x, scale_dtype=F32)
    assert t.scales.tolist() == [[float(np.float32(1) / np.float32(448))]]
    assert t.codes.view(torch.uint8)[0, 0] == 0x7E


def test_a_partial_block_by_hand():
    x = torch.zeros(129, 130)
    x[0, 0], x[0, 129], x[128, 0], x[128, 129] = 448.0, 896.0, 1.0, 2.0
    t = fp8.quantize_blocks(x)
    assert t.scales.view(torch.uint8).tolist() == [[127, 128], [119, 120]]
    assert t.codes.shape == (129, 130)
    assert torch.equal(fp8.dequantize(t), x)


# Properties


@pytest.mark.parametrize("scale_dtype", [E8M0, F32], ids=str)
@pytest.mark.parametrize("num_rows", [1, 127, 128, 129])
@pytest.mark.parametrize("width", [1, 127, 128, 129, 256])
def test_blocks_are_the_definition(scale_dtype, num_rows, width, seed):
    x = random_values(seed, num_rows, width)
    check_tiles(fp8.quantize_blocks(x, scale_dtype), x, 128, 128)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_rows=st.integers(1, 4),
    width=st.integers(1, 300),
    group=st.sampled_from([1, 32, 64, 100, 128]),
    scale_dtype=st.sampled_from([E8M0, F32]),
    seed=st.integers(0, 2**31),
)
def test_rows_are_the_definition(num_rows, width, group, scale_dtype, seed):
    x = random_values(seed, num_rows, width)
    check_tiles(fp8.quantize_rows(x, group=group, scale_dtype=scale_dtype), x, 1, group)


@pytest.mark.parametrize("byte", [byte for byte in range(256) if byte & 0x7F != 0x7F])
def test_every_code_under_every_kind_of_scale(byte):
    codes = torch.full((1, 3), byte, dtype=torch.uint8).view(torch.float8_e4m3fn)
    value = float(codes[0, 0].float())
    for scale_byte in (0, 1, 127, 200):
        scales = torch.tensor([[scale_byte]], dtype=torch.uint8).view(E8M0)
        expected = np.float32(value * 2.0 ** (scale_byte - 127))
        assert fp8.dequantize(Fp8RowTensor(codes, scales)).tolist() == [[expected] * 3]
        assert fp8.dequantize(Fp8BlockTensor(codes, scales)).tolist() == [[expected] * 3]


def test_power_of_two_scales_never_saturate_and_repeat(seed):
    x = random_values(seed, 130, 200)
    t = fp8.quantize_blocks(x)
    values = fp8.dequantize(t)
    assert bool(((values - x).abs() <= x.abs() * 2.0**-4 + t.scales.float().max() * 2.0**-10).all())
    again = fp8.quantize_blocks(values)
    assert torch.equal(fp8.dequantize(again), values)


def test_rows_do_not_depend_on_each_other(seed):
    x = random_values(seed, 17, 256)
    whole = fp8.quantize_rows(x)
    one = fp8.quantize_rows(x[5:6])
    assert torch.equal(one.codes.view(torch.uint8)[0], whole.codes.view(torch.uint8)[5])
    assert torch.equal(one.scales.view(torch.uint8)[0], whole.scales.view(torch.uint8)[5])


def test_leading_dimensions(seed):
    x = random_values(seed, 3, 130, 129)
    t = fp8.quantize_blocks(x)
    assert t.scales.shape == (3, 2, 2) and t.shape == x.shape and t.ndim == 3 and len(t) == 3
    for expert in range(3):
        assert torch.equal(fp8.dequantize(t[expert]), fp8.dequantize(t)[expert])
        assert torch.equal(fp8.dequantize(fp8.quantize_blocks(x[expert])), fp8.dequantize(t[expert]))
    assert t[1:].shape == (2, 130, 129)
    rows = fp8.quantize_rows(x, group=64)
    assert rows.scales.shape == (3, 130, 3) and rows.shape == x.shape and rows.ndim == 3


def test_sizes_and_devices():
    t = fp8.quantize_blocks(torch.ones(129, 128))
    assert t.num_bytes == 129 * 128 + 2 and t.device == torch.device("cpu") and t.to("cpu").shape == t.shape
    rows = fp8.quantize_rows(torch.ones(2, 128), scale_dtype=F32)
    assert rows.num_bytes == 2 * 128 + 8 and rows.device == torch.device("cpu") and rows.to("cpu").group == 128


@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 5)], ids=str)
def test_no_rows(shape):
    t = fp8.quantize_rows(torch.ones(shape))
    assert fp8.dequantize(t).shape == shape


def test_other_dtypes(seed):
    x = random_values(seed, 4, 128).bfloat16()
    t = fp8.quantize_rows(x)
    assert torch.equal(t.codes.view(torch.uint8), fp8.quantize_rows(x.float()).codes.view(torch.uint8))
    assert torch.equal(fp8.dequantize(t, torch.bfloat16), fp8.dequantize(t).bfloat16())


@pytest.mark.parametrize("fault", ["scales transposed", "scale of tile 0 everywhere", "scales cast numerically"])
def test_the_check_catches(fault, seed):
    x = random_values(seed, 256, 256)
    t = fp8.quantize_blocks(x)
    data = t.scales.view(torch.uint8)
    if fault == "scales transposed":  # F4 on a square matrix, where no shape can show it
        data = data.T.contiguous()
    elif fault == "scale of tile 0 everywhere":  # F9
        data = data[:1, :1].expand(2, 2).contiguous()
    else:  # F20
        data = data.to(E8M0).view(torch.uint8)
    assert not torch.equal(data, t.scales.view(torch.uint8))
    with pytest.raises(AssertionError):
        check_tiles(Fp8BlockTensor(t.codes, data.view(E8M0)), x, 128, 128)


# Refusals


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scale_dtype", [E8M0, F32], ids=str)
def test_non_finite_values_are_refused(value, scale_dtype):
    x = torch.zeros(2, 200)
    x[1, 150] = value
    with pytest.raises(ValueError, match="fp8.quantize_rows: x must be finite"):
        fp8.quantize_rows(x, scale_dtype=scale_dtype)
    with pytest.raises(ValueError, match="fp8.quantize_blocks: x must be finite"):
        fp8.quantize_blocks(x, scale_dtype)


def test_nan_codes_and_scales_are_refused():
    t = fp8.quantize_rows(torch.ones(2, 128))
    bad_codes = t.codes.view(torch.uint8).clone()
    bad_codes[1, 7] = 0x7F
    with pytest.raises(ValueError, match="codes must not be NaN"):
        fp8.dequantize(Fp8RowTensor(bad_codes.view(torch.float8_e4m3fn), t.scales))
    bad_scales = torch.full((2, 1), 255, dtype=torch.uint8).view(E8M0)
    with pytest.raises(ValueError, match="scales must not be NaN"):
        fp8.dequantize(Fp8RowTensor(t.codes, bad_scales))
    for value in (torch.nan, torch.inf, -1.0):
        with pytest.raises(ValueError, match="fp8.dequantize: scales must be finite and not negative"):
            fp8.dequantize(Fp8RowTensor(t.codes, torch.full((2, 1), value)))


@pytest.mark.parametrize("container", [Fp8BlockTensor, Fp8RowTensor])
def test_raw_bytes_are_refused(container):
    """F20 for FP8 scales."""
    codes, scales = torch.zeros(1, 128).to(torch.float8_e4m3fn), torch.ones(1, 1).to(E8M0)
    with pytest.raises(TypeError, match=f"{container.__name__}: codes must be float8_e4m3fn"):
        container(codes.view(torch.uint8), scales)
    for dtype in (torch.uint8, torch.int8, torch.bfloat16):
        with pytest.raises(TypeError, match=rf"{container.__name__}: scales must be .*\.view\(torch.float8_e8m0fnu\)"):
            container(codes, torch.ones(1, 1).to(dtype))


def test_scale_shapes_are_refused():
    codes = torch.zeros(200, 300).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"= \[2, 3\] for codes \[200, 300\]; got \[3, 2\]. The scales are transposed"):
        Fp8BlockTensor(codes, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"got \[2, 2\]. Check that codes and scales"):
        Fp8BlockTensor(codes, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"\[..., T, ceil\(K/64\)\] = \[200, 5\]"):
        Fp8RowTensor(codes, torch.ones(200, 3), group=64)
    with pytest.raises(ValueError, match="codes must have two or more dimensions"):
        Fp8RowTensor(codes[0], torch.ones(3))
    with pytest.raises(ValueError, match="Fp8BlockTensor: all parts must be on one device"):
        Fp8BlockTensor(codes, torch.ones(2, 3, device="meta"))
    with pytest.raises(ValueError, match="Fp8RowTensor: group must be positive; got 0"):
        Fp8RowTensor(codes, torch.ones(200, 3), group=0)
    with pytest.raises(ValueError, match="selects along a leading dimension"):
        Fp8BlockTensor(codes, torch.ones(2, 3))[0]


def test_arguments_are_refused():
    with pytest.raises(TypeError, match="scale_dtype must be float8_e8m0fnu or float32; got torch.bfloat16"):
        fp8.quantize_rows(torch.ones(1, 128), scale_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="fp8.quantize_rows: group must be positive"):
        fp8.quantize_rows(torch.ones(1, 128), group=0)
    with pytest.raises(TypeError, match="fp8.quantize_rows: x must be fp32, bf16 or fp16"):
        fp8.quantize_rows(torch.ones(1, 128, dtype=torch.int32))
    with pytest.raises(TypeError, match="fp8.dequantize: dtype must be fp32, bf16 or fp16"):
        fp8.dequantize(fp8.quantize_rows(torch.ones(1, 128)), torch.int32)
    for shape in ((128,), (2, 0)):
        with pytest.raises(ValueError, match="fp8.quantize_rows: x must be"):
            fp8.quantize_rows(torch.ones(shape))
    for shape in ((128,), (2, 0), (0, 2)):
        with pytest.raises(ValueError, match="fp8.quantize_blocks: x must be"):
            fp8.quantize_blocks(torch.ones(shape))
