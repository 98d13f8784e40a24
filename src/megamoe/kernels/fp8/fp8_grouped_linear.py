# SPDX-License-Identifier: Apache-2.0
"""fp8_grouped_linear: the two paths of fp8_linear, once for every group.

Meaning    ops/grouped_linear.py; this file only makes it fast
Few tokens one launch streams the weights of all groups, a block those of one (fp8/fp8_stream.py)
Many       Hopper alone: tokens are expanded (fp8_expand.py), then tiles, one launch a group (fp8_tiles_sm90.py)
Choice     up to 128 tokens are few, 32 a launch: tiles for every group took 160 us at 64. The two paths add in
           different orders
Scales     E8M0 or fp32, on either side
Limits     groups of 128 in x; N a multiple of 16 and K of 128; codes of w contiguous and 16-byte aligned, as loaded
Bound      few tokens: the weights' bytes, one a value; many: the tensor cores at their fp16 rate
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.formats.fp8 import Fp8BlockTensor, Fp8RowTensor
from megamoe.kernels.fp8.fp8_linear import require_weight, tile_keys
from megamoe.kernels.fp8.fp8_stream import PASS_TOKENS, TILE_COUNTS, stream_configs, stream_linear
from megamoe.kernels.fp8.fp8_stream_config import TOKENS_PER_TILE
from megamoe.kernels.fp8.fp8_tiles_sm90 import grouped_tile_linear
from megamoe.kernels.parts.launch import aligned, require_more

OP = "fp8_grouped_linear"
STREAM_LIMIT = 4 * PASS_TOKENS
"""Up to so many tokens weights are streamed; more of them are multiplied in tiles."""


def configs(dims: Mapping[str, int]) -> Iterator[Any]:
    """Yield what a model needs for one entry of its shape table."""
    for count in TILE_COUNTS:
        yield from stream_configs(dims["K"], count * TOKENS_PER_TILE, "bf16", dims["G"])
    yield from tile_keys()


def run(x: Fp8RowTensor, w: Fp8BlockTensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute fp8_grouped_linear."""
    codes = require_weight(OP, x, w)
    num_groups, num_rows, _ = w.shape
    num_tokens = x.shape[0]
    if num_tokens == 0 or num_rows == 0 or num_groups == 0:
        return torch.empty(num_tokens, num_groups, num_rows, dtype=out_dtype, device=w.device)
    tokens, token_scales, scales = aligned(x.codes.view(torch.uint8)), x.scales.contiguous(), w.scales.contiguous()
    if num_tokens <= STREAM_LIMIT:
        matrices = tokens.flatten(1), token_scales.flatten(1), codes.flatten(0, 1), scales.flatten(0, 1)
        return stream_linear(*matrices, out_dtype, num_groups).view(num_tokens, num_groups, num_rows)
    require_more(OP, num_tokens, STREAM_LIMIT, w.device)
    return grouped_tile_linear(tokens, token_scales, codes, scales, out_dtype)
