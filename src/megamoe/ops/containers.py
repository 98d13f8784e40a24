# SPDX-License-Identifier: Apache-2.0
"""Quantized containers as arguments of custom operators, which take tensors, strings and numbers alone."""

from __future__ import annotations

from typing import Any

import torch

from megamoe.formats.fp8 import Fp8BlockTensor, Fp8RowTensor
from megamoe.formats.fragment_layout import CodeLayout
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_layout import ScaleLayout


def packed(t: NvFp4Tensor) -> tuple[list[torch.Tensor], str]:
    """Return a container's tensors and the rest of it as a string."""
    form = f"{t.scale_layout.value} {t.scale_per} {t.code_layout.value}"
    return [t.codes, t.scales.view(torch.uint8), t.tensor_scale], form


def unpacked(tensors: list[torch.Tensor], form: str) -> NvFp4Tensor:
    """Undo packed."""
    codes, scales, tensor_scale = tensors
    scale_layout, scale_per, code_layout = form.split()
    per: Any = scale_per
    return NvFp4Tensor(
        codes, scales.view(torch.float8_e4m3fn), tensor_scale, ScaleLayout(scale_layout), per, CodeLayout(code_layout)
    )


def packed_fp8(t: Fp8RowTensor | Fp8BlockTensor) -> list[torch.Tensor]:
    """Return codes and scales, E4M3 and E8M0 as bytes."""
    scales = t.scales.view(torch.uint8) if t.scales.dtype == torch.float8_e8m0fnu else t.scales
    return [t.codes.view(torch.uint8), scales]


def unpacked_fp8(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo packed_fp8: return codes and scales."""
    codes, scales = tensors
    return codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales
