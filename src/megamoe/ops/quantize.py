# SPDX-License-Identifier: Apache-2.0
"""quantize: round activations to a 4 or 8 bit format, each token by its own scale unless a scale is given.

Math       the rules of formats/nvfp4.py, formats/fp8.py and formats/mxfp4.py
Numerics   fp32 inside; bit-exact on every device. Row-invariant: with dynamic scales a token's codes depend on nothing
           but its own values.
Polarity   a tensor scale MULTIPLIES codes. A checkpoint's `input_scale` (amax / 2688) is passed as it is stored; its
           reciprocal is never used anywhere.
Tolerance  verify/tolerance.py, "quantize_nvfp4", "quantize_fp8_rows", "quantize_mxfp4": exact
Kernels    quantize_nvfp4, quantize_fp8_rows: one pass, a row in registers. They cannot raise for NaN and
           infinity without waiting for the device: the scale of such a block becomes NaN, which dequantize refuses
Source     docs/numerics.md, sections "NVFP4", "FP8" and "MXFP4"
"""

from __future__ import annotations

import torch

from megamoe.formats import fp8, mxfp4, nvfp4
from megamoe.formats.fp8 import Fp8RowTensor
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_layout import ScaleLayout, tiled_128x4_bytes
from megamoe.ops.check import FLOAT32, FLOATS, check
from megamoe.ops.dispatch import pick, traced


def quantize_nvfp4(
    x: torch.Tensor,
    *,
    tensor_scale: torch.Tensor | None = None,
    scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR,
) -> NvFp4Tensor:
    """Round activations to NVFP4.

    Args:
        x: [..., T, K] bf16 or fp32, finite; K a positive multiple of 16; T may be 0.
        tensor_scale: [] fp32, a checkpoint's calibrated `input_scale`, used for all tokens: values beyond
            2688 * tensor_scale saturate. None: every token gets max(amax, 1e-12) / 2688 of its own.
        scale_layout: order of the block scales; tiles of 128x4 are what block-scaled matrix units read.

    Returns:
        [..., T, K] NVFP4; scale_per "row" if tensor_scale is None, else "tensor".

    Raises:
        TypeError: x is not bf16 or fp32, or tensor_scale is not fp32.
        ValueError: K is not a multiple of 16, x holds NaN or infinity, or tensor_scale is not a positive scalar.
        NotImplementedError: the device has no kernel for this operation.
    """
    check("quantize_nvfp4", x=(x, "... T K", FLOATS), tensor_scale=(tensor_scale, "?", FLOAT32))
    run = pick("quantize_nvfp4", x.device, reference_nvfp4)
    return run(x, tensor_scale, scale_layout)  # type: ignore[no-any-return]


def quantize_fp8_rows(x: torch.Tensor, *, group: int = 128) -> Fp8RowTensor:
    """Round activations to E4M3 with one power-of-two scale per group of a row.

    Args:
        x: [..., T, K] bf16 or fp32, finite; T may be 0.
        group: values that share a scale along K.

    Returns:
        [..., T, K] FP8 rows with E8M0 scales.

    Raises:
        TypeError: x is not bf16 or fp32.
        ValueError: x has fewer than two dimensions or holds NaN or infinity, or group is not positive.
        NotImplementedError: the device has no kernel for this operation.
    """
    check("quantize_fp8_rows", x=(x, "... T K", FLOATS))
    run = pick("quantize_fp8_rows", x.device, reference_fp8_rows)
    return run(x, group)  # type: ignore[no-any-return]


def quantize_mxfp4(x: torch.Tensor) -> MxFp4Tensor:
    """Round activations to MXFP4: E2M1 codes with one power-of-two scale per 32.

    Args:
        x: [..., T, K] bf16 or fp32, finite; K a positive multiple of 32; T may be 0.

    Returns:
        [..., T, K] MXFP4.

    Raises:
        TypeError: x is not bf16 or fp32.
        ValueError: K is not a multiple of 32, or x holds NaN or infinity.
        NotImplementedError: the device has no kernel for this operation.
    """
    check("quantize_mxfp4", x=(x, "... T K", FLOATS))
    run = pick("quantize_mxfp4", x.device, reference_mxfp4)
    return run(x)  # type: ignore[no-any-return]


