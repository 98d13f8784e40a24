# SPDX-License-Identifier: Apache-2.0
"""Inputs for every operation: one table, read by verify, by bench and by the tests.

Sizes come from models/*/shapes.py; the number of tokens is the caller's. Values are random with a spread of row
magnitudes, never zeros alone, and the first rows hold what goes wrong: zeros of both signs, ties, values near the
ends of the range. The same generator state gives the same inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from megamoe.formats import fp8, nvfp4
from megamoe.formats.fp8 import Fp8BlockTensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_layout import ScaleLayout
from megamoe.kernels.experts import expert_stream
from megamoe.kernels.fp8 import fp8_grouped_linear as fp8_grouped_linear_kernel
from megamoe.kernels.fp8 import fp8_linear as fp8_linear_kernel
from megamoe.kernels.linear.grouped_stream import STREAM_LIMIT
from megamoe.kernels.linear.linear_stream import stream_limit
from megamoe.kernels.router.route_tiles import MANY_TOKENS
from megamoe.ops.embed_streams import embed_streams
from megamoe.ops.experts import experts
from megamoe.ops.fp8_experts import fp8_experts
from megamoe.ops.fp8_linear import fp8_linear
from megamoe.ops.grouped_linear import (
    fp8_grouped_linear,
    grouped_linear,
    nvfp4_grouped_linear,
    nvfp4_weight_only_grouped_linear,
)
from megamoe.ops.hadamard import hadamard
from megamoe.ops.hyper_connection import (
    hyper_connection_head,
    hyper_connection_head_norm,
    hyper_connection_post,
    hyper_connection_post_pre_norm,
    hyper_connection_pre,
    hyper_connection_pre_norm,
)
from megamoe.ops.linear import linear
from megamoe.ops.nvfp4_experts import nvfp4_experts
from megamoe.ops.nvfp4_linear import nvfp4_linear
from megamoe.ops.nvfp4_weight_only_experts import nvfp4_weight_only_experts
from megamoe.ops.nvfp4_weight_only_linear import nvfp4_weight_only_linear
from megamoe.ops.quantize import quantize_fp8_rows, quantize_mxfp4, quantize_nvfp4
from megamoe.ops.rms_norm import rms_norm
from megamoe.ops.rms_norm_quantize_nvfp4 import rms_norm_quantize_nvfp4
from megamoe.ops.rope import rope, rope_table
from megamoe.ops.rotate_queries import rotate_queries
from megamoe.ops.route_experts import route_experts
from megamoe.ops.streams import add_to_streams, mean_of_streams
from megamoe.ops.swiglu import clamped_swiglu
from megamoe.ops.yarn_scaling import YarnScaling
from megamoe.verify.cache_inputs import CACHE_INPUTS
from megamoe.verify.comparisons import norm_and_quantized, products, routes
from megamoe.verify.op_inputs import Arguments, OpInputs, activations, finite_squares, scaled
from megamoe.verify.sampling_inputs import SAMPLING_INPUTS

MOST_ROWS = 8256
"""Rows of a plain weight that is made on the CPU, for verify: the head's 129,280 would take the reference minutes, and
a kernel knows their number only as the end of a loop."""


def _heads(dims: Mapping[str, int], num_tokens: int) -> tuple[int, ...]:
    """Return the leading sizes of a row operation: tokens, and heads, groups or streams where the call has them."""
    return (num_tokens, *(dims[name] for name in ("H", "Hi", "G", "X") if name in dims))


def _rms_norm(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    weight = None if "H" in dims else (1.0 + scaled(generator, dims["K"], scale=0.2)).bfloat16()
    return {"x": finite_squares(activations(generator, *_heads(dims, num_tokens), dims["K"])), "weight": weight}


def _rms_norm_quantize(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    return {
        "x": finite_squares(activations(generator, num_tokens, dims["K"])),
        "weight": (1.0 + scaled(generator, dims["K"], scale=0.2)).bfloat16(),
    }


def _quantize_nvfp4(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    return {"x": activations(generator, *_heads(dims, num_tokens), dims["K"])}


def _quantize_nvfp4_static(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    scale = torch.tensor(4.0 / 2688.0, device=generator.device)  # rows above 4 saturate, as after calibration
    arguments: Arguments = {"x": activations(generator, *_heads(dims, num_tokens), dims["K"]), "tensor_scale": scale}
    return arguments


def _quantize_nvfp4_tiled(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    x = activations(generator, num_tokens, dims["K"])
    return {"x": x, "scale_layout": ScaleLayout.TILED_128X4}


def _quantize_fp8_rows(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    return {"x": activations(generator, num_tokens, dims["K"])}


def _quantize_mxfp4(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    return {"x": activations(generator, *_heads(dims, num_tokens), dims["K"])}


def _hadamard(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    return {"x": finite_squares(activations(generator, *_heads(dims, num_tokens), dims["n"]))}


def _hadamard_fp32(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    return {**_hadamard(dims, num_tokens, generator), "out_dtype": torch.float32}


def _rope(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    """Return arguments at positions up to a million, under the frequencies of a compressed layer."""
    yarn = YarnScaling(factor=16.0, beta_fast=32.0, beta_slow=1.0, original_max_pos=65536)
    return {
        "x": scaled(generator, *_heads(dims, num_tokens), dims["C"]).bfloat16(),
        "pos": torch.randint(2**20, (num_tokens,), generator=generator, device=generator.device),
        "table": rope_table(dims["R"], 160000.0, yarn, generator.device),
    }


def _rope_inverse(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    arguments = _rope(dims, num_tokens, generator)
    return {**arguments, "x": arguments["x"].float() * 1.001, "inverse": True}


def _streams(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    x = scaled(generator, num_tokens, dims["X"], dims["D"])
    return (x * torch.rand(num_tokens, 1, 1, generator=generator, device=generator.device).add(0.25)).bfloat16()


def _hyper_connection_post(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    streams = dims["X"]
    logits = scaled(generator, num_tokens, streams, streams)
    return {
        "y": scaled(generator, num_tokens, dims["D"]).bfloat16(),
        "x": _streams(dims, num_tokens, generator),
        "post": scaled(generator, num_tokens, streams).sigmoid() * 2.0,
        "comb": logits.softmax(-1),
    }


def _hyper_connection_pre(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    return _mixing(dims, num_tokens, generator, (2 + dims["X"]) * dims["X"], 3)


def _hyper_connection_pre_norm(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    weight = (1.0 + scaled(generator, dims["D"], scale=0.2)).bfloat16()
    return {**_hyper_connection_pre(dims, num_tokens, generator), "weight": weight}


def _hyper_connection_head(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    return _mixing(dims, num_tokens, generator, dims["X"], 1)


def _post_pre_norm(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    following = _hyper_connection_pre_norm(dims, num_tokens, generator)
    return {**following, **_hyper_connection_post(dims, num_tokens, generator)}


def _head_norm(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    weight = (1.0 + scaled(generator, dims["D"], scale=0.2)).bfloat16()
    return {**_hyper_connection_head(dims, num_tokens, generator), "weight": weight}


def _head_norm_rows(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    """Return arguments of a few rows of many; some are nobody's."""
    num_streams = num_tokens + 5
    rows = torch.randperm(num_streams, generator=generator, device=generator.device)[:num_tokens]
    rows[2::6] = -1
    return {**_head_norm(dims, num_streams, generator), "rows": rows}


