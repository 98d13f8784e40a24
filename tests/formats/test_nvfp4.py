# SPDX-License-Identifier: Apache-2.0
"""NVFP4: every code under every scale byte, quantization by definition, layouts, and the faults F1, F3, F4, F5, F7."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.formats import e2m1, nvfp4
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_layout import ScaleLayout, to_tiled_128x4

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3 = np.array([m / 512 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:0x7F])


def nearest(values, grid):
    """Index of the nearest entry of an ascending grid, the even index of two equally near; fp64."""
    evens_first = np.array([*range(0, len(grid), 2), *range(1, len(grid), 2)])
    values = np.minimum(values.astype(np.float64), grid[-1])
    return evens_first[np.abs(values[..., None] - grid[evens_first]).argmin(-1)]


def quantize_by_definition(x, tensor_scale, scale_per):
    """Codes, scale bytes and tensor scale of [N, K], written out in fp32 with brute-force rounding."""
    x = x.numpy().astype(np.float32)
    blocks = x.reshape(x.shape[0], -1, 16)
    amax = np.abs(blocks).max(-1)
    if tensor_scale is None:
        whole = amax.max(-1) if scale_per == "row" else amax.max()
        tensor_scale = np.maximum(whole, np.float32(1e-12)) / np.float32(2688)
    g = np.float32(tensor_scale)
    g_row = np.broadcast_to(g.reshape(-1, 1), (x.shape[0], 1))
    scale_index = nearest(np.clip(amax / (np.float32(6) * g_row), np.float32(2.0**-9), np.float32(448)), E4M3)
    step = g_row * E4M3[scale_index].astype(np.float32)
    ratio = blocks / step[..., None]
    codes = nearest(np.abs(ratio), E2M1) + 8 * np.signbit(ratio)
    return codes.reshape(x.shape), scale_index, g


def check_quantize(quantize, x, tensor_scale=None, scale_per="tensor"):
    """The check that a function quantizes by definition; the fault injections below must not pass it."""
    t = quantize(x, tensor_scale=tensor_scale, scale_per=scale_per)
    codes, scales, g = quantize_by_definition(x, None if tensor_scale is None else tensor_scale.numpy(), scale_per)
    assert np.array_equal(t.tensor_scale.numpy(), g)
    assert np.array_equal(t.scales.view(torch.uint8).numpy(), scales)
    assert np.array_equal(e2m1.unpack(t.codes).numpy(), codes)


def check_dequantize(dequantize, t):
    """The check that a function dequantizes [N, K] by definition."""
    codes, scales = e2m1.unpack(t.codes).numpy(), t.row_major().scales.view(torch.uint8).numpy()
    values = np.concatenate((E2M1, -E2M1))[codes] * np.repeat(E4M3[scales], 16, axis=-1)
    g = t.tensor_scale.numpy().reshape(-1, 1)
    assert np.array_equal(dequantize(t).numpy(), values.astype(np.float32) * g)


def from_bytes(codes, scales, tensor_scale=1.0):
    """[N, K] from unpacked codes and scale bytes."""
    scales = torch.as_tensor(scales, dtype=torch.uint8).view(torch.float8_e4m3fn)
    packed = e2m1.pack(torch.as_tensor(codes, dtype=torch.uint8))
    return NvFp4Tensor(packed, scales, torch.tensor(tensor_scale, dtype=torch.float32))


def random_values(seed, *shape, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp2(spread * torch.randn(shape, generator=generator))


# Known answers


def test_dequantize_by_hand():
    codes = [[7, 15, 1, 9, 0, 8, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0]]
    t = from_bytes(codes, [[0x40]], 0.5)  # 0x40 is 2.0
    expected = [6.0, -6.0, 0.5, -0.5, 0.0, -0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert nvfp4.dequantize(t).tolist() == [expected]
    assert torch.signbit(nvfp4.dequantize(t))[0].tolist()[4:6] == [False, True]
    assert t.codes[0, :3].tolist() == [0xF7, 0x91, 0x80]


def test_quantize_by_hand():
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([2688.0, -448.0, 112.0, 336.0])  # steps of 448: 6, -1, 0.25 (tie), 0.75 (tie)
    x[0, 16:18] = torch.tensor([6.0, 5.0])  # block scale 1: 6, 5 (tie to 4)
    t = nvfp4.quantize(x)
    assert t.tensor_scale.tolist() == 1.0
    assert t.scales.view(torch.uint8).tolist() == [[0x7E, 0x38]]
    assert t.codes[0, :2].tolist() == [0xA7, 0x20] and t.codes[0, 8:10].tolist() == [0x67, 0x00]


def test_smallest_block_scale_is_the_smallest_subnormal():
    x = torch.zeros(1, 48)
    x[0, 0], x[0, 16], x[0, 32] = 2688.0, 6 * 2.0**-9, 1e-30
    t = nvfp4.quantize(x)
    assert t.scales.view(torch.uint8).tolist() == [[0x7E, 0x01, 0x01]]
    assert nvfp4.dequantize(t)[0, [0, 16, 32]].tolist() == [2688.0, 6 * 2.0**-9, 0.0]


def test_zeros_keep_their_sign_and_need_no_special_case():
    x = torch.zeros(2, 16)
    x[1] = -0.0
    t = nvfp4.quantize(x)
    assert float(t.tensor_scale) == np.float32(1e-12) / np.float32(2688)
    assert t.scales.view(torch.uint8).tolist() == [[1], [1]]
    assert t.codes.tolist() == [[0] * 8, [0x88] * 8]
    assert torch.equal(torch.signbit(nvfp4.dequantize(t)), torch.signbit(x))


def test_values_beyond_a_given_scale_saturate():
    t = nvfp4.quantize(torch.full((1, 16), -1e6), tensor_scale=torch.tensor(1.0))
    assert nvfp4.dequantize(t).tolist() == [[-2688.0] * 16]


# Properties


@pytest.mark.parametrize("tensor_scale", [1.0, 2.0**-8, 1 / 2688, 3.4e-5, 1e-20, 1e20])
def test_every_code_under_every_scale_byte(tensor_scale):
    codes = torch.arange(16, dtype=torch.uint8).expand(127, 16).contiguous()
    t = from_bytes(codes, torch.arange(127)[:, None], tensor_scale)
    check_dequantize(nvfp4.dequantize, t)


@pytest.mark.parametrize("byte", range(0x7F, 0x100))
def test_every_other_scale_byte_is_refused(byte):
    """F7: NaN bytes, and bytes whose sign bit hardware would ignore or honour as it pleases."""
    what = "NaN" if byte in (0x7F, 0xFF) else "the sign bit set"
    t = from_bytes(torch.zeros(2, 16), [[0x38], [byte]])
    with pytest.raises(ValueError, match=rf"nvfp4.dequantize: block scales .* got byte {byte:#04x} \({what}\), 1 such"):
        nvfp4.dequantize(t)
    with pytest.raises(ValueError, match="block scales"):
        nvfp4.dequantize(t.tiled())


@pytest.mark.parametrize("scale_per", ["tensor", "row"])
@pytest.mark.parametrize("num_rows", [1, 127, 128, 129])
@pytest.mark.parametrize("width", [16, 48, 64, 80])
def test_quantize_is_the_definition(scale_per, num_rows, width, seed):
    x = random_values(seed, num_rows, width)
    check_quantize(nvfp4.quantize, x, scale_per=scale_per)
    check_dequantize(nvfp4.dequantize, nvfp4.quantize(x, scale_per=scale_per))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=32, max_size=32),
    tensor_scale=st.none() | st.floats(2.0**-117, 2.0**118, width=32),
    scale_per=st.sampled_from(["tensor", "row"]),
)
def test_quantize_is_the_definition_for_any_values(values, tensor_scale, scale_per):
    x = torch.tensor(values).view(2, 16)
    given_scale = None
    if tensor_scale is not None:
        given_scale = torch.full((2,) if scale_per == "row" else (), tensor_scale)
    check_quantize(nvfp4.quantize, x, given_scale, scale_per)


def test_error_is_bounded_by_half_a_step(seed):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))
    t = nvfp4.quantize(x)
    step = (t.scales.float() * t.tensor_scale).repeat_interleave(16, -1)
    error = (nvfp4.dequantize(t) - x).abs()
    # The gap between 4 and 6 is 2 steps; the scale itself rounds by 2^-4, which can push the block maximum past 6.
    assert bool((error <= 1.0 * step * (1 + 2.0**-4)).all())
    assert float((nvfp4.dequantize(t) - x).norm() / x.norm()) < 0.11


def test_quantizing_twice_changes_nothing(seed):
    """Values on the grid with a block maximum of 6 return their own codes and scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (8, 64), dtype=torch.uint8, generator=generator)
    codes[:, ::16] = 7
    scales = torch.randint(1, 0x7F, (8, 4), dtype=torch.uint8, generator=generator)
    t = from_bytes(codes, scales, 2.0**-5)
    again = nvfp4.quantize(nvfp4.dequantize(t), tensor_scale=t.tensor_scale)
    assert torch.equal(again.codes, t.codes)
    assert torch.equal(again.scales.view(torch.uint8), t.scales.view(torch.uint8))


