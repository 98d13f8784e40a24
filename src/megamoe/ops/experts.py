# SPDX-License-Identifier: Apache-2.0
"""experts: the routed experts of a layer with plain weights.

Math       ops/expert_common.py
Numerics   ops/expert_common.py; h is rounded to the dtype of x before w2. Products and sums fp32.
Tolerance  verify/tolerance.py, "experts"
Kernels    none yet
Source     docs/numerics.md, section "Operations"; DeepSeek-V4 reference code
"""

from __future__ import annotations

import torch

from megamoe.ops.check import FLOATS
from megamoe.ops.dequant_cache import Weight
from megamoe.ops.dispatch import pick
from megamoe.ops.expert_common import check_experts, sum_of_experts


def experts(
    x: torch.Tensor,
    route_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    w1: torch.Tensor,
    w3: torch.Tensor,
    w2: torch.Tensor,
    *,
    shared_output: torch.Tensor | None = None,
    swiglu_limit: float | None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Send tokens through their experts and add the results.

    Args:
        x: [T, D] bf16 or fp32. T may be 0.
        route_weights: [T, A] fp32, of route_experts.
        expert_ids: [T, A] int64, of route_experts; E and more for experts of other ranks, -1 for none. A token with
            nothing but -1 is nobody: its output is 0.
        w1: [E, F, D] bf16 or fp32, gate.
        w3: [E, F, D] bf16 or fp32, up.
        w2: [E, D, F] bf16 or fp32, down.
        shared_output: [T, D] bf16 or fp32, added to the sum; None for nothing.
        swiglu_limit: the clamp of gate and up, positive; None for no clamp.
        out_dtype: bf16 or fp32; None for the dtype of x.

    Returns:
        [T, D] out_dtype, newly allocated.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, the limit is not positive, or (on the CPU) an expert id is below -1.
        NotImplementedError: the device has no kernel for this operation.
    """
    check_experts("experts", x, route_weights, expert_ids, (w1, w3, w2), FLOATS, shared_output, swiglu_limit, out_dtype)
    run = pick("experts", x.device, reference)
    return run(  # type: ignore[no-any-return]
        x, route_weights, expert_ids, w1, w3, w2, shared_output, swiglu_limit, out_dtype or x.dtype
    )


def reference(
    x: torch.Tensor,
    route_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    w1: Weight,
    w3: Weight,
    w2: Weight,
    shared_output: torch.Tensor | None,
    swiglu_limit: float | None,
    out_dtype: torch.dtype,
    op: str = "experts",
) -> torch.Tensor:
    """Compute experts in plain torch; the weight-only operation is the same over dequantized weights."""
    return sum_of_experts(
        op,
        x,
        route_weights,
        expert_ids,
        (w1, w3, w2),
        shared_output,
        swiglu_limit,
        out_dtype,
        round_input=torch.Tensor.float,
        round_hidden=lambda hidden: hidden.to(x.dtype).float(),
    )
