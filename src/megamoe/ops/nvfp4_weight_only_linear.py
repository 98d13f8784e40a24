# SPDX-License-Identifier: Apache-2.0
"""nvfp4_weight_only_linear: y = x @ w.T with plain activations and NVFP4 weights (W4A16).

Math       y[t, n] = sum_k  x[t, k] * w[n, k]      over the dequantized weights
Numerics   weights are code * block scale * tensor scale in fp32; products and sum in fp32; one rounding to out_dtype.
           Row-invariant. A kernel may expand code * block scale (exact in bf16) and multiply by the tensor scale
           afterwards: the same numbers up to fp32 rounding.
Tolerance  verify/tolerance.py, "nvfp4_weight_only_linear"
Kernels    sm90: x bf16, w in fragment order (w.fragments()). With NVFP4 activations it is a different operation:
           nvfp4_linear.
Source     docs/numerics.md, section "NVFP4"
"""

from __future__ import annotations

import torch

from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.ops.check import FLOATS, OUT_DTYPES, check
from megamoe.ops.containers import packed, unpacked
from megamoe.ops.dequant_cache import dequantized
from megamoe.ops.dispatch import pick, traced
from megamoe.ops.matmul import row_invariant_matmul


def nvfp4_weight_only_linear(x: torch.Tensor, w: NvFp4Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Multiply plain activations by NVFP4 weights.

    Args:
        x: [T, K] bf16 or fp32. T may be 0.
        w: [N, K] NVFP4, in any layout the reference reads; a kernel names the one it takes.
        out_dtype: bf16 or fp32; None for the dtype of x.

    Returns:
        [T, N] out_dtype, contiguous, newly allocated.

    Raises:
        TypeError: x is not a bf16 or fp32 tensor, or w is not NVFP4.
        ValueError: the shapes do not agree, or out_dtype is not allowed.
        NotImplementedError: the device has no kernel for this operation.
    """
    check(
        "nvfp4_weight_only_linear",
        x=(x, "T K", FLOATS),
        w=(w, "N K", (NvFp4Tensor,)),
        out_dtype=(out_dtype, OUT_DTYPES),
    )
    run = pick("nvfp4_weight_only_linear", x.device, reference)
    return run(x, w, out_dtype or x.dtype)  # type: ignore[no-any-return]


def reference(x: torch.Tensor, w: NvFp4Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute nvfp4_weight_only_linear in plain torch."""
    return row_invariant_matmul(x.float(), dequantized(w)).to(out_dtype)


def _run(x: torch.Tensor, w: list[torch.Tensor], form: str, out_dtype: torch.dtype) -> torch.Tensor:
    return pick("nvfp4_weight_only_linear", x.device, reference)(x, unpacked(w, form), out_dtype)  # type: ignore[no-any-return]


def _fake(x: torch.Tensor, w: list[torch.Tensor], form: str, out_dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(x.shape[0], w[0].shape[0], dtype=out_dtype, device=x.device)


def _call(x: torch.Tensor, w: NvFp4Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return torch.ops.megamoe.nvfp4_weight_only_linear(x, *packed(w), out_dtype)  # type: ignore[no-any-return]


traced(
    "nvfp4_weight_only_linear",
    {"nvfp4_weight_only_linear": "(Tensor x, Tensor[] w, str form, ScalarType out_dtype) -> Tensor"},
    {"nvfp4_weight_only_linear": _run},
    {"nvfp4_weight_only_linear": _fake},
    _call,
)
