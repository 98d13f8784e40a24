# SPDX-License-Identifier: Apache-2.0
"""Block scales chosen by maximum, by squared error, and by four over six."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamoe.formats import nvfp4, scale_search
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_search import ScaleSearch, quantize_weights

SEARCHES = list(ScaleSearch)


def error_of(source: Tensor, made: NvFp4Tensor) -> Tensor:
    """Squared error of each block."""
    return (nvfp4.dequantize(made) - source.float()).view(source.shape[0], -1, 16).square().sum(-1)


def weights(seed: int, *shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 0.03 for shape in shapes]


# known answers


def test_four_over_six_takes_four_where_five_sixths_would_be_lost():
    # Largest value 6, three at 5: a scale to 6 rounds 5 to 4 (a tie to even); a scale to 4 (step 1.5) holds
    # 5 / 1.5 = 3.33 -> 3, which is 4.5.
    five = torch.tensor([[6.0, 5.0, 5.0, 5.0] + [0.0] * 12 + [6.0, 4.0, 3.0, 2.0] + [0.0] * 12])
    made = quantize_weights([five], ScaleSearch.FOUR_OVER_SIX)[0]
    scales = made.scales.float()[0] * made.tensor_scale
    assert scales.tolist() == [1.5, 1.0]
    assert nvfp4.dequantize(made)[0, :4].tolist() == [6.0, 4.5, 4.5, 4.5]
    assert nvfp4.dequantize(made)[0, 16:20].tolist() == [6.0, 4.0, 3.0, 2.0]


def test_four_over_six_never_saturates_the_block_scale():
    # The block with the largest value of the weight gets 256 for six and 384 for four: both are E4M3 numbers.
    for block in ([6.0] + [5.0] * 15, [6.0] + [4.0] * 15):
        made = quantize_weights([torch.tensor([block])], ScaleSearch.FOUR_OVER_SIX)[0]
        assert float(made.scales.float()) == (384.0 if block[1] == 5.0 else 256.0)


def test_max_is_nvfp4_quantize(seed):
    for weight in weights(seed, (5, 64), (300, 4096)):
        made, expected = quantize_weights([weight], ScaleSearch.MAX)[0], nvfp4.quantize(weight)
        assert torch.equal(made.codes, expected.codes) and torch.equal(made.tensor_scale, expected.tensor_scale)
        assert torch.equal(made.scales.view(torch.uint8), expected.scales.view(torch.uint8))


@pytest.mark.parametrize("search", SEARCHES)
def test_zeros_and_exact_values(search):
    made = quantize_weights([torch.zeros(3, 32)], search)[0]
    assert not nvfp4.dequantize(made).any()
    grid = torch.tensor([[0.5, -1.0, 1.5, -2.0, 3.0, -4.0, 6.0, 0.0] * 2])
    made = quantize_weights([grid], search)[0]
    assert torch.allclose(nvfp4.dequantize(made), grid, rtol=1e-6)  # 6 / 2688 is not a power of two


# properties


@pytest.mark.parametrize("search", SEARCHES)
def test_one_tensor_scale_for_gate_and_up(seed, search):
    small, large = weights(seed, (16, 64), (16, 64))
    large = large * 8
    made = quantize_weights([small, large], search)
    assert torch.equal(made[0].tensor_scale, made[1].tensor_scale)
    amax = float(large.abs().amax())
    divisor = 6 * 256 if search is ScaleSearch.FOUR_OVER_SIX else 2688
    assert float(made[0].tensor_scale) == pytest.approx(amax / divisor, rel=0.1)
    alone = quantize_weights([small], search)[0]
    assert float(alone.tensor_scale) < float(made[0].tensor_scale)


@pytest.mark.parametrize("search", [ScaleSearch.MSE, ScaleSearch.FOUR_OVER_SIX])
def test_search_pays(seed, search):
    weight = weights(seed, (64, 512))[0]
    plain, searched = (
        float(error_of(weight, quantize_weights([weight], one)[0]).sum()) for one in (ScaleSearch.MAX, search)
    )
    assert searched < (0.8 if search is ScaleSearch.MSE else 0.9) * plain


def test_mse_is_never_worse_than_max(seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in (
        torch.randn(8, 32, generator=generator),
        torch.zeros(8, 32),
        torch.eye(32),
        torch.ones(4, 16) * 1e-30,
    ):
        errors = [
            float(error_of(weight, quantize_weights([weight], one)[0]).sum())
            for one in (ScaleSearch.MAX, ScaleSearch.MSE)
        ]
        assert errors[1] <= errors[0]


def test_four_over_six_takes_the_better_of_its_two_scales_in_every_block(seed):
    weight = weights(seed, (32, 256))[0]
    made = quantize_weights([weight], ScaleSearch.FOUR_OVER_SIX)[0]
    blocks = weight.view(32, -1, 16)
    best = torch.full(blocks.shape[:-1], torch.inf)
    for largest in (6.0, 4.0):
        scale = (blocks.abs().amax(-1) / (largest * made.tensor_scale)).to(
            torch.float8_e4m3fn
        ).float() * made.tensor_scale
        rounded = nvfp4.dequantize(
            NvFp4Tensor(
                torch.stack([encode(blocks[..., i] / scale) for i in range(16)], -1).view(32, -1, 2)[..., 0]
                | torch.stack([encode(blocks[..., i] / scale) for i in range(16)], -1).view(32, -1, 2)[..., 1] << 4,
                (scale / made.tensor_scale).to(torch.float8_e4m3fn),
                made.tensor_scale,
            )
        )
        best = torch.minimum(best, (rounded - weight).view(32, -1, 16).square().sum(-1))
    assert torch.allclose(error_of(weight, made), best, rtol=1e-5)


def encode(x: Tensor) -> Tensor:
    from megamoe.formats.e2m1 import encode_e2m1

    return encode_e2m1(x)


@pytest.mark.parametrize("search", SEARCHES)
def test_the_result_does_not_depend_on_chunks_or_on_the_dtype(seed, search, monkeypatch):
    weight = weights(seed, (37, 64))[0].bfloat16()
    whole = quantize_weights([weight], search)[0]
    monkeypatch.setattr(scale_search, "_CHUNK_VALUES", 64 * 5)
    parts = quantize_weights([weight.float()], search)[0]
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.tensor_scale, parts.tensor_scale)
    assert torch.equal(whole.scales.view(torch.uint8), parts.scales.view(torch.uint8))


# refusals


def test_refusals():
    with pytest.raises(ValueError, match="at least one weight"):
        quantize_weights([], ScaleSearch.MAX)
    with pytest.raises(ValueError, match=r"multiple of 16; got \[2, 24\]"):
        quantize_weights([torch.zeros(2, 24)], ScaleSearch.MSE)
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="x must be finite"):
            quantize_weights([torch.full((1, 16), value)], ScaleSearch.FOUR_OVER_SIX)
    with pytest.raises(TypeError, match="fp32, bf16 or fp16"):
        quantize_weights([torch.zeros(1, 16, dtype=torch.float64)], ScaleSearch.MAX)
