# SPDX-License-Identifier: Apache-2.0
"""Stacked weights: the bits of every part are those of the part alone, in every format, and the memory is one."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from megamoe.formats import fp8, nvfp4
from megamoe.formats.fp8 import Fp8BlockTensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.models.deepseek_v4.linear import LinearInput
from megamoe.models.deepseek_v4.shapes import op_calls
from megamoe.models.deepseek_v4.stacked import LinearWeight, rows_of, stack_rows
from megamoe.models.recipe import get_recipe
from megamoe.ops.linear import linear

FORMATS = ["bf16", "fp32", "nvfp4", "nvfp4 fragments", "fp8 e8m0", "fp8 fp32"]
SIZES = [((16, 16), 64), ((128, 512), 256), ((256, 128), 128), ((128, 20), 64), ((128, 128, 4), 512)]


def weight(name: str, num_rows: int, width: int, generator: torch.Generator) -> LinearWeight:
    """A weight whose scales are its own: no two parts share a tensor scale."""
    size = float(torch.rand((), generator=generator)) + 0.25
    values = size * torch.randn(num_rows, width, generator=generator)
    if name.startswith("nvfp4"):
        quantized = nvfp4.quantize(values)
        return quantized.fragments() if name.endswith("fragments") else quantized
    if name.startswith("fp8"):
        dtype = torch.float8_e8m0fnu if name.endswith("e8m0") else torch.float32
        return fp8.quantize_blocks(values, scale_dtype=dtype)
    return values.bfloat16() if name == "bf16" else values


def fitting(name: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return sizes that the format can stack: whole fragments, whole blocks in all but the last."""
    if name.endswith("fragments"):
        return tuple(-(-size // 16) * 16 for size in sizes)
    if name.startswith("fp8"):
        return (*(-(-size // 128) * 128 for size in sizes[:-1]), sizes[-1])
    return sizes


def bytes_of(w: LinearWeight) -> tuple[torch.Tensor, ...]:
    """The tensors of a weight."""
    if isinstance(w, torch.Tensor):
        return (w,)
    return (w.codes, w.scales, w.tensor_scale) if isinstance(w, NvFp4Tensor) else (w.codes, w.scales)


def equal(one: LinearWeight, other: LinearWeight) -> bool:
    """Return whether two weights are the same bytes in the same format."""
    pairs = zip(bytes_of(one), bytes_of(other), strict=True)
    return type(one) is type(other) and all(
        a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        if a.ndim
        else torch.equal(a, b)
        for a, b in pairs
    )


# --- known answers ---


def test_two_tensor_scales_stay_two() -> None:
    """Fault F2: one tensor scale for both would make the second matrix a thousandth of what it is."""
    scales = torch.tensor(2.0**-6), torch.tensor(2.0**4)
    parts = [nvfp4.quantize(torch.full((16, 16), 6.0 * float(scale)), tensor_scale=scale) for scale in scales]
    stack = stack_rows(parts)
    assert isinstance(stack, NvFp4Tensor) and stack.scale_per == "row"
    assert stack.tensor_scale.tolist() == [2.0**-6] * 16 + [2.0**4] * 16
    values = nvfp4.dequantize(stack)
    assert values[:16].unique().tolist() == [6.0 * 2.0**-6] and values[16:].unique().tolist() == [6.0 * 2.0**4]


# --- properties ---


@pytest.mark.parametrize("recipe", ["w4a16", "w4a4"])
@pytest.mark.parametrize("sizes, width", SIZES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_part_has_the_bits_of_the_part_alone(
    name: str, sizes: tuple[int, ...], width: int, recipe: str, seed: int
) -> None:
    sizes = fitting(name, sizes)
    generator = torch.Generator().manual_seed(seed)
    parts = [weight(name, size, width, generator) for size in sizes]
    stack = stack_rows(parts)
    assert stack is not None and tuple(stack.shape) == (sum(sizes), width)
    x = torch.randn(9, width, generator=generator).bfloat16()
    for tokens in (x, x[:1], x[:0]):
        source = LinearInput(tokens, get_recipe(recipe))
        columns = source.times(stack).split(list(sizes), dim=1)
        for part, got in zip(parts, columns, strict=True):
            assert torch.equal(got, source.times(part))


@pytest.mark.parametrize("sizes, width", SIZES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_parts_are_views_with_the_same_bytes(name: str, sizes: tuple[int, ...], width: int, seed: int) -> None:
    sizes = fitting(name, sizes)
    generator = torch.Generator().manual_seed(seed)
    parts = [weight(name, size, width, generator) for size in sizes]
    stack = stack_rows(parts)
    assert stack is not None
    owned = {tensor.untyped_storage().data_ptr() for tensor in bytes_of(stack)}
    for part, view in zip(parts, rows_of(stack, sizes), strict=True):
        assert equal(part, view) and view.shape == part.shape
        assert {tensor.untyped_storage().data_ptr() for tensor in bytes_of(view)} <= owned
        if isinstance(part, NvFp4Tensor) and isinstance(view, NvFp4Tensor):
            assert torch.equal(nvfp4.dequantize(view), nvfp4.dequantize(part))


def test_compressors_and_head_weights_in_one_fp32_linear(seed: int) -> None:
    """The five plain matrices that an indexed layer multiplies its input by, at the bundled model's sizes."""
    sizes, width = [1024, 1024, 256, 256, 16], 256
    calls = {call.where: call.dims for call in op_calls("tiny") if call.op == "linear"}
    assert calls["attn.compressed (ratio 4)"] == {"N": sum(sizes), "K": width}
    generator = torch.Generator().manual_seed(seed)
    parts = [weight("bf16", size, width, generator) for size in sizes]
    stack = stack_rows(parts)
    x = torch.randn(3, width, generator=generator).bfloat16()
    assert isinstance(stack, torch.Tensor)
    for part, got in zip(parts, linear(x, stack, out_dtype=torch.float32).split(sizes, dim=1), strict=True):
        assert isinstance(part, torch.Tensor) and torch.equal(got, linear(x, part, out_dtype=torch.float32))


# --- refusals ---


def test_what_does_not_fit_is_not_stacked(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one_of_each = [weight(name, 128, 64, generator) for name in FORMATS]
    for one, other in itertools.permutations(one_of_each, 2):
        assert stack_rows([one, other]) is None
    for name in FORMATS:
        assert stack_rows([weight(name, 128, 64, generator), weight(name, 128, 128, generator)]) is None
    for name in ("bf16", "nvfp4", "fp8 e8m0"):
        assert stack_rows([weight(name, 130, 64, generator), weight(name, 128, 64, generator)]) is None
    assert stack_rows([weight("fp8 e8m0", 64, 64, generator), weight("fp8 e8m0", 128, 64, generator)]) is None
    quantized = weight("nvfp4", 128, 64, generator)
    assert isinstance(quantized, NvFp4Tensor) and stack_rows([quantized.tiled(), quantized.tiled()]) is None
    rows = dataclasses.replace(quantized, tensor_scale=quantized.tensor_scale.expand(128), scale_per="row")
    assert stack_rows([rows, rows]) is None
    experts = Fp8BlockTensor(torch.zeros(2, 128, 64).to(torch.float8_e4m3fn), torch.ones(2, 1, 1))
    assert stack_rows([experts, experts]) is None
