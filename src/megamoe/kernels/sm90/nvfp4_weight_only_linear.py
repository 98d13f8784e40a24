# SPDX-License-Identifier: Apache-2.0
"""nvfp4_weight_only_linear on Hopper: NVFP4 weights expanded to bf16 in registers, bf16 tensor cores, fp32 sums.

Meaning    ops/nvfp4_weight_only_linear.py; this file only makes it fast
Few tokens the weight streams once through all multiprocessors, tokens in registers (parts/weight_stream.py)
Limits     x bf16; w in fragment order (w.fragments(), once at load), so N a multiple of 16 and K of 64
Bound      memory: the weight's bytes, 0.5625 a value
Order      of additions: a function of N, K and the path alone
"""

from __future__ import annotations

import torch

from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.kernels.parts.linear_stream import StreamConfig, require_fragments, stream_linear

Config = StreamConfig


def run(x: torch.Tensor, w: NvFp4Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute nvfp4_weight_only_linear."""
    op = "nvfp4_weight_only_linear"
    require_fragments(op, w)
    if x.dtype != torch.bfloat16:
        raise NotImplementedError(
            f"{op}: the kernel takes bf16 activations; got {x.dtype}. Convert x, or run the reference: "
            'with megamoe.ops.use("reference").'
        )
    return stream_linear(__name__, (x.contiguous(),), "bf16", w, out_dtype)
