# SPDX-License-Identifier: Apache-2.0
"""nvfp4_linear: y = x @ w.T with NVFP4 activations and NVFP4 weights (W4A4).

Math       y[t, n] = sum_k  x[t, k] * w[n, k]      over the dequantized values
Numerics   values are code * block scale * tensor scale in fp32; products and sum in fp32; one rounding to out_dtype.
           Row-invariant. A kernel may sum code * block scale products and multiply by both tensor scales afterwards:
           the same numbers up to fp32 rounding.
Tolerance  verify/tolerance.py, "nvfp4_linear"
Kernels    sm90: x with row-major scales, w in fragment order (w.fragments()). Weight-only W4A16 is a different
           operation: nvfp4_weight_only_linear.
Source     docs/numerics.md, section "NVFP4"
"""

from __future__ import annotations

import torch

from megamoe.formats.nvfp4 import NvFp4Tensor, dequantize
from megamoe.ops.check import FLOATS, check
from megamoe.ops.containers import packed, unpacked
from megamoe.ops.dequant_cache import dequantized
from megamoe.ops.dispatch import pick, traced
from megamoe.ops.matmul import row_invariant_matmul


def nvfp4_linear(x: NvFp4Tensor, w: NvFp4Tensor, *, out_dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Multiply NVFP4 activations by NVFP4 weights.

    Args:
        x: [T, K] NVFP4, from quantize_nvfp4. T may be 0.
        w: [N, K] NVFP4, in any layout the reference reads; a kernel names the one it takes.
        out_dtype: bf16 or fp32.

    Returns:
        [T, N] out_dtype, contiguous, newly allocated.

    Raises:
        TypeError: x or w is not NVFP4.
        ValueError: the shapes do not agree, or out_dtype is not allowed.
        NotImplementedError: the device has no kernel for this operation.
    """
    check("nvfp4_linear", x=(x, "T K", (NvFp4Tensor,)), w=(w, "N K", (NvFp4Tensor,)), out_dtype=(out_dtype, FLOATS))
    run = pick("nvfp4_linear", x.device, reference)
    return run(x, w, out_dtype)  # type: ignore[no-any-return]


def reference(x: NvFp4Tensor, w: NvFp4Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute nvfp4_linear in plain torch."""
    return row_invariant_matmul(dequantize(x, torch.float32), dequantized(w)).to(out_dtype)


def _run(
    x: list[torch.Tensor], x_form: str, w: list[torch.Tensor], w_form: str, out_dtype: torch.dtype
) -> torch.Tensor:
    run = pick("nvfp4_linear", x[0].device, reference)
    return run(unpacked(x, x_form), unpacked(w, w_form), out_dtype)  # type: ignore[no-any-return]


def _fake(
    x: list[torch.Tensor], x_form: str, w: list[torch.Tensor], w_form: str, out_dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty(x[0].shape[0], w[0].shape[0], dtype=out_dtype, device=x[0].device)


def _call(x: NvFp4Tensor, w: NvFp4Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return torch.ops.megamoe.nvfp4_linear(*packed(x), *packed(w), out_dtype)  # type: ignore[no-any-return]


traced(
    "nvfp4_linear",
    {"nvfp4_linear": "(Tensor[] x, str x_form, Tensor[] w, str w_form, ScalarType out_dtype) -> Tensor"},
    {"nvfp4_linear": _run},
    {"nvfp4_linear": _fake},
    _call,
)
