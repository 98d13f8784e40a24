# SPDX-License-Identifier: Apache-2.0
"""Weights that multiply the same input, laid one under the other, so that one launch multiplies by all of them.

A stack owns the memory; its parts become views of it, so that a model takes no more than before and everything that
looks for wq_a or wkv finds it by its name.

Numerics   a stack has the values of its parts, and its linear gives the columns of every part as the part alone does,
           bit for bit: on one thread always, on more where K is a power of two or a multiple of 512, as it is in every
           released model. (With other K, a BLAS splits the sum over k between threads by the number of columns.)
           NVFP4 matrices were quantized under different tensor scales; their stack has one per row, and none is folded
           into another.
Refused    formats, dtypes, layouts or K that differ; FP8 blocks of 128 rows that would lie across two parts; rows that
           are no multiple of 4, whose columns a BLAS treats as a special case. Such weights stay two calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from megamoe.formats import fp8
from megamoe.formats.fp8 import Fp8BlockTensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_layout import ScaleLayout

LinearWeight = torch.Tensor | Fp8BlockTensor | NvFp4Tensor

ROW_MULTIPLE = 4


def stack_rows(parts: Sequence[LinearWeight]) -> LinearWeight | None:
    """Return weights [N1, K], [N2, K], ... as one [N1 + N2 + ..., K], newly allocated, or None where they do not fit.

    Args:
        parts: at least one; of the same format, layout and K. NVFP4 with one tensor scale each; FP8 with rows in
            multiples of 128 in all but the last.
    """
    first = parts[0]
    if len({(type(part), part.shape[1:], part.device) for part in parts}) > 1 or first.ndim != 2:
        return None
    if any(part.shape[0] % ROW_MULTIPLE for part in parts[:-1]):
        return None
    if isinstance(first, NvFp4Tensor):
        return _stack_nvfp4([part for part in parts if isinstance(part, NvFp4Tensor)])
    if isinstance(first, Fp8BlockTensor):
        return _stack_fp8([part for part in parts if isinstance(part, Fp8BlockTensor)])
    plain = [part for part in parts if isinstance(part, torch.Tensor)]
    return torch.cat(plain) if len({part.dtype for part in plain}) == 1 else None


def _stack_nvfp4(parts: list[NvFp4Tensor]) -> NvFp4Tensor | None:
    first = parts[0]
    layouts = {(part.scale_layout, part.code_layout, part.scale_per) for part in parts}
    if len(layouts) > 1 or first.scale_layout is ScaleLayout.TILED_128X4 or first.scale_per != "tensor":
        return None
    return dataclasses.replace(
        first,  # fragments are tiles of whole rows, row by row: they stack as rows do
        codes=torch.cat([part.codes for part in parts]),
        scales=_joined([part.scales for part in parts]),
        tensor_scale=torch.cat([part.tensor_scale.expand(part.shape[0]) for part in parts]),
        scale_per="row",
    )


def _stack_fp8(parts: list[Fp8BlockTensor]) -> Fp8BlockTensor | None:
    if len({part.scales.dtype for part in parts}) > 1 or any(part.shape[0] % fp8.BLOCK for part in parts[:-1]):
        return None
    return Fp8BlockTensor(_joined([part.codes for part in parts]), _joined([part.scales for part in parts]))


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate by bytes: not every device concatenates FP8."""
    dtype = tensors[0].dtype
    if dtype.itemsize > 1:
        return torch.cat(tensors)
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(dtype)


def rows_of(stack: LinearWeight, sizes: Sequence[int]) -> tuple[LinearWeight, ...]:
    """Return the parts of a stack as views of it.

    Args:
        stack: from `stack_rows`.
        sizes: rows of each part, in order.
    """
    parts: list[LinearWeight] = []
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        if isinstance(stack, NvFp4Tensor):
            part: LinearWeight = dataclasses.replace(
                stack,
                codes=stack.codes[rows],
                scales=stack.scales[rows],
                tensor_scale=stack.tensor_scale[start],
                scale_per="tensor",
            )
        elif isinstance(stack, Fp8BlockTensor):
            blocks = slice(start // fp8.BLOCK, -(-(start + size) // fp8.BLOCK))
            part = Fp8BlockTensor(stack.codes[rows], stack.scales[blocks])
        else:
            part = stack[rows]
        parts.append(part)
        start += size
    return tuple(parts)