def test_rows_do_not_depend_on_each_other(seed):
    x = random_values(seed, 33, 64)
    whole = nvfp4.quantize(x, scale_per="row")
    for row in (0, 17, 32):
        one = nvfp4.quantize(x[row : row + 1], scale_per="row")
        assert torch.equal(one.codes[0], whole.codes[row])
        assert torch.equal(one.scales[0].float(), whole.scales[row].float())
        assert torch.equal(one.tensor_scale[0], whole.tensor_scale[row])


@pytest.mark.parametrize("scale_per", ["tensor", "row"])
def test_leading_dimensions_are_independent(scale_per, seed):
    x = random_values(seed, 3, 5, 48)
    t = nvfp4.quantize(x, scale_per=scale_per)
    assert t.shape == x.shape and len(t) == 3
    assert t.tensor_scale.shape == ((3, 5) if scale_per == "row" else (3,))
    for expert, part in enumerate(t):
        alone = nvfp4.quantize(x[expert], scale_per=scale_per)
        assert torch.equal(part.codes, alone.codes) and torch.equal(part.tensor_scale, alone.tensor_scale)
        assert torch.equal(nvfp4.dequantize(part), nvfp4.dequantize(t)[expert])
        assert torch.equal(nvfp4.dequantize(t.tiled()[expert]), nvfp4.dequantize(alone))
    assert torch.equal(nvfp4.dequantize(t[1:]), nvfp4.dequantize(t)[1:])
    assert t[0].codes.data_ptr() == t.codes.data_ptr()


