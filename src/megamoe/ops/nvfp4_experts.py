# SPDX-License-Identifier: Apache-2.0
"""nvfp4_experts: the routed experts of a layer with NVFP4 weights and NVFP4 activations (W4A4).

Math       ops/expert_common.py, over the dequantized weights and activations
Numerics   ops/expert_common.py. x and h are rounded to NVFP4 with one dynamic tensor scale per token (h straight from
           fp32, after the route weight). Values are code * block scale * tensor scale in fp32; products and sums fp32.
Tolerance  verify/tolerance.py, "nvfp4_experts"
Kernels    sm90: x bf16, weights in fragment order (w.fragments()).
           Weight-only W4A16 is a different operation: nvfp4_weight_only_experts.
Source     docs/numerics.md, sections "NVFP4" and "Operations"
"""

from __future__ import annotations

import torch

from megamoe.formats import nvfp4
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.ops import nvfp4_linear
from megamoe.ops.containers import packed, unpacked
from megamoe.ops.dispatch import pick, traced
from megamoe.ops.expert_common import check_experts, shared_expert, sum_of_experts, without_nobody

Weights = tuple[NvFp4Tensor, NvFp4Tensor, NvFp4Tensor]


def nvfp4_experts(
    x: torch.Tensor,
    route_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    w1: NvFp4Tensor,
    w3: NvFp4Tensor,
    w2: NvFp4Tensor,
    *,
    shared_output: torch.Tensor | None = None,
    shared_weights: Weights | None = None,
    swiglu_limit: float | None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Quantize tokens, send them through their experts and add the results.

    Args:
        x: [T, D] bf16 or fp32, not quantized yet. T may be 0.
        route_weights: [T, A] fp32, of route_experts.
        expert_ids: [T, A] int64, of route_experts; E and more for experts of other ranks, -1 for none. A token with
            nothing but -1 is nobody: its output is 0.
        w1: [E, F, D] NVFP4, gate.
        w3: [E, F, D] NVFP4, up; its tensor scales may differ from those of w1.
        w2: [E, D, F] NVFP4, down.
        shared_output: [T, D] bf16 or fp32, added to the sum; None for nothing.
        shared_weights: w1 and w3 [F, D] and w2 [D, F] of the shared expert, NVFP4, in place of its output.
        swiglu_limit: the clamp of gate and up, positive; None for no clamp.
        out_dtype: bf16 or fp32; None for the dtype of x.

    Returns:
        [T, D] out_dtype, newly allocated.

    Raises:
        TypeError: a dtype or container is not as above.
        ValueError: a shape is not as above, the limit is not positive, or (on the CPU) an expert id is below -1 or x is
            not finite.
        NotImplementedError: the device has no kernel for this operation.
    """
    op = "nvfp4_experts"
    check_experts(
        op,
        x,
        route_weights,
        expert_ids,
        (w1, w3, w2),
        (NvFp4Tensor,),
        shared_output,
        swiglu_limit,
        out_dtype,
        shared_weights,
    )
    run = pick(op, x.device, reference)
    return run(  # type: ignore[no-any-return]
        x, route_weights, expert_ids, w1, w3, w2, shared_output, shared_weights, swiglu_limit, out_dtype or x.dtype
    )


def reference(
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
    """Compute nvfp4_experts in plain torch."""

    def rounded(values: torch.Tensor) -> torch.Tensor:
        return nvfp4.dequantize(nvfp4.quantize(values, scale_per="row"))

    if shared_weights is not None:
        shared_output = shared_expert(
            without_nobody(x, expert_ids),
            shared_weights,
            swiglu_limit,
            rounded=lambda values: nvfp4.quantize(values, scale_per="row"),
            times=nvfp4_linear.reference,
        )
    return sum_of_experts(
        "nvfp4_experts",
        x,
        route_weights,
        expert_ids,
        (w1, w3, w2),
        shared_output,
        swiglu_limit,
        out_dtype,
        round_input=rounded,
        round_hidden=rounded,
    )


def _run(
    x: torch.Tensor,
    route_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    w1: list[torch.Tensor],
    w3: list[torch.Tensor],
    w2: list[torch.Tensor],
    shared_weights: list[torch.Tensor],
    forms: str,
    shared_output: torch.Tensor | None,
    swiglu_limit: float | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    tensors = [w1, w3, w2, *(shared_weights[index : index + 3] for index in range(0, len(shared_weights), 3))]
    weights = [unpacked(w, form) for w, form in zip(tensors, forms.split(","), strict=True)]
    shared = tuple(weights[3:]) or None
    run = pick("nvfp4_experts", x.device, reference)
    return run(x, route_weights, expert_ids, *weights[:3], shared_output, shared, swiglu_limit, out_dtype)  # type: ignore[no-any-return]


def _fake(
    x: torch.Tensor,
    route_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    w1: list[torch.Tensor],
    w3: list[torch.Tensor],
    w2: list[torch.Tensor],
    shared_weights: list[torch.Tensor],
    forms: str,
    shared_output: torch.Tensor | None,
    swiglu_limit: float | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return torch.empty(x.shape, dtype=out_dtype, device=x.device)


def _call(
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
    tensors, forms = zip(*map(packed, (w1, w3, w2, *(shared_weights or ()))), strict=True)
    shared = [part for one in tensors[3:] for part in one]
    return torch.ops.megamoe.nvfp4_experts(  # type: ignore[no-any-return]
        x, route_weights, expert_ids, *tensors[:3], shared, ",".join(forms), shared_output, swiglu_limit, out_dtype
    )


traced(
    "nvfp4_experts",
    {
        "nvfp4_experts": "(Tensor x, Tensor route_weights, Tensor expert_ids, Tensor[] w1, Tensor[] w3, Tensor[] w2, "
        "Tensor[] shared_weights, str forms, Tensor? shared_output, float? swiglu_limit, ScalarType out_dtype) "
        "-> Tensor"
    },
    {"nvfp4_experts": _run},
    {"nvfp4_experts": _fake},
    _call,
)
