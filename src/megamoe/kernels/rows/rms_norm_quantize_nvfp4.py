# SPDX-License-Identifier: Apache-2.0
"""rms_norm_quantize_nvfp4: the norm and the quantization of its result in one pass.

Meaning    ops/rms_norm_quantize_nvfp4.py; this file only makes it fast
Grid       one block a row, or 128 threads for several short rows (parts/rows.py)
Memory     as rms_norm and quantize_nvfp4; the normed row goes from registers to codes and is not read back
Limits     x and y bf16, K a multiple of 16 up to 32768; NaN and infinity as in quantize_nvfp4
Bound      memory: 4 K + K / 2 + K / 16 bytes a row
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.formats.nvfp4 import BLOCK, NvFp4Tensor
from megamoe.formats.scale_layout import ScaleLayout
from megamoe.kernels.parts.launch import DTYPE_NAMES, as_rows, as_vector, require_width
from megamoe.kernels.parts.rows import VECTOR
from megamoe.kernels.rows.rms_norm_quantize_nvfp4_config import Config
from megamoe.kernels.store import kernel


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config(dims["K"], "bf16")


def run(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, NvFp4Tensor]:
    """Compute rms_norm_quantize_nvfp4."""
    width = x.shape[-1]
    require_width("rms_norm_quantize_nvfp4", width, BLOCK)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    codes = torch.empty((*x.shape[:-1], width // 2), dtype=torch.uint8, device=x.device)
    scales = torch.empty((*x.shape[:-1], width // BLOCK), dtype=torch.uint8, device=x.device)
    tensor_scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if y.numel():
        launch = kernel(Config(width, DTYPE_NAMES[weight.dtype]), x.device)
        words = codes.view(torch.int32).view(-1, width // VECTOR)
        launch(
            as_rows(x),
            as_vector(weight),
            y.view(-1, width),
            tensor_scale.view(-1),
            words,
            scales.view(-1, width // BLOCK),
            eps,
        )
    quantized = NvFp4Tensor(codes, scales.view(torch.float8_e4m3fn), tensor_scale, ScaleLayout.ROW_MAJOR, "row")
    return y, quantized
