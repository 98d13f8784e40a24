# SPDX-License-Identifier: Apache-2.0
"""fp8_experts: the routed experts of a layer with FP8 128 x 128 weights and FP8 activations.

Math       ops/expert_common.py, over the dequantized weights and activations
Numerics   ops/expert_common.py. x and h are rounded to FP8 with one scale per 128 values of a row (h straight from
           fp32, after the route weight). Values are code * scale in fp32; products and sums fp32.
Tolerance  verify/tolerance.py, "fp8_experts"
Kernels    none yet
Source     docs/numerics.md, sections "FP8" and "Operations"
"""

from __future__ import annotations

import torch

from megamoe.formats import fp8
from megamoe.formats.fp8 import Fp8BlockTensor
from megamoe.ops.dispatch import pick
from megamoe.ops.expert_common import check_experts, sum_of_experts


def fp8_experts(
    x: torch.Tensor,
    route_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    w1: Fp8BlockTensor,
    w3: Fp8BlockTensor,
    w2: Fp8BlockTensor,
    *,
    shared_output: torch.Tensor | None = None,
    swiglu_limit: float | None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Quantize tokens, send them through their experts and add the results.

    Args:
        x: [T, D] bf16 or fp32, not quantized yet. T may be 0.
        route_weights: [T, A] fp32, of route_experts.
        expert_ids: [T, A] int64, of route_experts; E and more for experts of other ranks, -1 for none. A token with
            nothing but -1 is nobody: its output is 0.
        w1: [E, F, D] FP8 blocks, gate.
        w3: [E, F, D] FP8 blocks, up.
        w2: [E, D, F] FP8 blocks, down.
        shared_output: [T, D] bf16 or fp32, added to the sum; None for nothing.
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
    op = "fp8_experts"
    check_experts(
        op, x, route_weights, expert_ids, (w1, w3, w2), (Fp8BlockTensor,), shared_output, swiglu_limit, out_dtype
    )
    run = pick(op, x.device, reference)
    return run(  # type: ignore[no-any-return]
        x, route_weights, expert_ids, w1, w3, w2, shared_output, swiglu_limit, out_dtype or x.dtype
    )


def reference(
    x: torch.Tensor,
    route_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    w1: Fp8BlockTensor,
    w3: Fp8BlockTensor,
    w2: Fp8BlockTensor,
    shared_output: torch.Tensor | None,
    swiglu_limit: float | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute fp8_experts in plain torch."""

    def rounded(values: torch.Tensor) -> torch.Tensor:
        return fp8.dequantize(fp8.quantize_rows(values))

    return sum_of_experts(
        "fp8_experts",
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
