# SPDX-License-Identifier: Apache-2.0
"""grouped_linear: one weight per group of the input, y[:, g] = x[:, g] @ w[g].T (the first output projection).

Math       y[t, g, n] = sum_k  x[t, g, k] * w[g, n, k]
Numerics   as linear, nvfp4_linear and nvfp4_weight_only_linear: products and sum in fp32, one rounding to out_dtype.
           Each of the three is an operation of its own; the format of x and w decides which. Row-invariant.
Tolerance  verify/tolerance.py, "grouped_linear", "nvfp4_grouped_linear", "nvfp4_weight_only_grouped_linear"
Kernels    none yet
Source     docs/numerics.md, section "Operations"; DeepSeek-V4 reference code (`wo_a`)
"""

from __future__ import annotations

import torch

from megamoe.formats.nvfp4 import NvFp4Tensor, dequantize
from megamoe.ops.check import FLOATS, OUT_DTYPES, check
from megamoe.ops.dequant_cache import Weight, dequantized
from megamoe.ops.dispatch import pick
from megamoe.ops.matmul import row_invariant_matmul


def grouped_linear(x: torch.Tensor, w: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Multiply groups of activations by plain weights.

    Args:
        x: [T, G, K] bf16 or fp32. T may be 0.
        w: [G, N, K] bf16 or fp32.
        out_dtype: bf16 or fp32; None for the dtype of x.

    Returns:
        [T, G, N] out_dtype, contiguous, newly allocated.

    Raises:
        TypeError: x or w is not a bf16 or fp32 tensor.
        ValueError: the shapes do not agree, or out_dtype is not allowed.
        NotImplementedError: the device has no kernel for this operation.
    """
    check("grouped_linear", x=(x, "T G K", FLOATS), w=(w, "G N K", FLOATS), out_dtype=(out_dtype, OUT_DTYPES))
    run = pick("grouped_linear", x.device, reference)
    return run(x, w, out_dtype or x.dtype)  # type: ignore[no-any-return]


def nvfp4_grouped_linear(x: NvFp4Tensor, w: NvFp4Tensor, *, out_dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Multiply groups of NVFP4 activations by NVFP4 weights (W4A4).

    Args:
        x: [T, G, K] NVFP4, from quantize_nvfp4: one tensor scale per token and group. T may be 0.
        w: [G, N, K] NVFP4, one tensor scale per group, scales in either layout.
        out_dtype: bf16 or fp32.

    Returns:
        [T, G, N] out_dtype, contiguous, newly allocated.

    Raises:
        TypeError: x or w is not NVFP4.
        ValueError: the shapes do not agree, or out_dtype is not allowed.
        NotImplementedError: the device has no kernel for this operation.
    """
    check(
        "nvfp4_grouped_linear",
        x=(x, "T G K", (NvFp4Tensor,)),
        w=(w, "G N K", (NvFp4Tensor,)),
        out_dtype=(out_dtype, FLOATS),
    )
    run = pick("nvfp4_grouped_linear", x.device, reference_nvfp4)
    return run(x, w, out_dtype)  # type: ignore[no-any-return]


def nvfp4_weight_only_grouped_linear(
    x: torch.Tensor, w: NvFp4Tensor, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Multiply groups of plain activations by NVFP4 weights (W4A16).

    Args:
        x: [T, G, K] bf16 or fp32. T may be 0.
        w: [G, N, K] NVFP4, one tensor scale per group, scales in either layout.
        out_dtype: bf16 or fp32; None for the dtype of x.

    Returns:
        [T, G, N] out_dtype, contiguous, newly allocated.

    Raises:
        TypeError: x is not a bf16 or fp32 tensor, or w is not NVFP4.
        ValueError: the shapes do not agree, or out_dtype is not allowed.
        NotImplementedError: the device has no kernel for this operation.
    """
    check(
        "nvfp4_weight_only_grouped_linear",
        x=(x, "T G K", FLOATS),
        w=(w, "G N K", (NvFp4Tensor,)),
        out_dtype=(out_dtype, OUT_DTYPES),
    )
    run = pick("nvfp4_weight_only_grouped_linear", x.device, reference)
    return run(x, w, out_dtype or x.dtype)  # type: ignore[no-any-return]


def reference(x: torch.Tensor, w: Weight, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute grouped_linear or nvfp4_weight_only_grouped_linear in plain torch."""
    values, weights = x.float(), dequantized(w)
    groups = [row_invariant_matmul(values[:, group], weights[group]) for group in range(weights.shape[0])]
    return torch.stack(groups, dim=1).to(out_dtype)


def reference_nvfp4(x: NvFp4Tensor, w: NvFp4Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute nvfp4_grouped_linear in plain torch."""
    return reference(dequantize(x, torch.float32), w, out_dtype)