def _embed_streams(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    vocab_size, device = min(dims["V"], MOST_ROWS), generator.device
    token_ids = torch.randint(vocab_size, (num_tokens,), generator=generator, device=device)
    token_ids[2::6] = -1
    table = scaled(generator, vocab_size, dims["D"]).bfloat16()
    return {"table": table, "token_ids": token_ids, "num_streams": dims["X"]}


def _mean_of_streams(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    return {"x": _streams(dims, num_tokens, generator)}


def _add_to_streams(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    return {"x": _streams(dims, num_tokens, generator), "e": scaled(generator, num_tokens, dims["D"]).bfloat16()}


def _rotate_queries(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    arguments = _rope(dims, num_tokens, generator)
    return {name: arguments[name] for name in ("pos", "table")} | {"q": arguments["x"]}


def _rotate_queries_fp32(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    arguments = _rotate_queries(dims, num_tokens, generator)
    return {**arguments, "q": arguments["q"].float() * 1.001}


def _mixing(
    dims: Mapping[str, int], num_tokens: int, generator: torch.Generator, num_rows: int, num_scales: int
) -> Arguments:
    width = dims["X"] * dims["D"]
    return {
        "x": _streams(dims, num_tokens, generator),
        "fn": scaled(generator, num_rows, width, scale=2.0 * width**-0.5),
        "base": scaled(generator, num_rows, scale=0.5),
        "scale": scaled(generator, num_scales, scale=0.3) + 1.0,
    }


def _route_experts(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    return _routing(dims, num_tokens, generator, torch.int64)


def _route_experts_biased(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    arguments = _routing(dims, num_tokens, generator, torch.int32)
    return arguments if "V" in dims else {**arguments, "bias": _tied(scaled(generator, dims["E"], scale=0.1))}


def _routing(
    dims: Mapping[str, int], num_tokens: int, generator: torch.Generator, table_dtype: torch.dtype
) -> Arguments:
    width, num_experts = dims["D"], dims["E"]
    gate = _tied(scaled(generator, num_experts, width, scale=1.5 * width**-0.5))
    device, vocab_size = generator.device, dims.get("V", 1000)
    arguments: Arguments = {
        "x": scaled(generator, num_tokens, width).bfloat16(),
        "gate": gate.bfloat16(),
        "token_ids": torch.randint(vocab_size, (num_tokens,), generator=generator, device=device),
        "top_k": dims["A"],
        "routed_scaling": 2.5,
    }
    if "V" in dims:
        table = torch.randint(num_experts, (vocab_size, dims["A"]), generator=generator, device=device)
        arguments["expert_table"] = table.to(table_dtype)
    return arguments


def _route_nobody(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    """The same in a step padded to its bucket: rows of nobody, among the others and at the end."""
    arguments = _route_experts_biased(dims, num_tokens, generator)
    arguments["token_ids"][2::3] = -1
    arguments["token_ids"][num_tokens // 2 + 1 :] = -1
    return arguments


def _quantized_weight(generator: torch.Generator, *shape: int) -> NvFp4Tensor:
    """Return a weight in fragment order: a quantized matrix of some rows, repeated with rows turned round and scaled.

    Quantizing every row of a large weight on a CPU would take longer than everything else.
    """
    *leading, num_rows, width = shape
    base = nvfp4.quantize(scaled(generator, 64, width, scale=width**-0.5))
    index = torch.arange(num_rows, device=generator.device) % 64
    codes, scales = base.codes[index], base.scales.view(torch.uint8)[index]
    flips = torch.randint(0, 2, (*leading, num_rows, 1), generator=generator, device=generator.device) * 0x88
    codes = codes.expand(*leading, -1, -1) ^ flips.to(torch.uint8)  # the signs of a whole row
    scales = scales.expand(*leading, -1, -1).roll(1, -2).contiguous().view(torch.float8_e4m3fn)
    factor = torch.rand(leading, generator=generator, device=generator.device) + 0.5
    return NvFp4Tensor(codes, scales, base.tensor_scale * factor).fragments()


def _weight_only_linear(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    x = finite_squares(activations(generator, num_tokens, dims["K"]))
    w = _quantized_weight(generator, dims["N"], dims["K"])
    if "scales" in dims:  # a stack: rows of the first matrices have another tensor scale than those of the last
        factor = torch.where(torch.arange(dims["N"], device=x.device) < dims["N"] // 3, 0.25, 3.0)
        w = dataclasses.replace(w, tensor_scale=w.tensor_scale * factor, scale_per="row")
    return {"x": x, "w": w}


def _nvfp4_linear(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    arguments = _weight_only_linear(dims, num_tokens, generator)
    return {**arguments, "x": nvfp4.quantize(arguments["x"], scale_per="row")}


def _fp8_linear(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    w = _fp8_weight(generator, dims["N"], dims["K"])
    return {"x": fp8.quantize_rows(finite_squares(activations(generator, num_tokens, dims["K"]))), "w": w}


def _fp8_weight(generator: torch.Generator, num_rows: int, width: int) -> Fp8BlockTensor:
    """Return a weight: 128 quantized rows, repeated with signs turned round and other block scales.

    One weight in two has fp32 scales, some of them zero, the others E8M0 scales.
    """
    device = generator.device
    base = fp8.quantize_blocks(scaled(generator, fp8.BLOCK, width, scale=width**-0.5))
    flips = torch.randint(0, 2, (num_rows, 1), generator=generator, device=device) * 0x80
    codes = base.codes.view(torch.uint8)[torch.arange(num_rows, device=device) % fp8.BLOCK] ^ flips.to(torch.uint8)
    blocks = -(-num_rows // fp8.BLOCK), base.scales.shape[1]
    if int(torch.randint(0, 2, (), generator=generator, device=device)):
        scales = base.scales.float() * (torch.rand(blocks, generator=generator, device=device) + 0.5)
        scales[torch.rand(blocks, generator=generator, device=device) > 0.9] = 0.0
    else:
        moves = torch.randint(-3, 4, blocks, generator=generator, device=device)
        scales = (base.scales.view(torch.uint8) + moves).to(torch.uint8).view(torch.float8_e8m0fnu)
    return Fp8BlockTensor(codes.view(torch.float8_e4m3fn), scales)


def _fp8_grouped_linear(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    num_groups, num_rows, width = dims["G"], dims["N"], dims["K"]
    x = fp8.quantize_rows(finite_squares(activations(generator, num_tokens, num_groups, width)))
    blocks = -(-num_rows // fp8.BLOCK)
    w = _fp8_weight(generator, num_groups * blocks * fp8.BLOCK, width)  # whole blocks in every group, then the rows
    codes = w.codes.view(num_groups, -1, width)[:, :num_rows].contiguous()
    return {"x": x, "w": Fp8BlockTensor(codes, w.scales.view(num_groups, blocks, -1))}


def _fp8_streamed(dims: Mapping[str, int]) -> int:
    return fp8_linear_kernel.stream_limit(dims["N"])


def _fp8_grouped_streamed(dims: Mapping[str, int]) -> int:
    return fp8_grouped_linear_kernel.STREAM_LIMIT


def _linear(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    num_rows, width = dims["N"], dims["K"]
    if generator.device.type == "cpu":
        num_rows = min(num_rows, MOST_ROWS)
    x = finite_squares(activations(generator, num_tokens, width))
    return {"x": x, "w": scaled(generator, num_rows, width, scale=width**-0.5).bfloat16()}


def _linear_fp32(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    return {**_linear(dims, num_tokens, generator), "out_dtype": torch.float32}


def _grouped_linear(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    num_groups, num_rows, width = dims["G"], dims["N"], dims["K"]
    x = finite_squares(activations(generator, num_tokens, num_groups, width))
    return {"x": x, "w": scaled(generator, num_groups, num_rows, width, scale=width**-0.5).bfloat16()}


def _weight_only_grouped_linear(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    x = finite_squares(activations(generator, num_tokens, dims["G"], dims["K"]))
    return {"x": x, "w": _quantized_weight(generator, dims["G"], dims["N"], dims["K"])}


def _nvfp4_grouped_linear(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    arguments = _weight_only_grouped_linear(dims, num_tokens, generator)
    return {**arguments, "x": nvfp4.quantize(arguments["x"], scale_per="row")}


EXPERT_TILE = 8  # tokens that share an instruction
MAX_EXPERTS = 8
EXPERTS_PER_TOKEN = ("x", "route_weights", "expert_ids")


def routing(num_tokens: int, num_slots: int, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    """Return expert ids [T, A]: random, half of the tokens alike; but the extremes next to a tile.

    One below a multiple of 8 tokens, all pairs belong to one expert and the others are empty. At it and one above, the
    first A experts have all tokens each: exactly full tiles, and one more.
    """
    device = generator.device
    order = torch.rand(num_tokens, num_experts, generator=generator, device=device).argsort(-1)
    order[: num_tokens // 2] = order[: num_tokens // 2].sort(-1).values  # half of the tokens agree: crowded experts
    ids = order[:, :num_slots].contiguous()
    if num_tokens % EXPERT_TILE == EXPERT_TILE - 1:
        return torch.full_like(ids, num_experts // 2)
    if num_tokens >= EXPERT_TILE and num_tokens % EXPERT_TILE <= 1:
        return torch.arange(num_slots, device=device).expand(num_tokens, -1).contiguous()
    return ids


def _experts(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    """Return arguments with at most 8 experts: kernels know the number only as the end of a loop."""
    num_experts, width, inner_size, device = min(MAX_EXPERTS, dims["E"]), dims["D"], dims["F"], generator.device
    return {
        "x": scaled(generator, num_tokens, width).bfloat16(),
        "route_weights": torch.rand(num_tokens, dims["A"], generator=generator, device=device) + 0.1,
        "expert_ids": routing(num_tokens, dims["A"], num_experts, generator),
        "w1": _quantized_weight(generator, num_experts, inner_size, width),
        "w3": _quantized_weight(generator, num_experts, inner_size, width),
        "w2": _quantized_weight(generator, num_experts, width, inner_size),
        "swiglu_limit": 1.5,
    }


def _experts_shared(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    """The same with the weights of a shared expert."""
    sizes = ((dims["F"], dims["D"]), (dims["F"], dims["D"]), (dims["D"], dims["F"]))
    shared = tuple(_quantized_weight(generator, *shape) for shape in sizes)
    return {**_experts(dims, num_tokens, generator), "shared_weights": shared}


def _plain_experts(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    """The same with bf16 weights, and the shared expert's output."""
    arguments, width, inner_size = _experts({**dims, "D": 64, "F": 64}, num_tokens, generator), dims["D"], dims["F"]
    num_experts = len(arguments["w1"])
    shapes = {"w1": (inner_size, width), "w3": (inner_size, width), "w2": (width, inner_size)}
    for name, shape in shapes.items():
        arguments[name] = scaled(generator, num_experts, *shape, scale=shape[1] ** -0.5).bfloat16()
    arguments["x"] = scaled(generator, num_tokens, width).bfloat16()
    return {**arguments, "shared_output": scaled(generator, num_tokens, width).bfloat16()}


def _fp8_experts(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    """The same with FP8 weights, whose scales are all fp32 or all E8M0."""
    arguments = _plain_experts(dims, num_tokens, generator)
    for name in ("w1", "w3", "w2"):
        num_experts, num_rows, width = arguments[name].shape
        weights = [_fp8_weight(generator, num_rows, width) for _ in range(num_experts)]
        scales = torch.stack([one.scales.float() for one in weights])
        arguments[name] = Fp8BlockTensor(torch.stack([one.codes for one in weights]), scales)
    return arguments


def _streamed(dims: Mapping[str, int]) -> int:
    return stream_limit(dims["N"])


def _untiled_routes(dims: Mapping[str, int]) -> int:
    return MANY_TOKENS


def _experts_streamed(dims: Mapping[str, int]) -> int:
    return expert_stream.stream_limit(dims["A"], min(MAX_EXPERTS, dims["E"]))


def _experts_nobody(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    """The same, shared expert included, with experts of other ranks, slots of none, and tokens that are nobody."""
    arguments = _experts_shared(dims, num_tokens, generator)
    ids, num_experts = arguments["expert_ids"], len(arguments["w1"])
    ids[1::4, 0] = num_experts + 3
    ids[3::4] = num_experts  # nothing but the shared expert
    ids[2::5, -1] = -1
    ids[2::3] = -1
    return arguments


def _expert_calls(door: Callable[..., Any]) -> tuple[OpInputs, ...]:
    """Return how a routed-experts operation is called: with a shared expert or not, with few tokens and with many."""
    per_token = EXPERTS_PER_TOKEN
    return (
        OpInputs(door, _experts, per_token, EXPERT_TILE, _experts_streamed),
        OpInputs(door, _experts_shared, per_token, EXPERT_TILE, _experts_streamed),
        OpInputs(door, _experts, per_token, 43, _experts_streamed),  # passes of tiles that are full, and more than full
        OpInputs(door, _experts_nobody, per_token, EXPERT_TILE, _experts_streamed, timed=False),
    )


def _grouped_streamed(dims: Mapping[str, int]) -> int:
    return STREAM_LIMIT


def _tied(values: torch.Tensor) -> torch.Tensor:
    """Return per-expert values with experts 0 and 1, and 2 and the last, alike and large: often chosen, always tied."""
    values = values.clone()
    values[0], values[2] = values[0] * 2.0, values[2] * 2.0
    values[1], values[-1] = values[0], values[2]
    return values


def _clamped_swiglu(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    shape = (num_tokens, dims["F"])
    gate, up = scaled(generator, *shape, scale=6.0).bfloat16(), scaled(generator, *shape, scale=6.0).bfloat16()
    return {"gate": gate, "up": up, "limit": 10.0}  # a tenth of the values beyond the limit


INPUTS: dict[str, tuple[OpInputs, ...]] = {
    **CACHE_INPUTS,
    **SAMPLING_INPUTS,
    "rms_norm": (OpInputs(rms_norm, _rms_norm, ("x",)),),
    "rms_norm_quantize_nvfp4": (
        OpInputs(rms_norm_quantize_nvfp4, _rms_norm_quantize, ("x",), rule=norm_and_quantized),
    ),
    "quantize_nvfp4": (
        OpInputs(quantize_nvfp4, _quantize_nvfp4, ("x",)),
        OpInputs(quantize_nvfp4, _quantize_nvfp4_static, ("x",)),
        OpInputs(quantize_nvfp4, _quantize_nvfp4_tiled, ("x",), tile=128),
    ),
    "quantize_fp8_rows": (OpInputs(quantize_fp8_rows, _quantize_fp8_rows, ("x",)),),
    "quantize_mxfp4": (OpInputs(quantize_mxfp4, _quantize_mxfp4, ("x",)),),
    "hadamard": (OpInputs(hadamard, _hadamard, ("x",)), OpInputs(hadamard, _hadamard_fp32, ("x",))),
    "rope": (OpInputs(rope, _rope, ("x", "pos")), OpInputs(rope, _rope_inverse, ("x", "pos"))),
    "rotate_queries": (
        OpInputs(rotate_queries, _rotate_queries, ("q", "pos")),
        OpInputs(rotate_queries, _rotate_queries_fp32, ("q", "pos"), on_kernels=False),
    ),
    "embed_streams": (
        OpInputs(
            embed_streams,
            _embed_streams,
            ("token_ids",),
            partly=("table",),
            partly_bytes=lambda arguments: int((arguments["token_ids"] >= 0).sum()) * arguments["table"][0].nbytes,
        ),
    ),
    "mean_of_streams": (OpInputs(mean_of_streams, _mean_of_streams, ("x",)),),
    "add_to_streams": (OpInputs(add_to_streams, _add_to_streams, ("x", "e")),),
    "hyper_connection_post_pre_norm": (
        OpInputs(hyper_connection_post_pre_norm, _post_pre_norm, ("y", "x", "post", "comb")),
    ),
    "hyper_connection_head_norm": (
        OpInputs(hyper_connection_head_norm, _head_norm, ("x",)),
        OpInputs(hyper_connection_head_norm, _head_norm_rows, ("rows",)),
    ),
    "experts": (OpInputs(experts, _plain_experts, (*EXPERTS_PER_TOKEN, "shared_output"), EXPERT_TILE),),
    "fp8_experts": (OpInputs(fp8_experts, _fp8_experts, (*EXPERTS_PER_TOKEN, "shared_output"), EXPERT_TILE),),
    "clamped_swiglu": (OpInputs(clamped_swiglu, _clamped_swiglu, ("gate", "up")),),
    "route_experts": tuple(
        OpInputs(
            route_experts,
            make,
            ("x", "token_ids"),
            tile=512,
            order_until=_untiled_routes,
            rule=routes,
            partly=("expert_table",),  # a row a token: too little to count
            timed=make is not _route_nobody,
        )
        for make in (_route_experts, _route_experts_biased, _route_nobody)
    ),
    "nvfp4_linear": (OpInputs(nvfp4_linear, _nvfp4_linear, ("x",), order_until=_streamed, rule=products),),
    "nvfp4_weight_only_linear": (
        OpInputs(nvfp4_weight_only_linear, _weight_only_linear, ("x",), order_until=_streamed, rule=products),
    ),
    "nvfp4_experts": _expert_calls(nvfp4_experts),
    "nvfp4_weight_only_experts": _expert_calls(nvfp4_weight_only_experts),
    "fp8_linear": (OpInputs(fp8_linear, _fp8_linear, ("x",), order_until=_fp8_streamed, rule=products),),
    "linear": (
        OpInputs(linear, _linear, ("x",), rule=products),
        OpInputs(linear, _linear_fp32, ("x",), rule=products),
    ),
    "grouped_linear": (OpInputs(grouped_linear, _grouped_linear, ("x",), rule=products),),
    "fp8_grouped_linear": (
        OpInputs(fp8_grouped_linear, _fp8_grouped_linear, ("x",), order_until=_fp8_grouped_streamed, rule=products),
    ),
    "nvfp4_grouped_linear": (
        OpInputs(nvfp4_grouped_linear, _nvfp4_grouped_linear, ("x",), order_until=_grouped_streamed, rule=products),
    ),
    "nvfp4_weight_only_grouped_linear": (
        OpInputs(
            nvfp4_weight_only_grouped_linear,
            _weight_only_grouped_linear,
            ("x",),
            order_until=_grouped_streamed,
            rule=products,
        ),
    ),
    "hyper_connection_pre": (OpInputs(hyper_connection_pre, _hyper_connection_pre, ("x",)),),
    "hyper_connection_pre_norm": (OpInputs(hyper_connection_pre_norm, _hyper_connection_pre_norm, ("x",)),),
    "hyper_connection_head": (OpInputs(hyper_connection_head, _hyper_connection_head, ("x",)),),
    "hyper_connection_post": (OpInputs(hyper_connection_post, _hyper_connection_post, ("y", "x", "post", "comb")),),
}
"""Operation → the ways it is called. Every operation that a model calls is here, with a kernel or without (a test sees
to it)."""


def kernel_inputs(op: str) -> tuple[OpInputs, ...]:
    """Return the ways in which an operation is called on kernels."""
    return tuple(inputs for inputs in INPUTS[op] if inputs.on_kernels)
