# SPDX-License-Identifier: Apache-2.0
"""E4M3 (the "fn" variant): 8-bit codes of FP8 tensors and of NVFP4 block scales.

Codes      sign, 4 exponent bits (bias 7), 3 mantissa bits. Largest value 448 (0x7E), smallest normal 2^-6 (0x08),
           smallest subnormal 2^-9 (0x01). 0x7F and 0xFF are NaN; there is no infinity.
Numerics   round to nearest even; |x| above 448 saturates to 448; the sign of zero is kept.
Source     docs/numerics.md, section "E4M3"
"""

import math
from functools import cache

import torch
from torch import Tensor

from megamoe.formats.e2m1 import as_float32, refuse_non_finite

E4M3_MAX = 448.0
E4M3_MIN_SUBNORMAL = 2.0**-9


def encode_e4m3(x: Tensor) -> Tensor:
    """Round values to E4M3.

    Args:
        x: [...] fp32, bf16 or fp16, finite; |x| above 448 saturates.

    Returns:
        [...] float8_e4m3fn, newly allocated.

    Raises:
        TypeError: x is not fp32, bf16 or fp16.
        ValueError: x holds a NaN or an infinity.
    """
    x = as_float32("encode_e4m3", x)
    refuse_non_finite("encode_e4m3", x)
    return round_to_e4m3(x)


def round_to_e4m3(x: Tensor) -> Tensor:
    """Round fp32 values to E4M3 without looking for NaN; for callers that have already refused it.

    Args:
        x: [...] fp32 without NaN; infinity saturates.

    Returns:
        [...] float8_e4m3fn.
    """
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode_e4m3(codes: Tensor) -> Tensor:
    """Return the values of E4M3 codes.

    Args:
        codes: [...] float8_e4m3fn.

    Returns:
        [...] fp32, exact.

    Raises:
        TypeError: codes is not float8_e4m3fn.
        ValueError: a code is NaN (byte 0x7F or 0xFF).
    """
    if codes.dtype != torch.float8_e4m3fn:
        raise TypeError(
            f"decode_e4m3: codes must be float8_e4m3fn; got {codes.dtype}. Reinterpret raw bytes with "
            ".view(torch.float8_e4m3fn)."
        )
    values = lookup_e4m3(codes)
    # Finite E4M3 values cannot overflow an fp32 sum, so the sum is NaN exactly when a code is.
    if math.isnan(float(values.sum())):
        count = int(values.isnan().sum())
        raise ValueError(
            f"decode_e4m3: codes must not be NaN; got byte 0x7F or 0xFF {count} time(s) of {values.numel()}. The bytes "
            "are damaged, unwritten, or not E4M3."
        )
    return values


def lookup_e4m3(codes: Tensor) -> Tensor:
    """Return the values of E4M3 codes without looking for NaN; for callers that have already refused it."""
    return _values(codes.device).index_select(0, codes.view(torch.uint8).reshape(-1).int()).view(codes.shape)


@cache
def _values(device: torch.device) -> Tensor:
    values = []
    for byte in range(256):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        magnitude = torch.nan if byte & 0x7F == 0x7F else magnitude
        values.append(-magnitude if byte & 0x80 else magnitude)
    return torch.tensor(values, dtype=torch.float32, device=device)
