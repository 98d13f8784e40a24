# SPDX-License-Identifier: Apache-2.0
"""nvfp4_experts: experts stream, or are multiplied in tiles; tokens and h are NVFP4, decoded to bf16.

Meaning    ops/nvfp4_experts.py and ops/expert_common.py; this file only makes it fast
Few pairs  an expert: quantize x, sort_pairs, gate_up (h in fp32), quantize h, down, sum_slots (expert_stream.py)
Many       Hopper alone: sort_pairs, gather_rows, gate_up, quantize h, expand, down, sum_slots (expert_tiles_sm90.py)
Choice     by T, A and E alone: stream_limit of expert_stream.py. No host synchronization on either path
Shared     expert: one more expert of the same launches; where Hopper streams more than 64 tokens, three linears and
           clamped_swiglu
Limits     x bf16; weights in fragment order (w.fragments(), once at load); D and F multiples of 64 up to 8192; at most
           512 experts on a GPU
Bound      memory: the bytes of chosen experts, 0.5625 a value; from some 100 pairs an expert on, the tensor cores
Nobody     ids outside 0 .. E - 1 cost no weight bytes and add nothing; a token with nothing but -1 becomes 0
Order      of additions: a function of D, F and the path; streaming, for the shared expert on either side of 64 tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.kernels.experts import expert_tiles_sm90
from megamoe.kernels.experts.expert_stream import SHARED_TOKENS, down, expert_keys, gate_up, stream_limit, tiles_for
from megamoe.kernels.experts.sort_pairs import sort_pairs
from megamoe.kernels.experts.sum_slots import sum_slots
from megamoe.kernels.linear import nvfp4_linear
from megamoe.kernels.parts.launch import aligned, require_fragments, require_more, takes_more
from megamoe.kernels.parts.weight_stream import TOKENS_PER_TILE
from megamoe.kernels.rows import clamped_swiglu, quantize_nvfp4, quantize_nvfp4_config

Weights = tuple[NvFp4Tensor, NvFp4Tensor, NvFp4Tensor]


def configs(dims: Mapping[str, int]) -> Iterator[Any]:
    """Yield what a model needs for one entry of its shape table."""
    yield from expert_keys(dims["E"], dims["D"], dims["F"], dims["A"], "nvfp4", "f32")
    yield from expert_tiles_sm90.tile_keys(dims["D"], dims["F"], dims["E"], "nvfp4", "f32")
    yield quantize_nvfp4_config.Config(dims["D"], "bf16", True)
    yield quantize_nvfp4_config.Config(dims["F"], "f32", True)
    yield quantize_nvfp4_config.Config(dims["F"], "bf16", True)
    yield from nvfp4_linear.configs({"N": dims["F"], "K": dims["D"]})
    yield from nvfp4_linear.configs({"N": dims["D"], "K": dims["F"]})
    yield from clamped_swiglu.configs(dims)


def run(
    x: torch.Tensor,
    route_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    w1: NvFp4Tensor,
    w3: NvFp4Tensor,
    w2: NvFp4Tensor,
    shared_output: torch.Tensor | None,
    shared_weights: Weights | None,
    swiglu_limit: float | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute nvfp4_experts."""
    op = "nvfp4_experts"
    require_fragments(op, w1, w3, w2, *(shared_weights or ()))
    if x.dtype != torch.bfloat16:
        raise NotImplementedError(
            f"{op}: the kernel takes bf16 activations; got {x.dtype}. Convert x, or run the reference: "
            'with megamoe.ops.use("reference").'
        )
    x, expert_ids = aligned(x), expert_ids.contiguous()
    if x.shape[0] == 0:
        return torch.empty(x.shape, dtype=out_dtype, device=x.device)
    limit = stream_limit(expert_ids.shape[1], w1.shape[0])
    if x.shape[0] > limit:
        require_more(op, x.shape[0], limit, x.device)
    quantized = quantize_nvfp4.run(x, None)
    num_pairs = expert_ids.numel()
    if x.shape[0] > limit:
        outputs = expert_tiles_sm90.tile_experts(
            *(op, _parts(quantized), route_weights, expert_ids, (w1, w3, w2), shared_weights, swiglu_limit),
            _quantize,
        )
        shared_output = shared_output if shared_weights is None else outputs[num_pairs:]
        return sum_slots(outputs[:num_pairs], expert_ids, w1.shape[0], shared_output, out_dtype)
    if shared_weights is not None and x.shape[0] > SHARED_TOKENS and takes_more(op, x.device):
        shared_output, shared_weights = _shared_expert(quantized, shared_weights, swiglu_limit), None
    return _stream(
        op, quantized, route_weights, expert_ids, (w1, w3, w2), shared_output, shared_weights, swiglu_limit, out_dtype
    )


def _stream(
    op: str,
    x: NvFp4Tensor,
    route_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: Weights,
    shared_output: torch.Tensor | None,
    shared_weights: Weights | None,
    swiglu_limit: float | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Stream the weights of the chosen experts past their tokens."""
    (w1, w3, w2), (v1, v3, v2) = weights, shared_weights or (None, None, None)
    (num_experts, inner_size, width), num_slots, num_pairs = w1.shape, expert_ids.shape[1], expert_ids.numel()
    num_tiles = tiles_for(width, inner_size, num_pairs, num_experts, "nvfp4")
    pairs = sort_pairs(op, expert_ids, num_experts, num_tiles * TOKENS_PER_TILE, v1 is not None)
    hidden = torch.empty(pairs.order.shape[0], inner_size, dtype=torch.float32, device=w1.device)
    gate_up(
        *(_parts(x), "nvfp4", route_weights.contiguous(), (w1, w3), (v1, v3), pairs, num_tiles),
        *(swiglu_limit, hidden, "f32"),
    )
    outputs = torch.empty(pairs.order.shape[0], width, dtype=torch.bfloat16, device=w1.device)
    down(_parts(quantize_nvfp4.run(hidden, None)), "nvfp4", w2, v2, pairs, num_slots, num_tiles, outputs)
    if shared_weights is not None:
        shared_output = outputs[num_pairs:]
    return sum_slots(outputs[:num_pairs], expert_ids, num_experts, shared_output, out_dtype)


def _shared_expert(x: NvFp4Tensor, weights: Weights, swiglu_limit: float | None) -> torch.Tensor:
    """Return the shared expert's output by linears."""
    (v1, v3, v2), dtype = weights, torch.bfloat16
    gate, up = nvfp4_linear.run(x, v1, dtype), nvfp4_linear.run(x, v3, dtype)
    hidden = clamped_swiglu.run(gate, up, swiglu_limit, None, dtype)
    return nvfp4_linear.run(quantize_nvfp4.run(hidden, None), v2, dtype)


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _parts(quantize_nvfp4.run(x, None))


def _parts(x: NvFp4Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.codes, x.scales.view(torch.uint8), x.tensor_scale
