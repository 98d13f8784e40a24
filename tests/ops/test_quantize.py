# SPDX-License-Identifier: Apache-2.0
"""quantize: codes by hand, one scale per token, and the polarity of a checkpoint's input_scale (fault F3)."""

from __future__ import annotations

import pytest
import torch

from megamoe.formats import fp8, mxfp4, nvfp4
from megamoe.formats.e2m1 import unpack
from megamoe.formats.scale_layout import ScaleLayout
from megamoe.ops.quantize import quantize_fp8_rows, quantize_mxfp4, quantize_nvfp4

from .invariance import assert_row_invariant

# --- known answers ---


def test_nvfp4_codes_by_hand() -> None:
    """The row's amax 2688 makes the tensor scale 1 and the block scale 448: codes are x / 448 rounded to E2M1."""
    steps = [6.0, -0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 0.26, -0.24, 5.01, 4.0, -6.0, 1.0]
    x = torch.tensor([steps]) * 448
    q = quantize_nvfp4(x)
    assert q.tensor_scale.tolist() == [1.0] and q.scale_per == "row"
    assert q.scales.float().tolist() == [[448.0]]
    values = [6.0, -0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0, 0.5, -0.0, 6.0, 4.0, -6.0, 1.0]
    assert nvfp4.dequantize(q).div(448).tolist() == [values]
    assert unpack(q.codes)[0, :2].tolist() == [7, 8]  # 6 and -0, the sign of zero is kept


@pytest.mark.parametrize("num_tokens", [0, 1, 127, 128, 129])
@pytest.mark.parametrize("width", [64, 80])
def test_tiled_scales_are_the_row_major_ones_in_another_order(num_tokens: int, width: int, seed: int) -> None:
    x = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed)).bfloat16()
    plain, tiled = quantize_nvfp4(x), quantize_nvfp4(x, scale_layout=ScaleLayout.TILED_128X4)
    assert tiled.scale_layout is ScaleLayout.TILED_128X4 and torch.equal(tiled.codes, plain.codes)
    back = tiled.row_major().scales
    assert torch.equal(back.view(torch.uint8), plain.scales.view(torch.uint8))


def test_nvfp4_takes_one_scale_per_token_and_none_from_its_neighbours() -> None:
    x = torch.stack((torch.full((16,), 2688.0), torch.full((16,), 26.88), torch.zeros(16)))
    q = quantize_nvfp4(x)
    torch.testing.assert_close(q.tensor_scale, torch.tensor([1.0, 0.01, 1e-12 / 2688]))
    torch.testing.assert_close(nvfp4.dequantize(q), x)


def test_fp8_rows_by_hand() -> None:
    x = torch.cat((torch.full((1, 128), 448.0), torch.full((1, 128), 449.0)), -1)
    q = quantize_fp8_rows(x)
    assert q.scales.float().tolist() == [[1.0, 2.0]]
    assert fp8.dequantize(q)[0, [0, 128]].tolist() == [448.0, 448.0]  # 224.5 is nearer to 224 than to 240


def test_mxfp4_by_hand() -> None:
    x = torch.cat((torch.full((1, 32), 6.0), torch.full((1, 32), 6.5)), -1)
    q = quantize_mxfp4(x)
    assert q.scales.float().tolist() == [[1.0, 2.0]]
    assert mxfp4.dequantize(q)[0, [0, 32]].tolist() == [6.0, 6.0]  # 3.25 rounds to 3


