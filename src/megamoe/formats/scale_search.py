# SPDX-License-Identifier: Apache-2.0
"""NVFP4 block scales chosen for a weight: by its largest values, or by the squared error they leave.

max            block scale = e4m3(amax_16 / (6 g)), tensor scale g = amax / 2688: `nvfp4.quantize`
mse            for each block the best of ten neighbouring E4M3 scales, for the weight the best of four tensor scales,
               by squared error
four-over-six  for each block the better of two scales, the one that puts its largest value at 6 and the one that puts
               it at 4, by squared error; g = amax / (6 * 256), so that the larger of the two still fits E4M3. E2M1 has
               nothing between 4 and 6: values near 5/6 of the largest are the ones a scale to 4 rounds better.

Weights given together (gate and up) get one tensor scale in common. Every choice depends on the weights alone and not
on how the work is divided.

Source     four-over-six: Cook et al., "Four Over Six", arXiv 2512.02010
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor

from megamoe.formats import e2m1, nvfp4
from megamoe.formats.division import divide
from megamoe.formats.e4m3 import E4M3_MAX, E4M3_MIN_SUBNORMAL, lookup_e4m3
from megamoe.formats.nvfp4 import AMAX_FLOOR, BLOCK, TENSOR_SCALE_DIVISOR, NvFp4Tensor

# E4M3 has eight steps to an octave: bytes -3..+6 reach from 0.7 to 1.7 times the scale that maps amax to 6, and four
# tensor scales divide one step.
_BYTE_STEPS = range(-3, 7)
_TENSOR_SCALE_FACTORS = (1.0, 33 / 32, 34 / 32, 35 / 32)
_FOUR_OVER_SIX_DIVISOR = 6.0 * 256.0
_CHUNK_VALUES = 1 << 18  # temporaries of a chunk stay in the processor's cache


class ScaleSearch(enum.Enum):
    """How block scales are chosen."""

    MAX = "max"
    MSE = "mse"
    FOUR_OVER_SIX = "four-over-six"


def quantize_weights(weights: Sequence[Tensor], search: ScaleSearch) -> list[NvFp4Tensor]:
    """Round weights to NVFP4 with one tensor scale in common.

    Args:
        weights: each [N, K] fp32, bf16 or fp16, finite; K a positive multiple of 16.
        search: how block scales are chosen.

    Returns:
        One NvFp4Tensor for each weight, row-major scales, newly allocated.

    Raises:
        TypeError: a weight is not fp32, bf16 or fp16.
        ValueError: no weight is given, a shape is not as above, or a weight holds a NaN or an infinity.
    """
    if not weights:
        raise ValueError("quantize_weights: needs at least one weight; got none.")
    for weight in weights:
        if weight.ndim != 2 or weight.shape[-1] == 0 or weight.shape[-1] % BLOCK:
            raise ValueError(
                f"quantize_weights: a weight must be [N, K] with K a positive multiple of 16; got "
                f"{list(weight.shape)}. Pad K with zeros."
            )
    amax = max(max(_amax(weight) for weight in weights), AMAX_FLOOR)
    divisor = _FOUR_OVER_SIX_DIVISOR if search is ScaleSearch.FOUR_OVER_SIX else TENSOR_SCALE_DIVISOR
    base = divide(torch.tensor(amax, dtype=torch.float32), divisor)
    if search is not ScaleSearch.MSE:
        return [_quantize(weight, base, search)[0] for weight in weights]
    best: list[NvFp4Tensor] = []
    best_error = torch.inf
    for factor in _TENSOR_SCALE_FACTORS:
        results = [_quantize(weight, base * factor, search) for weight in weights]
        error = sum(one for _, one in results)
        if error < best_error or not best:
            best, best_error = [quantized for quantized, _ in results], error
    return best


def _amax(weight: Tensor) -> float:
    """Return the largest magnitude, refusing NaN and infinity."""
    if weight.numel() == 0:
        return 0.0
    low, high = torch.aminmax(weight)
    amax = torch.maximum(-low, high).float()
    e2m1.refuse_non_finite_amax("quantize_weights", amax)
    return float(amax)


def _quantize(weight: Tensor, tensor_scale: Tensor, search: ScaleSearch) -> tuple[NvFp4Tensor, float]:
    """Quantize under a given tensor scale; returns the weight and (except for max) its squared error."""
    num_rows, num_columns = weight.shape
    codes = torch.empty((num_rows, num_columns // 2), dtype=torch.uint8)
    scales = torch.empty((num_rows, num_columns // BLOCK), dtype=torch.float8_e4m3fn)
    chunk_rows = max(1, _CHUNK_VALUES // num_columns)
    error = 0.0
    for start in range(0, num_rows, chunk_rows):
        rows = slice(start, start + chunk_rows)
        values = e2m1.as_float32("quantize_weights", weight[rows])
        if search is ScaleSearch.MAX:
            quantized = nvfp4.quantize(values, tensor_scale=tensor_scale)
            codes[rows], scales[rows] = quantized.codes, quantized.scales
        else:
            packed, stored, squared = _search(values, tensor_scale, search)
            codes[rows], scales[rows] = packed, stored
            error += squared
    return NvFp4Tensor(codes, scales, tensor_scale), error


def _search(values: Tensor, tensor_scale: Tensor, search: ScaleSearch) -> tuple[Tensor, Tensor, float]:
    """Return packed codes, block scales and squared error of fp32 rows [N, K]."""
    blocks = values.view(values.shape[0], -1, BLOCK)  # [N, K/16, 16]
    to_six = blocks.abs().amax(-1) / (6.0 * tensor_scale)
    if search is ScaleSearch.FOUR_OVER_SIX:
        candidates = [_round_scales(to_six), _round_scales(to_six * 1.5)]
    else:
        first = _round_scales(to_six).view(torch.uint8).int()
        candidates = [(first + step).clamp_(1, 0x7E).to(torch.uint8).view(torch.float8_e4m3fn) for step in _BYTE_STEPS]
    best_error = torch.full(blocks.shape[:-1], torch.inf)
    best_codes = torch.zeros(blocks.shape, dtype=torch.uint8)
    best_scales = candidates[0].view(torch.uint8).clone()
    for candidate in candidates:
        steps = (lookup_e4m3(candidate) * tensor_scale)[..., None]
        codes = e2m1.round_to_e2m1(blocks / steps)
        error = e2m1.lookup_e2m1(codes).mul_(steps).sub_(blocks).square_().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, candidate.view(torch.uint8), best_scales)
        best_codes = torch.where(better[..., None], codes, best_codes)
    packed = e2m1.pack(best_codes.view(values.shape))
    return packed, best_scales.view(torch.float8_e4m3fn), float(best_error.double().sum())


def _round_scales(wanted: Tensor) -> Tensor:
    return wanted.clamp(E4M3_MIN_SUBNORMAL, E4M3_MAX).to(torch.float8_e4m3fn)
