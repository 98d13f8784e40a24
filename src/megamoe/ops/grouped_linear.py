# SPDX-License-Identifier: Apache-2.0
"""grouped_linear: one weight per group of the input, y[:, g] = x[:, g] @ w[g].T (the first output projection).

Math       y[t, g, n] = sum_k  x[t, g, k] * w[g, n, k]
Numerics   as the linear of the same formats: products and sum in fp32, one rounding to out_dtype. Each of
           the four is an operation of its own; the format of x and w decides which. Row-invariant.
Tolerance  verify/tolerance.py, under the names of the four
Kernels    sm90: NVFP4 weights stream past up to 16 tokens, more go through wgmma; the two paths add in different
           orders. bf16 weights always go through wgmma, in one order. FP8 weights: as fp8_linear, the border at 128.
Source     docs/numerics.md, section "Operations"; DeepSeek-V4 reference code (`wo_a`)
"""

from __future__ import annotations

import torch

from megamoe.formats import fp8
from megamoe.formats.fp8 import Fp8BlockTensor, Fp8RowTensor
from megamoe.formats.nvfp4 import NvFp4Tensor, dequantize
from megamoe.ops.check import FLOATS, OUT_DTYPES, check
from megamoe.ops.containers import packed, packed_fp8, unpacked, unpacked_fp8
from megamoe.ops.dequant_cache import Weight, dequantized
from megamoe.ops.dispatch import pick, traced
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


def fp8_grouped_linear(x: Fp8RowTensor, w: Fp8BlockTensor, *, out_dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Multiply groups of FP8 activations by FP8 weights.

    Args:
        x: [T, G, K] FP8 rows, from quantize_fp8_rows: one scale per 128 of a token's group. T may be 0.
        w: [G, N, K] FP8 blocks; no block lies across two groups.
        out_dtype: bf16 or fp32.

    Returns:
        [T, G, N] out_dtype, contiguous, newly allocated.

    Raises:
        TypeError: x or w is not the container named above.
        ValueError: the shapes do not agree, or out_dtype is not allowed.
        NotImplementedError: the device has no kernel for this operation.
    """
    check(
        "fp8_grouped_linear",
        x=(x, "T G K", (Fp8RowTensor,)),
        w=(w, "G N K", (Fp8BlockTensor,)),
        out_dtype=(out_dtype, FLOATS),
    )
    run = pick("fp8_grouped_linear", x.device, reference_fp8)
    return run(x, w, out_dtype)  # type: ignore[no-any-return]


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


def reference_fp8(x: Fp8RowTensor, w: Fp8BlockTensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute fp8_grouped_linear in plain torch."""
    return reference(fp8.dequantize(x, torch.float32), w, out_dtype)


def _run(x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return pick("grouped_linear", x.device, reference)(x, w, out_dtype)  # type: ignore[no-any-return]


def _fake(x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*x.shape[:2], w.shape[1], dtype=out_dtype, device=x.device)


def _run_fp8(x: list[torch.Tensor], group: int, w: list[torch.Tensor], out_dtype: torch.dtype) -> torch.Tensor:
    run = pick("fp8_grouped_linear", x[0].device, reference_fp8)
    return run(Fp8RowTensor(*unpacked_fp8(x), group), Fp8BlockTensor(*unpacked_fp8(w)), out_dtype)  # type: ignore[no-any-return]


def _fake_fp8(x: list[torch.Tensor], group: int, w: list[torch.Tensor], out_dtype: torch.dtype) -> torch.Tensor:
    return _fake(x[0], w[0], out_dtype)


def _call_fp8(x: Fp8RowTensor, w: Fp8BlockTensor, out_dtype: torch.dtype) -> torch.Tensor:
    return torch.ops.megamoe.fp8_grouped_linear(packed_fp8(x), x.group, packed_fp8(w), out_dtype)  # type: ignore[no-any-return]


def _run_nvfp4(
    x: list[torch.Tensor], x_form: str, w: list[torch.Tensor], w_form: str, out_dtype: torch.dtype
) -> torch.Tensor:
    run = pick("nvfp4_grouped_linear", x[0].device, reference_nvfp4)
    return run(unpacked(x, x_form), unpacked(w, w_form), out_dtype)  # type: ignore[no-any-return]


def _fake_nvfp4(
    x: list[torch.Tensor], x_form: str, w: list[torch.Tensor], w_form: str, out_dtype: torch.dtype
) -> torch.Tensor:
    return _fake(x[0], w[0], out_dtype)


def _call_nvfp4(x: NvFp4Tensor, w: NvFp4Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return torch.ops.megamoe.nvfp4_grouped_linear(*packed(x), *packed(w), out_dtype)  # type: ignore[no-any-return]


def _run_weight_only(x: torch.Tensor, w: list[torch.Tensor], form: str, out_dtype: torch.dtype) -> torch.Tensor:
    run = pick("nvfp4_weight_only_grouped_linear", x.device, reference)
    return run(x, unpacked(w, form), out_dtype)  # type: ignore[no-any-return]


def _fake_weight_only(x: torch.Tensor, w: list[torch.Tensor], form: str, out_dtype: torch.dtype) -> torch.Tensor:
    return _fake(x, w[0], out_dtype)


def _call_weight_only(x: torch.Tensor, w: NvFp4Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    operator = torch.ops.megamoe.nvfp4_weight_only_grouped_linear
    return operator(x, *packed(w), out_dtype)  # type: ignore[no-any-return]


traced(
    "grouped_linear",
    {"grouped_linear": "(Tensor x, Tensor w, ScalarType out_dtype) -> Tensor"},
    {"grouped_linear": _run},
    {"grouped_linear": _fake},
)
traced(
    "fp8_grouped_linear",
    {"fp8_grouped_linear": "(Tensor[] x, int group, Tensor[] w, ScalarType out_dtype) -> Tensor"},
    {"fp8_grouped_linear": _run_fp8},
    {"fp8_grouped_linear": _fake_fp8},
    _call_fp8,
)
traced(
    "nvfp4_grouped_linear",
    {"nvfp4_grouped_linear": "(Tensor[] x, str x_form, Tensor[] w, str w_form, ScalarType out_dtype) -> Tensor"},
    {"nvfp4_grouped_linear": _run_nvfp4},
    {"nvfp4_grouped_linear": _fake_nvfp4},
    _call_nvfp4,
)
traced(
    "nvfp4_weight_only_grouped_linear",
    {"nvfp4_weight_only_grouped_linear": "(Tensor x, Tensor[] w, str form, ScalarType out_dtype) -> Tensor"},
    {"nvfp4_weight_only_grouped_linear": _run_weight_only},
    {"nvfp4_weight_only_grouped_linear": _fake_weight_only},
    _call_weight_only,
)
