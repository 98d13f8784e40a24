# SPDX-License-Identifier: Apache-2.0
"""Pick the operation for a weight from the format it is stored in and from the recipe, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megamoe.formats.fp8 import Fp8BlockTensor, Fp8RowTensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.models.deepseek_v4.stacked import LinearWeight
from megamoe.models.deepseek_v4.weights import MoeWeights
from megamoe.models.recipe import NvFp4Arithmetic, Recipe
from megamoe.ops.experts import experts
from megamoe.ops.fp8_experts import fp8_experts
from megamoe.ops.fp8_linear import fp8_linear
from megamoe.ops.grouped_linear import (
    fp8_grouped_linear,
    grouped_linear,
    nvfp4_grouped_linear,
    nvfp4_weight_only_grouped_linear,
)
from megamoe.ops.linear import linear
from megamoe.ops.nvfp4_experts import nvfp4_experts
from megamoe.ops.nvfp4_linear import nvfp4_linear
from megamoe.ops.nvfp4_weight_only_experts import nvfp4_weight_only_experts
from megamoe.ops.nvfp4_weight_only_linear import nvfp4_weight_only_linear
from megamoe.ops.quantize import quantize_fp8_rows, quantize_nvfp4


class LinearInput:
    """Activations [T, K] on their way into one or more linears, quantized at most once per format.

    Args:
        x: [T, K] in the recipe's activation dtype.
        recipe: decides what NVFP4 weights are multiplied by.
    """

    def __init__(self, x: torch.Tensor, recipe: Recipe) -> None:
        """Keep `x`; nothing is quantized until a weight asks for it."""
        self.x = x
        self._w4a4 = recipe.nvfp4_arithmetic is NvFp4Arithmetic.NVFP4_ACTIVATIONS
        self._nvfp4: NvFp4Tensor | None = None
        self._fp8: Fp8RowTensor | None = None

    def times(self, w: LinearWeight) -> torch.Tensor:
        """Return x @ w.T as [T, N] in the dtype of x, by the operation of w's format."""
        if isinstance(w, NvFp4Tensor):
            if not self._w4a4:
                return nvfp4_weight_only_linear(self.x, w)
            if self._nvfp4 is None:
                self._nvfp4 = quantize_nvfp4(self.x)
            return nvfp4_linear(self._nvfp4, w, out_dtype=self.x.dtype)
        if isinstance(w, Fp8BlockTensor):
            if self._fp8 is None:
                self._fp8 = quantize_fp8_rows(self.x)
            return fp8_linear(self._fp8, w, out_dtype=self.x.dtype)
        return linear(self.x, w)


def grouped(x: torch.Tensor, w: LinearWeight, recipe: Recipe) -> torch.Tensor:
    """Multiply [T, G, K] by one weight per group [G, N, K]; returns [T, G, N] in the dtype of x."""
    if isinstance(w, Fp8BlockTensor):
        return fp8_grouped_linear(quantize_fp8_rows(x), w, out_dtype=x.dtype)
    if not isinstance(w, NvFp4Tensor):
        return grouped_linear(x, w)
    if recipe.nvfp4_arithmetic is NvFp4Arithmetic.NVFP4_ACTIVATIONS:
        return nvfp4_grouped_linear(quantize_nvfp4(x), w, out_dtype=x.dtype)
    return nvfp4_weight_only_grouped_linear(x, w)


def experts_op(weights: MoeWeights, recipe: Recipe) -> Callable[..., torch.Tensor]:
    """Return the routed-experts operation for the format the experts are stored in."""
    if isinstance(weights.w1, NvFp4Tensor):
        w4a4 = recipe.nvfp4_arithmetic is NvFp4Arithmetic.NVFP4_ACTIVATIONS
        return nvfp4_experts if w4a4 else nvfp4_weight_only_experts
    return fp8_experts if isinstance(weights.w1, Fp8BlockTensor) else experts
