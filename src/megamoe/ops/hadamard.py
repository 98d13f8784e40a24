# SPDX-License-Identifier: Apache-2.0
"""hadamard: rotate the last dimension by the orthonormal Sylvester (natural order) Walsh-Hadamard matrix.

Math       y[i] = n^-0.5 * sum_j (-1)^popcount(i & j) * x[j]          n a power of two
Numerics   fp32 butterflies, strides n/2, n/4, .., 1 in this order; one product by fp32(n^-0.5); one rounding to
           out_dtype
           Every row is computed by the same elementwise steps, so its bits do not depend on the other rows.
Tolerance  verify/tolerance.py, "hadamard": kernels may order the sums differently, so fp32 rounding of n terms
Kernels    none yet; the CPU reference runs
Source     DeepSeek-V4 inference code: index queries and keys are rotated before they are rounded to FP4;
           docs/numerics.md, section "Operations"
"""

from __future__ import annotations

import torch

from megamoe.ops.check import FLOATS, check
from megamoe.ops.dispatch import pick


def hadamard(x: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Rotate the last dimension by the normalised Hadamard matrix, which is its own inverse.

    Args:
        x: [..., n] bf16 or fp32, n a power of two (1 is allowed and changes nothing).
        out_dtype: bf16 or fp32; the dtype of x when None.

    Returns:
        [..., n] out_dtype, contiguous, newly allocated.

    Raises:
        TypeError: x is not bf16 or fp32.
        ValueError: n is not a power of two, or out_dtype is not allowed.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    n = check("hadamard", x=(x, "... n", FLOATS), out_dtype=(out_dtype, FLOATS))["n"]
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard: the last dimension must be a power of two; got {n}. Pad x with zeros.")
    y: torch.Tensor = pick("hadamard", x.device, reference)(x, out_dtype)
    return y


def reference(x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute the operation's meaning in plain torch."""
    n = x.shape[-1]
    y = x.to(torch.float32)
    half = n // 2
    while half:
        a, b = y.reshape(*x.shape[:-1], n // (2 * half), 2, half).unbind(-2)  # stride `half` between the two
        y = torch.stack((a + b, a - b), dim=-2)
        half //= 2
    y = y.reshape(x.shape) * torch.full((), n**-0.5, dtype=torch.float32, device=x.device)
    return y.to(out_dtype).contiguous()
