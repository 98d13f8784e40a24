# SPDX-License-Identifier: Apache-2.0
"""NVFP4 decoded without the package's decoder, and NVFP4 weights damaged on purpose."""

from __future__ import annotations

import dataclasses

import torch

from megamoe.formats.nvfp4 import NvFp4Tensor

MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def decode(t: NvFp4Tensor) -> torch.Tensor:
    """Return the values in fp64: code * block scale * tensor scale, from row-major scales."""
    low, high = (t.codes & 15).long(), (t.codes >> 4).long()
    codes = torch.stack((low, high), -1).flatten(-2)
    values = torch.tensor(MAGNITUDES, dtype=torch.float64)[codes % 8] * torch.where(codes >= 8, -1.0, 1.0)
    scales = t.scales.float().double().repeat_interleave(16, -1)
    last = t.tensor_scale.double()[..., None] if t.scale_per == "row" else t.tensor_scale.double()[..., None, None]
    return values * scales * last


def folded(t: NvFp4Tensor) -> NvFp4Tensor:
    """Fault F1: multiply the tensor scale into the E4M3 block scales, and forget it."""
    scales = (t.scales.float() * t.tensor_scale[..., None, None]).to(torch.float8_e4m3fn)
    return dataclasses.replace(t, scales=scales, tensor_scale=torch.ones_like(t.tensor_scale))
