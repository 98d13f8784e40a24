# SPDX-License-Identifier: Apache-2.0
"""clamped_swiglu: silu(min(gate, limit)) * clamp(up, -limit, limit), times the route weight of the row.

Math       y[t, f] = g / (1 + exp(-g)) * u * row_weight[t],  g = min(gate[t, f], limit),  u = clamp(up[t, f], +-limit)
Numerics   fp32 from the inputs to the single rounding to out_dtype. The gate is clamped from above only, up on both
           sides, both before the activation. Routed and shared experts use the same clamp. NaN stays NaN.
           Row-invariant.
Tolerance  verify/tolerance.py, "clamped_swiglu"
Kernels    one pass
Source     docs/numerics.md, section "Operations"; DeepSeek-V4 reference code
"""

from __future__ import annotations

import torch

from megamoe.ops.check import FLOAT32, FLOATS, OUT_DTYPES, check
from megamoe.ops.dispatch import pick, traced
from megamoe.ops.row_math import silu


def clamped_swiglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    limit: float | None,
    row_weight: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Combine an expert's gate and up projections.

    Args:
        gate: [T, F] bf16 or fp32. T may be 0.
        up: [T, F] bf16 or fp32.
        limit: the clamp, positive; None for no clamp.
        row_weight: [T] fp32, multiplies each row; None for no weight.
        out_dtype: bf16 or fp32; None for the dtype of gate.

    Returns:
        [T, F] out_dtype, newly allocated.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, or limit is not positive.
        NotImplementedError: the device has no kernel for this operation.
    """
    check(
        "clamped_swiglu",
        gate=(gate, "T F", FLOATS),
        up=(up, "T F", FLOATS),
        row_weight=(row_weight, "?T", FLOAT32),
        out_dtype=(out_dtype, OUT_DTYPES),
    )
    check_limit("clamped_swiglu", limit)
    run = pick("clamped_swiglu", gate.device, reference)
    return run(gate, up, limit, row_weight, out_dtype or gate.dtype)  # type: ignore[no-any-return]


def check_limit(op: str, limit: float | None) -> None:
    """Refuse a clamp that is not a positive number; a limit of 0 would silence every expert."""
    if limit is not None and not limit > 0.0:
        raise ValueError(f"{op}: the SwiGLU limit must be positive; got {limit}. Pass None for no clamp.")


def reference(
    gate: torch.Tensor,
    up: torch.Tensor,
    limit: float | None,
    row_weight: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute clamped_swiglu in plain torch."""
    gate, up = gate.float(), up.float()
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = silu(gate).mul_(up)
    if row_weight is not None:
        y *= row_weight[:, None]
    return y.to(out_dtype)


def _run(
    gate: torch.Tensor, up: torch.Tensor, limit: float | None, row_weight: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    run = pick("clamped_swiglu", gate.device, reference)
    return run(gate, up, limit, row_weight, out_dtype)  # type: ignore[no-any-return]


def _fake(
    gate: torch.Tensor, up: torch.Tensor, limit: float | None, row_weight: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty(gate.shape, dtype=out_dtype, device=gate.device)


traced(
    "clamped_swiglu",
    {
        "clamped_swiglu": "(Tensor gate, Tensor up, float? limit, Tensor? row_weight, ScalarType out_dtype) -> Tensor",
    },
    {"clamped_swiglu": _run},
    {"clamped_swiglu": _fake},
)
