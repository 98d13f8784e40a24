# SPDX-License-Identifier: Apache-2.0
"""linear: y = x @ w.T with plain weights.

Math       y[t, n] = sum_k  x[t, k] * w[n, k]
Numerics   products and sum in fp32 (bf16 inputs are widened, every product of them is exact); one rounding to
           out_dtype. Row-invariant.
Tolerance  verify/tolerance.py, "linear"
Kernels    sm90: wgmma on bf16 x and w, one order of sums for any number of tokens
Source     docs/numerics.md, section "Operations"
"""

from __future__ import annotations

import torch

from megamoe.ops.check import FLOATS, OUT_DTYPES, check
from megamoe.ops.dequant_cache import dequantized
from megamoe.ops.dispatch import pick, traced
from megamoe.ops.matmul import row_invariant_matmul


def linear(x: torch.Tensor, w: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Multiply activations by plain weights.

    Args:
        x: [T, K] bf16 or fp32. T may be 0.
        w: [N, K] bf16 or fp32.
        out_dtype: bf16 or fp32; None for the dtype of x.

    Returns:
        [T, N] out_dtype, contiguous, newly allocated.

    Raises:
        TypeError: x or w is not a bf16 or fp32 tensor.
        ValueError: the shapes do not agree, or out_dtype is not allowed.
        NotImplementedError: the device has no kernel for this operation.
    """
    check("linear", x=(x, "T K", FLOATS), w=(w, "N K", FLOATS), out_dtype=(out_dtype, OUT_DTYPES))
    run = pick("linear", x.device, reference)
    return run(x, w, out_dtype or x.dtype)  # type: ignore[no-any-return]


def reference(x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute linear in plain torch."""
    return row_invariant_matmul(x.float(), dequantized(w)).to(out_dtype)


def _run(x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return pick("linear", x.device, reference)(x, w, out_dtype)  # type: ignore[no-any-return]


def _fake(x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(x.shape[0], w.shape[0], dtype=out_dtype, device=x.device)


traced(
    "linear",
    {"linear": "(Tensor x, Tensor w, ScalarType out_dtype) -> Tensor"},
    {"linear": _run},
    {"linear": _fake},
)