@pytest.mark.parametrize("shape", [(0, 32), (1, 32), (3, 2, 64)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).bfloat16()
    assert tuple(quantize_nvfp4(x).shape) == shape
    assert tuple(quantize_nvfp4(x).tensor_scale.shape) == shape[:-1]
    assert tuple(quantize_fp8_rows(x).shape) == shape
    assert tuple(quantize_mxfp4(x).shape) == shape


# --- properties ---


def test_row_invariant(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(50, 128, generator=generator) * torch.logspace(-3, 3, 50)[:, None]).bfloat16()

    def all_formats(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b, c = quantize_nvfp4(rows), quantize_fp8_rows(rows), quantize_mxfp4(rows)
        bits = (torch.uint8,)
        return (
            *(a.codes, a.scales.view(*bits), a.tensor_scale),
            *(b.codes.view(*bits), b.scales.view(*bits)),
            *(c.codes, c.scales.view(*bits)),
        )

    assert_row_invariant(all_formats, x)


def test_a_given_tensor_scale_is_used_for_all_tokens(seed: int) -> None:
    x = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(seed))
    scale = torch.tensor(5.0 / 2688)
    q = quantize_nvfp4(x, tensor_scale=scale)
    assert q.scale_per == "tensor" and torch.equal(q.tensor_scale, scale.expand(3))
    assert float((nvfp4.dequantize(q) - x).norm() / x.norm()) < 0.12
    assert float(nvfp4.dequantize(quantize_nvfp4(x * 100, tensor_scale=scale)).abs().max()) == pytest.approx(5.0)


# --- fault F3: input_scale is amax / 2688 and multiplies; some consumers want its reciprocal ---


def _round_trip_error(x: torch.Tensor, quantize_with: torch.Tensor, dequantize_with: torch.Tensor) -> float:
    q = quantize_nvfp4(x, tensor_scale=quantize_with)
    y = nvfp4.dequantize(nvfp4.NvFp4Tensor(q.codes, q.scales, dequantize_with))
    return float((y - x).norm() / x.norm())


def test_the_reciprocal_of_an_input_scale_is_caught(seed: int) -> None:
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(seed))
    input_scale = x.abs().max() / 2688
    right = _round_trip_error(x, input_scale, input_scale)
    assert right < 0.12
    # The reciprocal on one side is a gain of 1 / scale^2, on both sides it drives every block scale into its floor.
    assert _round_trip_error(x, input_scale, 1 / input_scale) > 1e4
    assert _round_trip_error(x, 1 / input_scale, input_scale) > 0.9
    assert _round_trip_error(x, 1 / input_scale, 1 / input_scale) > 2 * right


def test_block_scales_use_the_whole_e4m3_range_when_the_polarity_is_right(seed: int) -> None:
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(seed))
    input_scale = x.abs().max() / 2688
    assert float(quantize_nvfp4(x, tensor_scale=input_scale).scales.float().max()) == 448.0
    assert float(quantize_nvfp4(x, tensor_scale=1 / input_scale).scales.float().max()) < 0.01


# --- refusals ---


def test_refusals() -> None:
    with pytest.raises(ValueError, match="K a positive multiple of 16; got .*2, 24"):
        quantize_nvfp4(torch.zeros(2, 24))
    with pytest.raises(ValueError, match=r"quantize_nvfp4: x must be \[\.\.\., T, K\]; got float32 \[16\]"):
        quantize_nvfp4(torch.zeros(16))
    with pytest.raises(ValueError, match=r"quantize_nvfp4: tensor_scale must be \[\].*; got float32 \[2\]"):
        quantize_nvfp4(torch.zeros(2, 16), tensor_scale=torch.ones(2))
    with pytest.raises(ValueError, match="tensor_scale must be in .* not the reciprocal"):
        quantize_nvfp4(torch.zeros(2, 16), tensor_scale=torch.tensor(-1.0))
    with pytest.raises(TypeError, match="quantize_nvfp4: x must be bfloat16 or float32; got float16"):
        quantize_nvfp4(torch.zeros(2, 16, dtype=torch.float16))
    with pytest.raises(ValueError, match="must be finite"):
        quantize_nvfp4(torch.full((2, 16), float("nan")))
    with pytest.raises(ValueError, match="must be finite"):
        quantize_fp8_rows(torch.full((2, 16), float("inf")))
    with pytest.raises(ValueError, match="32"):
        quantize_mxfp4(torch.zeros(2, 48))
    with pytest.raises(ValueError, match="group must be positive; got 0"):
        quantize_fp8_rows(torch.zeros(2, 16), group=0)
