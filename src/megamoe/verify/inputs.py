# SPDX-License-Identifier: Apache-2.0
"""Inputs for every operation that has a kernel: one table, read by verify, by bench and by the tests.

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
from megamoe.formats.fp8 import Fp8BlockTensor, Fp8RowTensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_layout import ScaleLayout
from megamoe.kernels.experts import expert_stream
from megamoe.kernels.fp8 import fp8_linear as fp8_linear_kernel
from megamoe.kernels.linear.grouped_stream import STREAM_LIMIT
from megamoe.kernels.linear.linear_stream import stream_limit
from megamoe.kernels.router.route_tiles import MANY_TOKENS
from megamoe.ops.fp8_linear import fp8_linear
from megamoe.ops.grouped_linear import grouped_linear, nvfp4_grouped_linear, nvfp4_weight_only_grouped_linear
from megamoe.ops.hyper_connection import (
    hyper_connection_head,
    hyper_connection_post,
    hyper_connection_pre,
    hyper_connection_pre_norm,
)
from megamoe.ops.linear import linear
from megamoe.ops.nvfp4_experts import nvfp4_experts
from megamoe.ops.nvfp4_linear import nvfp4_linear
from megamoe.ops.nvfp4_weight_only_experts import nvfp4_weight_only_experts
from megamoe.ops.nvfp4_weight_only_linear import nvfp4_weight_only_linear
from megamoe.ops.quantize import quantize_fp8_rows, quantize_nvfp4
from megamoe.ops.rms_norm import rms_norm
from megamoe.ops.rms_norm_quantize_nvfp4 import rms_norm_quantize_nvfp4
from megamoe.ops.route_experts import route_experts
from megamoe.ops.swiglu import clamped_swiglu

Arguments = dict[str, Any]

MOST_ROWS = 8256
"""Rows of a plain weight that is made on the CPU, for verify: the head's 129,280 would take the reference minutes, and
a kernel knows their number only as the end of a loop."""


@dataclasses.dataclass(frozen=True)
class OpInputs:
    """How to call an operation.

    Attributes:
        door: the operation.
        make: (dims, number of tokens, generator) → keyword arguments on the generator's device.
        per_token: the arguments whose first dimension is the tokens; each token's result depends on its rows alone.
        tile: tokens that share a block at most; verify runs one below, at and above it.
        order_until: dims → number of tokens up to which sums have one order and beyond which they have another; None
            where the order never changes. A token's bits do not depend on its neighbours on either side of it.
    """

    door: Callable[..., Any]
    make: Callable[[Mapping[str, int], int, torch.Generator], Arguments]
    per_token: tuple[str, ...]
    tile: int = 16
    order_until: Callable[[Mapping[str, int]], int] | None = None


def activations(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Return bf16 values [*shape]: rows of different magnitude, a few outliers, hard rows first."""
    device = generator.device
    x = torch.randn(shape, generator=generator, device=device)
    magnitude = torch.randint(-6, 7, (*shape[:-1], 1), generator=generator, device=device).float().exp2()
    outlier = torch.rand(shape, generator=generator, device=device) > 0.999
    x = torch.where(outlier, x * 30.0, x) * magnitude
    x = x.to(torch.bfloat16)
    for index, row in enumerate(_hard_rows(shape[-1], device)):
        if shape[0] > index + 1:  # the first row stays random, so that one token is not a special case
            x[index + 1] = row.to(torch.bfloat16)
    return x


def _hard_rows(width: int, device: torch.device) -> list[torch.Tensor]:
    column = torch.arange(width, device=device)
    sign = torch.where(column % 3 == 0, -1.0, 1.0)
    quarters = sign * (column % 97) / 16.0  # with an amax of 6 every threshold of E2M1 is hit exactly
    return [
        torch.zeros(width, device=device) * sign,  # zeros of both signs
        quarters,
        quarters * 2.0**-130,  # subnormal in bf16 and fp32
        quarters.clamp(-6, 6) * 2.0**124,  # near the largest finite value
        torch.where(column == width - 1, 1.0, 2.0**-20 * sign),  # one value far above the others
        sign * 2.0 ** (column % 24 - 12).float(),
    ]