def reference_nvfp4(
    x: torch.Tensor, tensor_scale: torch.Tensor | None, scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR
) -> NvFp4Tensor:
    """Compute quantize_nvfp4 in plain torch."""
    if tensor_scale is None:
        quantized = nvfp4.quantize(x, scale_per="row")
    else:
        quantized = nvfp4.quantize(x, tensor_scale=tensor_scale, scale_per="tensor")
    return quantized.tiled() if scale_layout is ScaleLayout.TILED_128X4 else quantized


def reference_fp8_rows(x: torch.Tensor, group: int) -> Fp8RowTensor:
    """Compute quantize_fp8_rows in plain torch."""
    return fp8.quantize_rows(x, group=group)


def reference_mxfp4(x: torch.Tensor) -> MxFp4Tensor:
    """Compute quantize_mxfp4 in plain torch."""
    return mxfp4.quantize(x)


def fake_nvfp4(x: torch.Tensor, tiled: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return empty codes, block scales and row scales for the quantization of x."""
    *rows, width = x.shape
    codes = torch.empty((*rows, width // 2), dtype=torch.uint8, device=x.device)
    num_blocks = width // nvfp4.BLOCK
    shape = (*rows[:-1], tiled_128x4_bytes(rows[-1], num_blocks)) if tiled else (*rows, num_blocks)
    scales = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)
    return codes, scales, torch.empty(rows, dtype=torch.float32, device=x.device)


def _layout(tiled: bool) -> ScaleLayout:
    return ScaleLayout.TILED_128X4 if tiled else ScaleLayout.ROW_MAJOR


def _run_nvfp4(x: torch.Tensor, tiled: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = pick("quantize_nvfp4", x.device, reference_nvfp4)(x, None, _layout(tiled))
    return q.codes, q.scales, q.tensor_scale


def _run_nvfp4_static(x: torch.Tensor, tensor_scale: torch.Tensor, tiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    q = pick("quantize_nvfp4", x.device, reference_nvfp4)(x, tensor_scale, _layout(tiled))
    return q.codes, q.scales


def _fake_nvfp4_static(x: torch.Tensor, tensor_scale: torch.Tensor, tiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return fake_nvfp4(x, tiled)[:2]


def _call_nvfp4(x: torch.Tensor, tensor_scale: torch.Tensor | None, scale_layout: ScaleLayout) -> NvFp4Tensor:
    tiled = scale_layout is ScaleLayout.TILED_128X4
    if tensor_scale is None:
        codes, scales, tensor_scale = torch.ops.megamoe.quantize_nvfp4(x, tiled)
        return NvFp4Tensor(codes, scales, tensor_scale, scale_layout, "row")
    codes, scales = torch.ops.megamoe.quantize_nvfp4_static(x, tensor_scale, tiled)
    return NvFp4Tensor(codes, scales, tensor_scale.expand(x.shape[:-2]), scale_layout)


def _run_fp8_rows(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    q = pick("quantize_fp8_rows", x.device, reference_fp8_rows)(x, group)
    return q.codes, q.scales


def _fake_fp8_rows(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    num_groups = (x.shape[-1] + group - 1) // group
    return codes, torch.empty((*x.shape[:-1], num_groups), dtype=torch.float8_e8m0fnu, device=x.device)


def _call_fp8_rows(x: torch.Tensor, group: int) -> Fp8RowTensor:
    codes, scales = torch.ops.megamoe.quantize_fp8_rows(x, group)
    return Fp8RowTensor(codes, scales, group)


traced(
    "quantize_nvfp4",
    {
        "quantize_nvfp4": "(Tensor x, bool tiled) -> (Tensor, Tensor, Tensor)",
        "quantize_nvfp4_static": "(Tensor x, Tensor tensor_scale, bool tiled) -> (Tensor, Tensor)",
    },
    {"quantize_nvfp4": _run_nvfp4, "quantize_nvfp4_static": _run_nvfp4_static},
    {"quantize_nvfp4": fake_nvfp4, "quantize_nvfp4_static": _fake_nvfp4_static},
    _call_nvfp4,
)
traced(
    "quantize_fp8_rows",
    {"quantize_fp8_rows": "(Tensor x, int group) -> (Tensor, Tensor)"},
    {"quantize_fp8_rows": _run_fp8_rows},
    {"quantize_fp8_rows": _fake_fp8_rows},
    _call_fp8_rows,
)
