# SPDX-License-Identifier: Apache-2.0
"""rms_norm: y = weight * x / sqrt(mean(x^2) + eps) over the last dimension.

Math       y[.., k] = x[.., k] * rsqrt(mean_k(x^2) + eps) * weight[k]; without a weight the last factor is absent
Numerics   fp32 inside (a bf16 input is widened first, so the per-head query norm is an fp32 norm, too); the weight is
           used in fp32 and not offset by one; one rounding to out_dtype. Row-invariant.
Tolerance  verify/tolerance.py, "rms_norm"
Kernels    one pass, a row in registers
Source     docs/numerics.md, section "Operations"; DeepSeek-V4 reference code. It takes the mean of the per-head query
           norm in bf16; here, as in the serving engines, that norm is fp32 like every other.
"""

from __future__ import annotations

import torch

from megamoe.formats.division import divide
from megamoe.ops.check import FLOATS, OUT_DTYPES, check
from megamoe.ops.dispatch import pick, traced
from megamoe.ops.row_math import row_sum


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Normalize rows by their root mean square.

    Args:
        x: [..., K] bf16 or fp32.
        weight: [K] bf16 or fp32, or None.
        eps: added to the mean of squares.
        out_dtype: bf16 or fp32; None for the dtype of x.

    Returns:
        [..., K] out_dtype, newly allocated.

    Raises:
        TypeError: x or weight is not a bf16 or fp32 tensor.
        ValueError: weight does not have K values, or out_dtype is not allowed.
        NotImplementedError: the device has no kernel for this operation.
    """
    check("rms_norm", x=(x, "... K", FLOATS), weight=(weight, "?K", FLOATS), out_dtype=(out_dtype, OUT_DTYPES))
    run = pick("rms_norm", x.device, reference)
    return run(x, weight, eps, out_dtype or x.dtype)  # type: ignore[no-any-return]


def reference(x: torch.Tensor, weight: torch.Tensor | None, eps: float, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute rms_norm in plain torch."""
    values = x.float()
    mean_square = divide(row_sum(values.square()), x.shape[-1])  # [..., 1]
    y = values * mean_square.add_(eps).rsqrt_()
    if weight is not None:
        y *= weight.float()
    return y.to(out_dtype)


def _fake(x: torch.Tensor, weight: torch.Tensor | None, eps: float, out_dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(x.shape, dtype=out_dtype, device=x.device)


def _run(x: torch.Tensor, weight: torch.Tensor | None, eps: float, out_dtype: torch.dtype) -> torch.Tensor:
    return pick("rms_norm", x.device, reference)(x, weight, eps, out_dtype)  # type: ignore[no-any-return]


traced(
    "rms_norm",
    {"rms_norm": "(Tensor x, Tensor? weight, float eps, ScalarType out_dtype) -> Tensor"},
    {"rms_norm": _run},
    {"rms_norm": _fake},
)
