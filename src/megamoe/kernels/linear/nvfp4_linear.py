# SPDX-License-Identifier: Apache-2.0
"""nvfp4_linear: codes times block scales are exact in bf16, so this is the W4A4 product of a native FP4 unit.

Meaning    ops/nvfp4_linear.py; this file only makes it fast
Few tokens the weight streams once, tokens are decoded into registers (linear/linear_stream.py)
Many       Hopper alone: tokens are expanded (rows/expand_nvfp4.py), then tiles on wgmma (weight_tiles_sm90.py)
Choice     by N and T alone: linear/linear_stream.py, stream_limit. The two paths add in different orders
Limits     x with row-major scales; w in fragment order (w.fragments(), once at load), so N a multiple of 16 and K of 64
Bound      few tokens: the weight's bytes, 0.5625 a value; many: the tensor cores
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_layout import ScaleLayout
from megamoe.kernels.linear.linear_stream import stream_keys, stream_limit, stream_linear
from megamoe.kernels.linear.weight_tiles_sm90 import tile_keys, tile_linear
from megamoe.kernels.parts.launch import aligned, require_fragments, require_more
from megamoe.kernels.rows import expand_nvfp4, expand_nvfp4_config


def configs(dims: Mapping[str, int]) -> Iterator[Any]:
    """Yield what a model needs for one entry of its shape table."""
    row_scales = "scales" in dims  # matrices that were stacked
    yield from stream_keys(dims["N"], dims["K"], "nvfp4", "bf16", row_scales=row_scales)
    yield expand_nvfp4_config.Config()
    yield from tile_keys("nvfp4", True, "bf16", row_scales=row_scales)


def run(x: NvFp4Tensor, w: NvFp4Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute nvfp4_linear."""
    op = "nvfp4_linear"
    require_fragments(op, w)
    if x.scale_layout is not ScaleLayout.ROW_MAJOR:
        raise NotImplementedError(
            f"{op}: the kernel takes activations with row-major scales; got {x.scale_layout.value}. Quantize them with "
            "quantize_nvfp4 as it is, or convert with x.row_major()."
        )
    codes, scales = aligned(x.codes), aligned(x.scales.view(torch.uint8))
    tensor_scale = x.tensor_scale if x.scale_per == "row" else x.tensor_scale.expand(codes.shape[0])
    tensor_scale = tensor_scale.contiguous()
    num_tokens, limit = codes.shape[0], stream_limit(w.shape[0])
    if num_tokens <= limit:
        return stream_linear((codes, scales, tensor_scale), "nvfp4", w, out_dtype)
    require_more(op, num_tokens, limit, w.device)
    return tile_linear(expand_nvfp4.expand_nvfp4(codes, scales), tensor_scale, w, out_dtype)
