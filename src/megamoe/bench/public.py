# SPDX-License-Identifier: Apache-2.0
"""Kernels that others published, beside ours: those that come with torch, and what has to be done to call them.

    tinygemm    torch.ops.aten._weight_int4pack_mm: bf16 tokens times int4 weights with a bf16 scale and zero per 32
                values, which takes 5 bits a value where NVFP4 takes 4.5. The nearest public relative of a weight-only
                linear; the weight is rounded to its format, so its result is like ours and not the same
    grouped_mm  torch's grouped bf16 product: tokens sorted by expert, gate and up in one product, down in another
    scaled_mm   torch._scaled_mm: FP8 tokens and weights with one scale per row

A result must be near ours before it is timed, which catches a kernel that is called wrongly and no more. What is not
there, or refuses the sizes, has no time and a reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from megamoe.formats import fp8, nvfp4
from megamoe.verify.op_inputs import Arguments
from megamoe.verify.values import parts

NEAR = 0.25
"""Relative L2 of the median token between results that round weights differently; a wrong call is above 1."""

INT4_GROUP = 32
INNER_K_TILES = 8


@dataclasses.dataclass(frozen=True)
class Public:
    """A published kernel.

    Attributes:
        name: named in every report, with torch's version.
        bind: keyword arguments of the operation → a call without arguments; everything that is done once when a model
            is loaded is done here.
        missing: why it cannot be had here, or None.
    """

    name: str
    bind: Callable[[Arguments], Callable[[], torch.Tensor]]
    missing: Callable[[], str | None]


def _has(module: Any, name: str) -> Callable[[], str | None]:
    return lambda: None if hasattr(module, name) else f"torch {torch.__version__} has no {name}"


def _tinygemm(arguments: Arguments) -> Callable[[], torch.Tensor]:
    values = nvfp4.dequantize(arguments["w"], torch.float32)
    groups = values.unflatten(-1, (-1, INT4_GROUP))
    low, high = groups.aminmax(dim=-1)
    scale = ((high - low) / 15.0).clamp(min=1e-9)  # [N, K/32]
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.uint8).flatten(-2)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4) | codes[:, 1::2], INNER_K_TILES)
    zero = low + 8.0 * scale  # a value is (code - 8) * scale + zero
    scales = torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous().bfloat16()  # [K/32, N, 2]
    x = arguments["x"]
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, INT4_GROUP, scales)


def _grouped_mm(arguments: Arguments) -> Callable[[], torch.Tensor]:
    x, ids, route_weights = arguments["x"], arguments["expert_ids"], arguments["route_weights"]
    limit, (num_tokens, num_slots) = arguments["swiglu_limit"], ids.shape
    w1, w3, w2 = (nvfp4.dequantize(arguments[name], torch.bfloat16) for name in ("w1", "w3", "w2"))
    gate_up = torch.cat((w1, w3), dim=1).transpose(1, 2)  # [E, D, 2 F]
    down = w2.transpose(1, 2)  # [E, F, D]
    shared = [nvfp4.dequantize(one, torch.bfloat16).t() for one in arguments.get("shared_weights") or ()]
    experts = torch.arange(w1.shape[0], device=x.device)

    def run() -> torch.Tensor:
        chosen, order = ids.flatten().sort()
        ends = torch.searchsorted(chosen, experts, right=True).int()
        gate, up = torch._grouped_mm(x[order // num_slots], gate_up, offs=ends).float().chunk(2, dim=-1)
        hidden = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) * route_weights.flatten()[order, None]
        outputs = torch._grouped_mm(hidden.bfloat16(), down, offs=ends)
        back = torch.empty_like(outputs)
        back[order] = outputs
        total = back.view(num_tokens, num_slots, -1).sum(1, dtype=torch.float32)
        if shared:
            gate, up = (x @ shared[0]).float().clamp(max=limit), (x @ shared[1]).float().clamp(-limit, limit)
            total += (F.silu(gate) * up).bfloat16() @ shared[2]
        return total.to(x.dtype)

    return run


def _scaled_mm(arguments: Arguments) -> Callable[[], torch.Tensor]:
    pairs = []
    for value in (fp8.dequantize(arguments["x"]), fp8.dequantize(arguments["w"])):
        scale = value.float().abs().amax(-1, keepdim=True).clamp(min=1e-9) / 448.0
        pairs.append(((value / scale).to(torch.float8_e4m3fn), scale))
    (x, x_scale), (w, w_scale) = pairs
    columns, w_scale = w.t(), w_scale.t()
    return lambda: torch._scaled_mm(x, columns, scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16)


PUBLIC: dict[str, Public] = {
    "nvfp4_weight_only_linear": Public("tinygemm int4", _tinygemm, _has(torch.ops.aten, "_weight_int4pack_mm")),
    "nvfp4_weight_only_experts": Public("grouped_mm bf16", _grouped_mm, _has(torch, "_grouped_mm")),
    "nvfp4_experts": Public("grouped_mm bf16", _grouped_mm, _has(torch, "_grouped_mm")),
    "fp8_linear": Public("_scaled_mm FP8, scale per row", _scaled_mm, _has(torch, "_scaled_mm")),
}
"""Operation → the public kernel it is timed beside. Others have none that does the same work and comes with torch."""


def bound(op: str, sets: list[Arguments], wanted: Any) -> tuple[str, list[Callable[[], torch.Tensor]] | str]:
    """Return the name of the public kernel of an operation, and its calls, one per set of arguments, or why not.

    Args:
        op: the operation.
        sets: keyword arguments, weights included.
        wanted: our result for the first set.
    """
    public = PUBLIC.get(op)
    if public is None:
        return "", "none comes with torch"
    name = f"{public.name} (torch {torch.__version__})"
    missing = public.missing()
    if missing is not None:
        return name, missing
    try:
        calls = [public.bind(arguments) for arguments in sets]
        got = calls[0]()
        torch.cuda.synchronize()
    except RuntimeError as error:  # its own refusal of a size, which is what the report says
        return name, f"refused: {str(error).strip().splitlines()[0][:100]}"
    ours = next(iter(parts(wanted).values())).float()
    distances = (got.float() - ours).flatten(1).norm(dim=1) / ours.flatten(1).norm(dim=1)
    distance = float(distances.nanmedian())  # rows at the ends of the range, and rows of zeros, tell nothing
    if not distance <= NEAR:
        return name, f"its result is {distance:.2f} away from ours"
    return name, calls