def scaled(generator: torch.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """Return fp32 Gaussian values of a scale."""
    return torch.randn(shape, generator=generator, device=generator.device) * scale


def _heads(dims: Mapping[str, int], num_tokens: int) -> tuple[int, ...]:
    """Return the leading sizes of a row operation: tokens, and heads, groups or streams where the call has them."""
    return (num_tokens, *(dims[name] for name in ("H", "G", "X") if name in dims))


def _rms_norm(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    weight = None if "H" in dims else (1.0 + scaled(generator, dims["K"], scale=0.2)).bfloat16()
    return {"x": _finite_squares(activations(generator, *_heads(dims, num_tokens), dims["K"])), "weight": weight}


def _finite_squares(x: torch.Tensor) -> torch.Tensor:
    """Return x with values whose squares overflow made smaller: no norm is defined for them."""
    return torch.where(x.abs() > 2.0**56, x * 2.0**-80, x)


def _rms_norm_quantize(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    return {
        "x": _finite_squares(activations(generator, num_tokens, dims["K"])),
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
    x = _finite_squares(activations(generator, num_tokens, dims["K"]))
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
    return {"x": fp8.quantize_rows(_finite_squares(activations(generator, num_tokens, dims["K"]))), "w": w}


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


def _fp8_streamed(dims: Mapping[str, int]) -> int:
    return fp8_linear_kernel.stream_limit(dims["N"])


def _linear(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    num_rows, width = dims["N"], dims["K"]
    if generator.device.type == "cpu":
        num_rows = min(num_rows, MOST_ROWS)
    x = _finite_squares(activations(generator, num_tokens, width))
    w = scaled(generator, num_rows, width, scale=width**-0.5).bfloat16()
    if num_rows == 1:  # a token's only output: terms of both signs can cancel, and no error relative to it is defined
        w = w.abs()
    return {"x": x, "w": w}


def _linear_fp32(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    return {**_linear(dims, num_tokens, generator), "out_dtype": torch.float32}


def _grouped_linear(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    num_groups, num_rows, width = dims["G"], dims["N"], dims["K"]
    x = _finite_squares(activations(generator, num_tokens, num_groups, width))
    return {"x": x, "w": scaled(generator, num_groups, num_rows, width, scale=width**-0.5).bfloat16()}


def _weight_only_grouped_linear(dims: Mapping[str, int], num_tokens: int, generator: torch.Generator) -> Arguments:
    x = _finite_squares(activations(generator, num_tokens, dims["G"], dims["K"]))
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


def _streamed(dims: Mapping[str, int]) -> int:
    return stream_limit(dims["N"])


def _untiled_routes(dims: Mapping[str, int]) -> int:
    return MANY_TOKENS


def _experts_streamed(dims: Mapping[str, int]) -> int:
    return expert_stream.stream_limit(dims["A"], min(MAX_EXPERTS, dims["E"]))


def _expert_calls(door: Callable[..., Any]) -> tuple[OpInputs, ...]:
    """Return how a routed-experts operation is called: with a shared expert or not, with few tokens and with many."""
    per_token = EXPERTS_PER_TOKEN
    return (
        OpInputs(door, _experts, per_token, EXPERT_TILE, _experts_streamed),
        OpInputs(door, _experts_shared, per_token, EXPERT_TILE, _experts_streamed),
        OpInputs(door, _experts, per_token, 43, _experts_streamed),  # passes of tiles that are full, and more than full
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
    "rms_norm": (OpInputs(rms_norm, _rms_norm, ("x",)),),
    "rms_norm_quantize_nvfp4": (OpInputs(rms_norm_quantize_nvfp4, _rms_norm_quantize, ("x",)),),
    "quantize_nvfp4": (
        OpInputs(quantize_nvfp4, _quantize_nvfp4, ("x",)),
        OpInputs(quantize_nvfp4, _quantize_nvfp4_static, ("x",)),
        OpInputs(quantize_nvfp4, _quantize_nvfp4_tiled, ("x",), tile=128),
    ),
    "quantize_fp8_rows": (OpInputs(quantize_fp8_rows, _quantize_fp8_rows, ("x",)),),
    "clamped_swiglu": (OpInputs(clamped_swiglu, _clamped_swiglu, ("gate", "up")),),
    "route_experts": (
        OpInputs(route_experts, _route_experts, ("x", "token_ids"), tile=512, order_until=_untiled_routes),
        OpInputs(route_experts, _route_experts_biased, ("x", "token_ids"), tile=512, order_until=_untiled_routes),
    ),
    "nvfp4_linear": (OpInputs(nvfp4_linear, _nvfp4_linear, ("x",), order_until=_streamed),),
    "nvfp4_weight_only_linear": (
        OpInputs(nvfp4_weight_only_linear, _weight_only_linear, ("x",), order_until=_streamed),
    ),
    "nvfp4_experts": _expert_calls(nvfp4_experts),
    "nvfp4_weight_only_experts": _expert_calls(nvfp4_weight_only_experts),
    "fp8_linear": (OpInputs(fp8_linear, _fp8_linear, ("x",), order_until=_fp8_streamed),),
    "linear": (
        OpInputs(linear, _linear, ("x",)),
        OpInputs(linear, _linear_fp32, ("x",)),
    ),
    "grouped_linear": (OpInputs(grouped_linear, _grouped_linear, ("x",)),),
    "nvfp4_grouped_linear": (
        OpInputs(nvfp4_grouped_linear, _nvfp4_grouped_linear, ("x",), order_until=_grouped_streamed),
    ),
    "nvfp4_weight_only_grouped_linear": (
        OpInputs(nvfp4_weight_only_grouped_linear, _weight_only_grouped_linear, ("x",), order_until=_grouped_streamed),
    ),
    "hyper_connection_pre": (OpInputs(hyper_connection_pre, _hyper_connection_pre, ("x",)),),
    "hyper_connection_pre_norm": (OpInputs(hyper_connection_pre_norm, _hyper_connection_pre_norm, ("x",)),),
    "hyper_connection_head": (OpInputs(hyper_connection_head, _hyper_connection_head, ("x",)),),
    "hyper_connection_post": (OpInputs(hyper_connection_post, _hyper_connection_post, ("y", "x", "post", "comb")),),
}
"""Operation → the ways it is called. Every operation of KERNELS is here (a test sees to it)."""


def moved(value: Any, device: torch.device | str) -> Any:
    """Return an argument or a result on a device; tensors and containers move, everything else stays."""
    if isinstance(value, tuple):
        return tuple(moved(one, device) for one in value)
    return value.to(device) if isinstance(value, torch.Tensor) or hasattr(value, "codes") else value


def rows_of(value: Any, index: torch.Tensor) -> Any:
    """Return some tokens of an argument or a result whose first dimension is the tokens."""
    if isinstance(value, tuple):
        return tuple(rows_of(one, index) for one in value)
    index = index.to(value.device)
    if isinstance(value, NvFp4Tensor):
        row_major = value.row_major().scales
        return dataclasses.replace(
            value,
            codes=value.codes[index],
            scales=row_major.view(torch.uint8)[index].view(row_major.dtype),
            scale_layout=ScaleLayout.ROW_MAJOR,
            tensor_scale=value.tensor_scale[index] if value.tensor_scale.dim() else value.tensor_scale,
        )
    if isinstance(value, Fp8RowTensor):
        codes, scales = value.codes.view(torch.uint8)[index], value.scales.view(torch.uint8)[index]
        return Fp8RowTensor(codes.view(value.codes.dtype), scales.view(value.scales.dtype), value.group)
    return value[index]


def parts(value: Any, name: str = "y") -> dict[str, torch.Tensor]:
    """Return the tensors of a result by name: containers and tuples are taken apart."""
    if isinstance(value, tuple):
        return {key: part for index, one in enumerate(value) for key, part in parts(one, f"{name}{index}").items()}
    if isinstance(value, NvFp4Tensor):
        return {
            f"{name}.codes": value.codes,
            f"{name}.scales": value.scales,
            f"{name}.tensor_scale": value.tensor_scale,
        }
    if isinstance(value, Fp8RowTensor | Fp8BlockTensor):
        return {f"{name}.codes": value.codes, f"{name}.scales": value.scales}
    return {name: value}
