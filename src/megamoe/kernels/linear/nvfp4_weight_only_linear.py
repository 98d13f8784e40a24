# SPDX-License-Identifier: Apache-2.0
"""nvfp4_weight_only_linear: NVFP4 weights expanded to bf16 in registers, bf16 tensor cores, fp32 sums.

Meaning    ops/nvfp4_weight_only_linear.py; this file only makes it fast
Few tokens the weight streams once through all multiprocessors, tokens in registers (linear/linear_stream.py)
Many       Hopper alone: tiles of 256 weight rows by 128 tokens on wgmma (weight_tiles_sm90.py)
Choice     by N and T alone: linear/linear_stream.py, stream_limit. The two paths add in different orders
Limits     x bf16; w in fragment order (w.fragments(), once at load), so N a multiple of 16 and K of 64
Bound      few tokens: the weight's bytes, 0.5625 a value; many: the tensor cores
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.kernels.linear.linear_stream import stream_keys, stream_limit, stream_linear
from megamoe.kernels.linear.weight_tiles_sm90 import tile_keys, tile_linear
from megamoe.kernels.parts.launch import aligned, require_fragments, require_more


def configs(dims: Mapping[str, int]) -> Iterator[Any]:
    """Yield what a model needs for one entry of its shape table."""
    row_scales = "scales" in dims  # matrices that were stacked
    yield from stream_keys(dims["N"], dims["K"], "bf16", "bf16", row_scales=row_scales)
    yield from tile_keys("nvfp4", False, "bf16", row_scales=row_scales)


def run(x: torch.Tensor, w: NvFp4Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute nvfp4_weight_only_linear."""
    op = "nvfp4_weight_only_linear"
    require_fragments(op, w)
    if x.dtype != torch.bfloat16:
        raise NotImplementedError(
            f"{op}: the kernel takes bf16 activations; got {x.dtype}. Convert x, or run the reference: "
            'with megamoe.ops.use("reference").'
        )
    x = aligned(x)
    num_tokens, limit = x.shape[0], stream_limit(w.shape[0])
    if num_tokens <= limit:
        return stream_linear((x,), "bf16", w, out_dtype)
    require_more(op, num_tokens, limit, w.device)
    return tile_linear(x, None, w, out_dtype)