@pytest.mark.parametrize("shape", [(0, 16), (1, 16), (0, 3, 32), (2, 0, 32)], ids=str)
@pytest.mark.parametrize("scale_per", ["tensor", "row"])
def test_edge_shapes(shape, scale_per):
    t = nvfp4.quantize(torch.ones(shape), scale_per=scale_per)
    assert torch.equal(nvfp4.dequantize(t).round(), torch.ones(shape))
    assert torch.equal(nvfp4.dequantize(t.tiled()), nvfp4.dequantize(t))


@pytest.mark.parametrize("num_rows", [1, 127, 128, 129])
@pytest.mark.parametrize("width", [16, 48, 64, 80])
def test_tiled_scales_mean_the_same(num_rows, width, seed):
    t = nvfp4.quantize(random_values(seed, 2, num_rows, width))
    tiled = t.tiled()
    assert tiled.scale_layout is ScaleLayout.TILED_128X4
    assert tiled.scales.shape == (2, -(-num_rows // 128) * -(-width // 64) * 512)
    assert torch.equal(tiled.scales.view(torch.uint8), to_tiled_128x4(t.scales).view(torch.uint8))
    assert torch.equal(nvfp4.dequantize(tiled), nvfp4.dequantize(t))
    assert torch.equal(tiled.row_major().scales.view(torch.uint8), t.scales.view(torch.uint8))
    assert tiled.tiled() is tiled and t.row_major() is t


def test_inputs_and_outputs_of_other_dtypes(seed):
    x = random_values(seed, 4, 32).bfloat16()
    t = nvfp4.quantize(x)
    assert torch.equal(t.codes, nvfp4.quantize(x.float()).codes)
    assert torch.equal(nvfp4.dequantize(t, torch.bfloat16), nvfp4.dequantize(t).bfloat16())


def test_sizes():
    t = nvfp4.quantize(torch.ones(4, 32))
    assert t.num_bytes == 4 * 16 + 4 * 2 + 4
    assert t.shape == (4, 32) and t.ndim == 2 and t.device == torch.device("cpu")
    assert t.to("cpu").shape == t.shape


def test_a_stored_scalar_serves_every_row_or_expert(seed):
    x = random_values(seed, 2, 3, 16)
    t = nvfp4.quantize(x, tensor_scale=torch.tensor(0.25))
    assert t.tensor_scale.tolist() == [0.25, 0.25]
    assert nvfp4.quantize(x, tensor_scale=torch.tensor(0.25), scale_per="row").tensor_scale.shape == (2, 3)


# Faults that the checks above must catch


def fold_tensor_scale(t):
    """F1: the fp32 tensor scale multiplied into the E4M3 block scales."""
    folded = (t.scales.float() * t.tensor_scale[..., None, None]).to(torch.float8_e4m3fn)
    return NvFp4Tensor(t.codes, folded, torch.ones_like(t.tensor_scale))


def test_the_check_catches_a_folded_tensor_scale(seed):
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)) * 0.02
    t = nvfp4.quantize(x)
    check_dequantize(nvfp4.dequantize, t)
    with pytest.raises(AssertionError):
        check_dequantize(lambda t: nvfp4.dequantize(fold_tensor_scale(t)), t)
    lost = (nvfp4.dequantize(fold_tensor_scale(t)) - nvfp4.dequantize(t)).norm() / nvfp4.dequantize(t).norm()
    assert float(lost) > 0.02


