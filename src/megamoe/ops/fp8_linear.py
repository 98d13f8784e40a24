# SPDX-License-Identifier: Apache-2.0
"""fp8_linear: y = x @ w.T with FP8 activations (one scale per 128 of a row) and FP8 weights (one per 128 x 128).

Math       y[t, n] = sum_k  x[t, k] * w[n, k]      over the dequantized values
Numerics   values are code * scale in fp32; products and sum in fp32; one rounding to out_dtype. Row-invariant. A kernel
           may sum codes per 128 of K and multiply by both scales afterwards: the same numbers up to fp32 rounding.
Tolerance  verify/tolerance.py, "fp8_linear"
Kernels    sm90: exact products in fp16 or bf16, fp32 sums; N a multiple of 16, K of 128, groups of 128, weights as they
           are loaded. They cannot raise for NaN without waiting for the device: NaN codes and scales give NaN results
Source     docs/numerics.md, section "FP8"
"""

from __future__ import annotations

import torch

from megamoe.formats.fp8 import Fp8BlockTensor, Fp8RowTensor, dequantize
from megamoe.ops.check import FLOATS, check
from megamoe.ops.containers import packed_fp8, unpacked_fp8
from megamoe.ops.dequant_cache import dequantized
from megamoe.ops.dispatch import pick, traced
from megamoe.ops.matmul import row_invariant_matmul


def fp8_linear(x: Fp8RowTensor, w: Fp8BlockTensor, *, out_dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Multiply FP8 activations by FP8 weights.

    Args:
        x: [T, K] FP8 rows, from quantize_fp8_rows. T may be 0.
        w: [N, K] FP8 blocks.
        out_dtype: bf16 or fp32.

    Returns:
        [T, N] out_dtype, contiguous, newly allocated.

    Raises:
        TypeError: x or w is not the container named above.
        ValueError: the shapes do not agree, or out_dtype is not allowed.
        NotImplementedError: the device has no kernel for this operation.
    """
    check("fp8_linear", x=(x, "T K", (Fp8RowTensor,)), w=(w, "N K", (Fp8BlockTensor,)), out_dtype=(out_dtype, FLOATS))
    run = pick("fp8_linear", x.device, reference)
    return run(x, w, out_dtype)  # type: ignore[no-any-return]


def reference(x: Fp8RowTensor, w: Fp8BlockTensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute fp8_linear in plain torch."""
    return row_invariant_matmul(dequantize(x, torch.float32), dequantized(w)).to(out_dtype)


def _run(x: list[torch.Tensor], group: int, w: list[torch.Tensor], out_dtype: torch.dtype) -> torch.Tensor:
    run = pick("fp8_linear", x[0].device, reference)
    return run(Fp8RowTensor(*unpacked_fp8(x), group), Fp8BlockTensor(*unpacked_fp8(w)), out_dtype)  # type: ignore[no-any-return]


def _fake(x: list[torch.Tensor], group: int, w: list[torch.Tensor], out_dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(x[0].shape[0], w[0].shape[0], dtype=out_dtype, device=x[0].device)


def _call(x: Fp8RowTensor, w: Fp8BlockTensor, out_dtype: torch.dtype) -> torch.Tensor:
    return torch.ops.megamoe.fp8_linear(packed_fp8(x), x.group, packed_fp8(w), out_dtype)  # type: ignore[no-any-return]


traced(
    "fp8_linear",
    {"fp8_linear": "(Tensor[] x, int group, Tensor[] w, ScalarType out_dtype) -> Tensor"},
    {"fp8_linear": _run},
    {"fp8_linear": _fake},
    _call,
)
