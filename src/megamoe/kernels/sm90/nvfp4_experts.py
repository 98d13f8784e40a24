# SPDX-License-Identifier: Apache-2.0
"""nvfp4_experts on Hopper: every chosen expert streams once; tokens and hidden values are NVFP4, decoded to bf16.

Meaning    ops/nvfp4_experts.py and ops/expert_common.py; this file only makes it fast
Launches   quantize, sort_pairs, gate_up (fp32), quantize, down, sum_slots (parts/expert_stream.py, portable/
           quantize_nvfp4.py); no host synchronization
Many       tokens an expert: its weights are streamed once for every 16 of them
Limits     x bf16; weights in fragment order (w.fragments(), once at load); D and F multiples of 64 up to 8192; at most
           512 experts on a GPU
Bound      memory: the bytes of the experts that were chosen, 0.5625 a value
Order      of additions: a function of D and F alone
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.kernels.parts import expert_tiles
from megamoe.kernels.parts.expert_stream import down, expert_keys, gate_up, tiles_for
from megamoe.kernels.parts.linear_stream import aligned, require_fragments
from megamoe.kernels.parts.sort_pairs import sort_pairs
from megamoe.kernels.parts.sum_slots import sum_slots
from megamoe.kernels.parts.weight_stream import TOKENS_PER_TILE
from megamoe.kernels.portable import quantize_nvfp4


def configs(dims: Mapping[str, int]) -> Iterator[Any]:
    """Yield what a model needs for one entry of its shape table."""
    yield from expert_keys(dims["E"], dims["D"], dims["F"], dims["A"], "nvfp4", "f32")
    yield from expert_tiles.tile_keys(dims["D"], dims["F"], dims["E"], "nvfp4", "f32")
    yield quantize_nvfp4.Config(dims["D"], "bf16", True)
    yield quantize_nvfp4.Config(dims["F"], "f32", True)


def run(
    x: torch.Tensor,
    route_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    w1: NvFp4Tensor,
    w3: NvFp4Tensor,
    w2: NvFp4Tensor,
    shared_output: torch.Tensor | None,
    swiglu_limit: float | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute nvfp4_experts."""
    op = "nvfp4_experts"
    require_fragments(op, w1, w3, w2)
    if x.dtype != torch.bfloat16:
        raise NotImplementedError(
            f"{op}: the kernel takes bf16 activations; got {x.dtype}. Convert x, or run the reference: "
            'with megamoe.ops.use("reference").'
        )
    x = aligned(x)
    (num_tokens, width), (num_experts, inner_size, _) = x.shape, w1.shape
    num_slots = expert_ids.shape[1]
    if num_tokens == 0:
        return torch.empty(0, width, dtype=out_dtype, device=x.device)
    if num_tokens > expert_tiles.stream_limit(num_slots, num_experts):
        tokens = _parts(quantize_nvfp4.run(x, None))
        outputs = expert_tiles.tile_experts(
            op,
            tokens,
            route_weights,
            expert_ids,
            w1,
            w3,
            w2,
            swiglu_limit,
            lambda h: _parts(quantize_nvfp4.run(h, None)),
        )
        return sum_slots(outputs, num_slots, shared_output, out_dtype)
    num_pairs = num_tokens * num_slots
    num_tiles = tiles_for(width, inner_size, num_pairs, num_experts)
    pairs = sort_pairs(op, expert_ids.contiguous(), num_experts, num_tiles * TOKENS_PER_TILE)
    hidden = torch.empty(num_pairs, inner_size, dtype=torch.float32, device=x.device)
    quantized = _parts(quantize_nvfp4.run(x, None))
    gate_up(quantized, "nvfp4", route_weights.contiguous(), w1, w3, pairs, num_tiles, swiglu_limit, hidden, "f32")
    outputs = torch.empty(num_pairs, width, dtype=torch.bfloat16, device=x.device)
    down(_parts(quantize_nvfp4.run(hidden, None)), "nvfp4", w2, pairs, num_slots, num_tiles, outputs)
    return sum_slots(outputs, num_slots, shared_output, out_dtype)


def _parts(x: NvFp4Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.codes, x.scales.view(torch.uint8), x.tensor_scale
