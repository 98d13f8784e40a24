# SPDX-License-Identifier: Apache-2.0
"""Formats against code that nobody of this project wrote. Each is skipped by name where its package is not installed.

docs/numerics.md, "Conventions of others", says where others differ and why.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from megamoe.formats import mxfp4, nvfp4
from megamoe.formats.e2m1 import decode_packed, pack
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_layout import to_tiled_128x4


def other(module: str) -> Any:
    """Import a module of another project, or skip the test and say which package is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        pytest.skip(f"{missing.name} is not installed; the dev extra has it")


def weight(seed: int = 0) -> torch.Tensor:
    """Return [128, 256] fp32 of bf16 values with heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(128, 256, generator=generator) * torch.randn(128, 1, generator=generator).exp()
    return x.bfloat16().float()


def all_mxfp4() -> tuple[torch.Tensor, torch.Tensor]:
    """Return [255, 512/2] codes that hold every byte and [255, 16] scales: a row a scale byte."""
    codes = torch.arange(256, dtype=torch.uint8).expand(255, 256).contiguous()
    return codes, torch.arange(255, dtype=torch.uint8)[:, None].expand(255, 16).contiguous()


def test_mxfp4_decodes_as_transformers_does() -> None:
    """Every byte of codes under every scale byte but 255: the same fp32 bits."""
    module = other("transformers.integrations.mxfp4")
    codes, scales = all_mxfp4()
    theirs = module.convert_moe_packed_tensors(codes.view(1, 255, 16, 16), scales.view(1, 255, 16), dtype=torch.float32)
    ours = mxfp4.dequantize(MxFp4Tensor(codes, scales.view(torch.float8_e8m0fnu)))
    assert torch.equal(ours.view(torch.int32), theirs[0].T.contiguous().view(torch.int32))


def test_mxfp4_decodes_as_torchao_does() -> None:
    """The same bytes; torchao multiplies in fp32, too."""
    module = other("torchao.prototype.mx_formats.mx_tensor")
    codes, scales = all_mxfp4()
    e8m0 = scales.view(torch.float8_e8m0fnu)
    theirs = module.to_dtype(codes, e8m0, torch.float4_e2m1fn_x2, 32, torch.float32)
    assert torch.equal(mxfp4.dequantize(MxFp4Tensor(codes, e8m0)), theirs)


@pytest.mark.parametrize("shape", [(1, 4), (128, 4), (129, 5), (256, 16), (300, 33)])
def test_scale_tiles_lie_as_torchao_lays_them(shape: tuple[int, int]) -> None:
    """Tiles of 128 x 4, padded rows and columns included."""
    module = other("torchao.prototype.mx_formats.utils")
    scales = torch.arange(shape[0] * shape[1]).view(shape).remainder(251).to(torch.uint8)
    assert torch.equal(to_tiled_128x4(scales).flatten(), module.to_blocked(scales).flatten())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_torchao_nvfp4_reads_as_torchao_reads_it(seed: int) -> None:
    """Its bytes mean the same numbers here: equal after rounding to bf16, a last bit apart in fp32 (M12)."""
    module = other("torchao.prototype.mx_formats.nvfp4_tensor")
    x = weight(seed)
    scale = module.per_tensor_amax_to_scale(x.abs().amax())
    theirs = module.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale)
    ours = NvFp4Tensor(theirs.qdata, theirs.scale.view(128, 16), scale)
    got, want = nvfp4.dequantize(ours), theirs.dequantize(torch.float32)
    assert bool(((got - want).abs() <= want.abs() * 2.0**-23).all())
    assert int((got.bfloat16() != want.bfloat16()).sum()) <= got.numel() // 1000
    mine = nvfp4.quantize(x)
    assert torch.equal(mine.tensor_scale, scale)
    assert torch.equal(mine.row_major().scales.view(torch.uint8), ours.scales.view(torch.uint8))
    different = decode_packed(mine.codes) != decode_packed(theirs.qdata)
    assert float(different.float().mean()) < 1e-3  # they multiply by a reciprocal: values beside a tie


def test_codes_are_packed_as_compressed_tensors_packs_them() -> None:
    """Even column in the low nibble, sign in bit 3, and back."""
    module = other("compressed_tensors.compressors.nvfp4.helpers")
    codes = torch.randint(16, (64, 128), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    packed = pack(codes)
    values = decode_packed(packed)
    theirs = module.pack_fp4_to_uint8(values.bfloat16())
    is_zero = values.view(64, 64, 2) == 0.0  # they may write either zero
    assert torch.equal(module.unpack_fp4_from_uint8(packed, 64, 128, torch.float32), values)
    assert torch.equal(decode_packed(theirs), values)
    assert torch.equal(theirs[~is_zero.any(-1)], packed[~is_zero.any(-1)])
