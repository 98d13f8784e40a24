# SPDX-License-Identifier: Apache-2.0
"""nvfp4_linear on Hopper: codes times block scales are exact in bf16, so this is the W4A4 product of a native FP4 unit.

Meaning    ops/nvfp4_linear.py; this file only makes it fast
Few tokens the weight streams once through all multiprocessors, tokens in registers (parts/weight_stream.py)
Limits     x with row-major scales; w in fragment order (w.fragments(), once at load), so N a multiple of 16 and K of 64
Bound      memory: the weight's bytes, 0.5625 a value
Order      of additions: a function of N, K and the path alone
"""

from __future__ import annotations

import torch

from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_layout import ScaleLayout
from megamoe.kernels.parts.linear_stream import StreamConfig, require_fragments, stream_linear

Config = StreamConfig


def run(x: NvFp4Tensor, w: NvFp4Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute nvfp4_linear."""
    op = "nvfp4_linear"
    require_fragments(op, w)
    if x.scale_layout is not ScaleLayout.ROW_MAJOR:
        raise NotImplementedError(
            f"{op}: the kernel takes activations with row-major scales; got {x.scale_layout.value}. Quantize them with "
            "quantize_nvfp4 as it is, or convert with x.row_major()."
        )
    tensor_scale = x.tensor_scale if x.scale_per == "row" else x.tensor_scale.expand(x.shape[0])
    parts = (x.codes.contiguous(), x.scales.view(torch.uint8).contiguous(), tensor_scale.contiguous())
    return stream_linear(__name__, parts, "nvfp4", w, out_dtype)
