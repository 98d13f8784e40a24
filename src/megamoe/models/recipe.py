# SPDX-License-Identifier: Apache-2.0
"""Recipes: the one place that fixes every numeric choice of a forward pass.

A recipe is frozen and printed with every result. It names the arithmetic of NVFP4 weights, the dtype between
operations, the format of a KV row, the dtype that attention multiplies and the format of an index key. Nothing below
the model may change any of it, and the hardware never does: a device without a kernel for an operation is an error,
not another recipe.

    exact    weights dequantized as stored, fp32 everywhere, nothing quantized on the way: the oracle
    w4a16    NVFP4 weights times bf16 activations; FP8 KV rows, multiplied as fp16 by fp16 queries and softmax weights;
             FP4 index queries and keys after a Hadamard rotation
    w4a4     as w4a16, but the inputs of NVFP4 weights are NVFP4 too (one dynamic tensor scale per token)

Weights that are not stored as NVFP4 use the operation of their own format in both quantized recipes: bf16 weights a
plain linear, FP8 128x128 weights an FP8 linear with 1x128 activations.
"""

from __future__ import annotations

import dataclasses
import enum

import torch

from megamoe.formats.cache_rows import RowFormat


class NvFp4Arithmetic(enum.Enum):
    """What an NVFP4 weight is multiplied by."""

    WEIGHT_ONLY = "weight_only"  # W4A16
    NVFP4_ACTIVATIONS = "nvfp4_activations"  # W4A4


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Every numeric choice of a forward pass.

    Attributes:
        name: what users type and what records store.
        activation_dtype: dtype of the residual streams and of what operations hand to each other.
        dequantize_weights: True turns every weight into a plain tensor of `activation_dtype` when loading.
        nvfp4_arithmetic: what NVFP4 weights are multiplied by (unused when weights are dequantized).
        kv_row_format: how window and compressed latents are stored.
        attention_operand_dtype: what queries and softmax weights are rounded to before they multiply those rows.
        index_key_format: how index keys are stored, and index queries rounded.
        index_hadamard: rotate index queries and keys by a Hadamard matrix before they are quantized.
    """

    name: str
    activation_dtype: torch.dtype
    dequantize_weights: bool
    nvfp4_arithmetic: NvFp4Arithmetic
    kv_row_format: RowFormat
    attention_operand_dtype: torch.dtype
    index_key_format: RowFormat
    index_hadamard: bool

    def __str__(self) -> str:
        """Return one printable line with every choice."""
        weights = "dequantized" if self.dequantize_weights else f"nvfp4 {self.nvfp4_arithmetic.value}"
        return (
            f"{self.name}: weights {weights}, activations {_name(self.activation_dtype)}, "
            f"kv rows {self.kv_row_format.value}, attention {_name(self.attention_operand_dtype)}, "
            f"index keys {self.index_key_format.value}"
            f"{' after hadamard' if self.index_hadamard else ''}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "exact",
            torch.float32,
            True,
            NvFp4Arithmetic.WEIGHT_ONLY,
            RowFormat.FP32,
            torch.float32,
            RowFormat.FP32,
            False,
        ),
        Recipe(
            "w4a16",
            torch.bfloat16,
            False,
            NvFp4Arithmetic.WEIGHT_ONLY,
            RowFormat.FP8_ROPE_BF16,
            torch.float16,
            RowFormat.INDEX_FP4,
            True,
        ),
        Recipe(
            "w4a4",
            torch.bfloat16,
            False,
            NvFp4Arithmetic.NVFP4_ACTIVATIONS,
            RowFormat.FP8_ROPE_BF16,
            torch.float16,
            RowFormat.INDEX_FP4,
            True,
        ),
    )
}


def get_recipe(name: str) -> Recipe:
    """Return the recipe called `name`.

    Raises:
        ValueError: there is no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: unknown recipe {name!r}; allowed are {', '.join(RECIPES)}.")
    return RECIPES[name]