def test_the_check_catches_the_reciprocal_tensor_scale(seed):
    """F3: 1 / scale where the scale is meant."""
    t = nvfp4.quantize(random_values(seed, 4, 32))
    upside_down = NvFp4Tensor(t.codes, t.scales, 1 / t.tensor_scale)
    with pytest.raises(AssertionError):
        check_dequantize(lambda _: nvfp4.dequantize(upside_down), t)


@pytest.mark.parametrize("fault", ["swapped nibbles", "scales of the next block", "N-major codes"])
def test_the_check_catches(fault, seed):
    t = nvfp4.quantize(random_values(seed, 32, 32))
    codes, scales = t.codes, t.scales
    if fault == "swapped nibbles":
        codes = codes >> 4 | codes << 4
    elif fault == "scales of the next block":
        scales = scales.view(torch.uint8).roll(1, -1).view(torch.float8_e4m3fn)
    else:  # F5 on a square matrix, where no shape can show it
        codes = e2m1.pack(e2m1.unpack(codes).T.contiguous())
    with pytest.raises(AssertionError):
        check_dequantize(lambda t: nvfp4.dequantize(NvFp4Tensor(codes, scales, t.tensor_scale)), t)


def test_the_check_catches_a_reciprocal_multiply(monkeypatch):
    """Division is the contract: x * (1 / step) rounds twice and moves ties."""
    steps = torch.arange(1.0, 200.0, 2.0)
    multiples = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] * 2)
    x = steps[:, None] * multiples  # every tie, exactly, under block scales of 1
    check_quantize(nvfp4.quantize, x, steps, "row")
    monkeypatch.setattr(torch.Tensor, "__truediv__", lambda x, other: x * torch.reciprocal(torch.as_tensor(other)))
    with pytest.raises(AssertionError):
        check_quantize(nvfp4.quantize, x, steps, "row")


# Refusals


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scale_per", ["tensor", "row"])
@pytest.mark.parametrize("tensor_scale", [None, torch.tensor(1.0)], ids=["dynamic", "given"])
def test_non_finite_values_are_refused(value, scale_per, tensor_scale):
    x = torch.zeros(3, 32)
    x[1, 17] = value
    with pytest.raises(ValueError, match="nvfp4.quantize: x must be finite"):
        nvfp4.quantize(x, tensor_scale=tensor_scale, scale_per=scale_per)


@pytest.mark.parametrize("shape", [(16,), (2, 0), (2, 8), (2, 17), (2, 1000)], ids=str)
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"nvfp4.quantize: x must be \[..., N, K\] with K a positive multiple of 16"):
        nvfp4.quantize(torch.zeros(shape))


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-36, 1e36, torch.nan, torch.inf])
def test_tensor_scales_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match="nvfp4.quantize: tensor_scale must be in"):
        nvfp4.quantize(torch.ones(2, 16), tensor_scale=torch.tensor(value))


def test_tensor_scales_of_other_shapes_or_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"tensor_scale must be \[\] or \[\]; got \[2\]"):
        nvfp4.quantize(torch.ones(2, 16), tensor_scale=torch.ones(2))
    with pytest.raises(ValueError, match=r"tensor_scale must be \[\] or \[2\]; got \[3\]"):
        nvfp4.quantize(torch.ones(2, 16), tensor_scale=torch.ones(3), scale_per="row")
    with pytest.raises(TypeError, match="tensor_scale must be fp32"):
        nvfp4.quantize(torch.ones(2, 16), tensor_scale=torch.ones((), dtype=torch.bfloat16))


def test_other_scale_per_is_refused():
    with pytest.raises(ValueError, match="scale_per must be 'tensor' or 'row'"):
        nvfp4.quantize(torch.ones(2, 16), scale_per="column")
    t = nvfp4.quantize(torch.ones(2, 16))
    with pytest.raises(ValueError, match="scale_per must be 'tensor' or 'row'"):
        NvFp4Tensor(t.codes, t.scales, t.tensor_scale, scale_per="column")


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
def test_dequantize_refuses_tensor_scales_that_are_no_scale(value):
    t = from_bytes(torch.zeros(1, 16), [[0x38]], value)
    with pytest.raises(ValueError, match="nvfp4.dequantize: tensor_scale must be finite and not negative"):
        nvfp4.dequantize(t)


