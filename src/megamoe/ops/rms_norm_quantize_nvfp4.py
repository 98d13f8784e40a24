# SPDX-License-Identifier: Apache-2.0
"""rms_norm_quantize_nvfp4: a norm whose result is needed as it is and quantized.

Math       y = rms_norm(x, weight); q = quantize_nvfp4(y)
Numerics   those of the two operations: q is exactly the quantization of the y returned, after its rounding. W4A4
           layers need both: the router and the compressor read y, the quantized linears q.
Tolerance  verify/tolerance.py: y as "rms_norm"; q equals quantize_nvfp4(y) bit for bit
Kernels    one pass over x
Source     ops/rms_norm.py, ops/quantize.py
"""

from __future__ import annotations

import torch

from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.ops import quantize, rms_norm
from megamoe.ops.check import FLOATS, check
from megamoe.ops.dispatch import pick, traced


def rms_norm_quantize_nvfp4(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6
) -> tuple[torch.Tensor, NvFp4Tensor]:
    """Normalize rows and quantize the result, each row with its own tensor scale.

    Args:
        x: [..., T, K] bf16; K a positive multiple of 16.
        weight: [K] bf16 or fp32.
        eps: added to the mean of squares.

    Returns:
        y [..., T, K] bf16 and its NVFP4 quantization (scale_per "row", row-major scales), newly allocated.

    Raises:
        TypeError: x is not bf16, or weight is not bf16 or fp32.
        ValueError: weight does not have K values, K is not a multiple of 16, or (on the CPU) y is not finite.
        NotImplementedError: the device has no kernel for this operation.
    """
    dims = check("rms_norm_quantize_nvfp4", x=(x, "... T K", (torch.bfloat16,)), weight=(weight, "K", FLOATS))
    if dims["K"] == 0 or dims["K"] % 16:
        raise ValueError(
            f"rms_norm_quantize_nvfp4: K must be a positive multiple of 16; got x {list(x.shape)}. Pad the hidden size."
        )
    run = pick("rms_norm_quantize_nvfp4", x.device, reference)
    return run(x, weight, eps)  # type: ignore[no-any-return]


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, NvFp4Tensor]:
    """Compute rms_norm_quantize_nvfp4 in plain torch."""
    y = rms_norm.reference(x, weight, eps, x.dtype)
    return y, quantize.reference_nvfp4(y, None)


_Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _run(x: torch.Tensor, weight: torch.Tensor, eps: float) -> _Parts:
    y, q = pick("rms_norm_quantize_nvfp4", x.device, reference)(x, weight, eps)
    return y, q.codes, q.scales, q.tensor_scale


def _fake(x: torch.Tensor, weight: torch.Tensor, eps: float) -> _Parts:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), *quantize.fake_nvfp4(x)


def _call(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, NvFp4Tensor]:
    y, codes, scales, tensor_scale = torch.ops.megamoe.rms_norm_quantize_nvfp4(x, weight, eps)
    return y, NvFp4Tensor(codes, scales, tensor_scale, scale_per="row")


traced(
    "rms_norm_quantize_nvfp4",
    {"rms_norm_quantize_nvfp4": "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor, Tensor, Tensor)"},
    {"rms_norm_quantize_nvfp4": _run},
    {"rms_norm_quantize_nvfp4": _fake},
    _call,
)
