# SPDX-License-Identifier: Apache-2.0
"""nvfp4_grouped_linear: the two paths of nvfp4_linear with a group in every address.

Meaning    ops/grouped_linear.py; this file only makes it fast
Few tokens the weights of all groups stream once, tokens are decoded into registers (linear/grouped_stream.py)
Many       Hopper alone: tokens are expanded (rows/expand_nvfp4.py), then tiles on wgmma (weight_tiles_sm90.py)
Choice     up to 16 tokens are few: linear/grouped_stream.py, STREAM_LIMIT. The two paths add in different orders
Limits     x with row-major scales; w in fragment order, so N a multiple of 16 and K of 64; in tiles of 128
Bound      few tokens: the weights' bytes, 0.5625 a value; many: the tensor cores
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_layout import ScaleLayout
from megamoe.kernels.linear.grouped_stream import STREAM_LIMIT, require_columns, stream_grouped, stream_keys
from megamoe.kernels.linear.weight_tiles_sm90 import tile_keys, tile_linear
from megamoe.kernels.parts.launch import aligned, require_fragments, require_more
from megamoe.kernels.rows import expand_nvfp4, expand_nvfp4_config


def configs(dims: Mapping[str, int]) -> Iterator[Any]:
    """Yield what a model needs for one entry of its shape table."""
    yield from stream_keys(dims["K"], "nvfp4", "bf16")
    yield expand_nvfp4_config.Config()
    yield from tile_keys("nvfp4", True, "bf16")


def run(x: NvFp4Tensor, w: NvFp4Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute nvfp4_grouped_linear."""
    op = "nvfp4_grouped_linear"
    require_fragments(op, w)
    require_columns(op, w.shape[-1])
    if x.scale_layout is not ScaleLayout.ROW_MAJOR:
        raise NotImplementedError(
            f"{op}: the kernel takes activations with row-major scales; got {x.scale_layout.value}. Quantize them with "
            "quantize_nvfp4 as it is, or convert with x.row_major()."
        )
    codes, scales = aligned(x.codes), aligned(x.scales.view(torch.uint8))
    per_row = x.tensor_scale if x.scale_per == "row" else x.tensor_scale[:, None].expand(codes.shape[:2])
    tensor_scale = per_row.contiguous()  # [T, G]
    if codes.shape[0] <= STREAM_LIMIT:
        return stream_grouped((codes, scales, tensor_scale), "nvfp4", w, out_dtype)
    require_more(op, codes.shape[0], STREAM_LIMIT, w.device)
    expanded = expand_nvfp4.expand_nvfp4(codes.flatten(1), scales.flatten(1))
    return tile_linear(expanded, tensor_scale, w, out_dtype)
