# SPDX-License-Identifier: Apache-2.0
"""quantize_nvfp4: rows to E2M1 codes and E4M3 block scales, read once.

Meaning    ops/quantize.py and formats/nvfp4.py, bit for bit; this file only makes it fast
Grid       one block a row, or 128 threads for several short rows (parts/rows.py)
Memory     16-byte loads; per thread and vector of 8 one 4-byte store of codes, per two threads one scale byte. Scales
           row-major or in 128x4 tiles; tiles with padding are zeroed first, by a second launch
Limits     K a multiple of 16 up to 32768. A device cannot raise for NaN or infinity without a synchronization: the
           block's scale becomes NaN (0x7F), which dequantize refuses
Bound      memory: 2 K + K / 2 + K / 16 bytes a row of bf16
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.formats.nvfp4 import BLOCK, NvFp4Tensor
from megamoe.formats.scale_layout import ScaleLayout, tiled_128x4_bytes
from megamoe.kernels.parts.launch import DTYPE_NAMES, as_rows, require_width
from megamoe.kernels.parts.rows import VECTOR
from megamoe.kernels.rows.quantize_nvfp4_config import Config
from megamoe.kernels.store import kernel


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    for dynamic in (True, False):
        yield Config(dims["K"], "bf16", dynamic)
        if "G" not in dims:  # what a block-scaled matrix unit reads: one matrix of tokens
            yield Config(dims["K"], "bf16", dynamic, tiled=True)


def run(
    x: torch.Tensor, tensor_scale: torch.Tensor | None, scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR
) -> NvFp4Tensor:
    """Compute quantize_nvfp4."""
    width, num_blocks = x.shape[-1], x.shape[-1] // BLOCK
    require_width("quantize_nvfp4", width, BLOCK)
    tiled = scale_layout is ScaleLayout.TILED_128X4
    if tiled and x.dim() != 2:
        raise NotImplementedError(
            f"quantize_nvfp4: the kernel makes tiled scales for [T, K]; got {list(x.shape)}. Pass one matrix at a time."
        )
    codes = torch.empty((*x.shape[:-1], width // 2), dtype=torch.uint8, device=x.device)
    if tiled:
        num_bytes = tiled_128x4_bytes(x.shape[0], num_blocks)
        padded = num_bytes != x.shape[0] * num_blocks  # padding is zero by the format, and the kernel writes none
        scales = (torch.zeros if padded else torch.empty)((num_bytes,), dtype=torch.uint8, device=x.device)
    else:
        scales = torch.empty((*x.shape[:-1], num_blocks), dtype=torch.uint8, device=x.device)
    dynamic = tensor_scale is None
    if tensor_scale is None:
        tensor_scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if codes.numel():
        launch = kernel(Config(width, DTYPE_NAMES[x.dtype], dynamic, tiled), x.device)
        words = codes.view(torch.int32).view(-1, width // VECTOR)
        launch(as_rows(x), tensor_scale.view(-1), words, scales if tiled else scales.view(-1, num_blocks))
    given = tensor_scale if dynamic else tensor_scale.expand(x.shape[:-2])
    return NvFp4Tensor(codes, scales.view(torch.float8_e4m3fn), given, scale_layout, "row" if dynamic else "tensor")
