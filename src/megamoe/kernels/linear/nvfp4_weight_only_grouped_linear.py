# SPDX-License-Identifier: Apache-2.0
"""nvfp4_weight_only_grouped_linear: the two paths of nvfp4_weight_only_linear with a group in every address.

Meaning    ops/grouped_linear.py; this file only makes it fast
Few tokens the weights of all groups stream once, tokens in registers (linear/grouped_stream.py)
Many       Hopper alone: tiles on wgmma (weight_tiles_sm90.py)
Choice     up to 16 tokens are few: linear/grouped_stream.py, STREAM_LIMIT. The two paths add in different orders
Limits     x bf16; w in fragment order (w.fragments(), once at load), so N a multiple of 16 and K of 64; in tiles of 128
Bound      few tokens: the weights' bytes, 0.5625 a value; many: the tensor cores
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.kernels.linear.grouped_stream import STREAM_LIMIT, require_columns, stream_grouped, stream_keys
from megamoe.kernels.linear.weight_tiles_sm90 import tile_keys, tile_linear
from megamoe.kernels.parts.launch import aligned, require_fragments, require_more


def configs(dims: Mapping[str, int]) -> Iterator[Any]:
    """Yield what a model needs for one entry of its shape table."""
    yield from stream_keys(dims["K"], "bf16", "bf16")
    yield from tile_keys("nvfp4", False, "bf16")


def run(x: torch.Tensor, w: NvFp4Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute nvfp4_weight_only_grouped_linear."""
    op = "nvfp4_weight_only_grouped_linear"
    require_fragments(op, w)
    require_columns(op, w.shape[-1])
    if x.dtype != torch.bfloat16:
        raise NotImplementedError(
            f"{op}: the kernel takes bf16 activations; got {x.dtype}. Convert x, or run the reference: "
            'with megamoe.ops.use("reference").'
        )
    x = aligned(x)
    if x.shape[0] <= STREAM_LIMIT:
        return stream_grouped((x,), "bf16", w, out_dtype)
    require_more(op, x.shape[0], STREAM_LIMIT, w.device)
    return tile_linear(x, None, w, out_dtype)