def test_dtypes_are_refused_by_name():
    t = nvfp4.quantize(torch.ones(2, 32))
    with pytest.raises(TypeError, match="NvFp4Tensor: codes must be uint8"):
        NvFp4Tensor(t.codes.view(torch.int8), t.scales, t.tensor_scale)
    with pytest.raises(TypeError, match="NvFp4Tensor: scales must be float8_e4m3fn; got torch.uint8"):
        NvFp4Tensor(t.codes, t.scales.view(torch.uint8), t.tensor_scale)
    with pytest.raises(TypeError, match="E8M0 scales belong in MxFp4Tensor"):
        NvFp4Tensor(t.codes, t.scales.view(torch.float8_e8m0fnu), t.tensor_scale)
    with pytest.raises(TypeError, match="NvFp4Tensor: tensor_scale must be fp32"):
        NvFp4Tensor(t.codes, t.scales, t.tensor_scale.bfloat16())
    with pytest.raises(TypeError, match="nvfp4.dequantize: dtype must be fp32, bf16 or fp16"):
        nvfp4.dequantize(t, torch.float64)
    with pytest.raises(TypeError, match="nvfp4.quantize: x must be fp32, bf16 or fp16"):
        nvfp4.quantize(torch.ones(2, 32, dtype=torch.float64))


def test_transposed_scales_are_refused():
    """F4: (K/16, N) fed where (N, K/16) is meant."""
    t = nvfp4.quantize(torch.ones(3, 128, 64))
    with pytest.raises(ValueError, match=r"\[..., N, K/16\] = \[3, 128, 4\].*got \[3, 4, 128\].*transposed"):
        NvFp4Tensor(t.codes, t.scales.transpose(1, 2), t.tensor_scale)


def test_n_major_codes_are_refused():
    """F5: codes packed along N, [K, N/2], with scales [N, K/16]."""
    t = nvfp4.quantize(torch.ones(128, 64))
    n_major = e2m1.pack(e2m1.unpack(t.codes).T.contiguous())
    with pytest.raises(ValueError, match=r"codes \[64, 64\]; got \[128, 4\]. The codes are N-major"):
        NvFp4Tensor(n_major, t.scales, t.tensor_scale)


def test_other_scale_shapes_are_refused():
    t = nvfp4.quantize(torch.ones(128, 64))
    with pytest.raises(ValueError, match="Check that codes and scales come from the same tensor"):
        NvFp4Tensor(t.codes, t.scales[:100], t.tensor_scale)
    with pytest.raises(ValueError, match=r"tiled_128x4 scales must be .* = \[512\].*got \[128, 4\]"):
        NvFp4Tensor(t.codes, t.scales, t.tensor_scale, ScaleLayout.TILED_128X4)
    with pytest.raises(ValueError, match=r"row_major scales must be .*got \[512\]"):
        NvFp4Tensor(t.codes, t.tiled().scales, t.tensor_scale)


@pytest.mark.parametrize("shape", [(8,), (2, 0), (2, 7)], ids=str)
def test_other_code_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="NvFp4Tensor: codes must be"):
        NvFp4Tensor(torch.zeros(shape, dtype=torch.uint8), torch.zeros(2, 1).to(torch.float8_e4m3fn), torch.ones(()))


def test_tensor_scale_shape_is_refused():
    t = nvfp4.quantize(torch.ones(3, 2, 32))
    with pytest.raises(ValueError, match=r"tensor_scale with scale_per='tensor' must be \[3\].*got \[\]"):
        NvFp4Tensor(t.codes, t.scales, torch.ones(()))
    with pytest.raises(ValueError, match=r"tensor_scale with scale_per='row' must be \[3, 2\].*got \[3\]"):
        NvFp4Tensor(t.codes, t.scales, t.tensor_scale, scale_per="row")


def test_parts_on_different_devices_are_refused():
    t = nvfp4.quantize(torch.ones(2, 32))
    with pytest.raises(ValueError, match="NvFp4Tensor: all parts must be on one device; got"):
        NvFp4Tensor(t.codes, t.scales.to("meta"), t.tensor_scale)


def test_indexing_without_a_leading_dimension_is_refused():
    with pytest.raises(ValueError, match="selects along a leading dimension before"):
        nvfp4.quantize(torch.ones(2, 32))[0]
