# SPDX-License-Identifier: Apache-2.0
"""E8M0 (UE8M0): power-of-two scales in one byte.

Codes      byte b means 2^(b - 127); 255 is NaN. No sign, no zero.
Numerics   pow2_ceil is exact bit arithmetic: the exponent, plus one if any mantissa bit is set. No logarithm is taken.
Reading    bytes from a file become scales by reinterpretation (.view), never by a numeric cast: a cast of byte 120
           gives the value 120 (rounded to 128), not 2^-7.
Source     docs/numerics.md, section "E8M0"
"""

from functools import cache

import torch
from torch import Tensor

_BIAS = 127
_NAN_BYTE = 255
_MANTISSA_MASK = 0x7FFFFF
_BITS_OF_2_POW_MINUS_127 = 0x400000  # subnormal in fp32


def pow2_ceil(x: Tensor) -> Tensor:
    """Return the smallest power of two that is at least x.

    Args:
        x: [...] fp32, 0 <= x <= 2^127.

    Returns:
        [...] fp32 powers of two; 2^-127 for x up to 2^-127, which is the smallest E8M0 value.

    Raises:
        TypeError: x is not fp32.
        ValueError: x holds a NaN, a negative value or a value above 2^127.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"pow2_ceil: x must be fp32; got {x.dtype}. Convert with .float().")
    if x.numel():
        low, high = float(x.amin()), float(x.amax())
        if not (low >= 0.0 and high <= 2.0**127):
            raise ValueError(f"pow2_ceil: x must be in [0, 2^127]; got values from {low} to {high}. Look for NaN.")
    bits = x.abs().view(torch.int32)
    ceiling = (bits + _MANTISSA_MASK) & ~_MANTISSA_MASK
    return torch.where(bits <= _BITS_OF_2_POW_MINUS_127, _BITS_OF_2_POW_MINUS_127, ceiling).view(torch.float32)


def ceil_to_e8m0(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return pow2_ceil(x) as fp32 and as E8M0, for callers whose x is known to be normal, finite and positive.

    Args:
        x: [...] fp32 in [2^-126, 2^127]; not checked.

    Returns:
        [...] fp32 powers of two, and the same as float8_e8m0fnu.
    """
    bits = x.view(torch.int32).add(_MANTISSA_MASK).bitwise_and_(~_MANTISSA_MASK)
    return bits.view(torch.float32), (bits >> 23).to(torch.uint8).view(torch.float8_e8m0fnu)


def encode_e8m0(x: Tensor) -> Tensor:
    """Encode exact powers of two.

    Args:
        x: [...] fp32 powers of two in [2^-127, 2^127], for example the result of pow2_ceil.

    Returns:
        [...] float8_e8m0fnu, newly allocated.

    Raises:
        TypeError: x is not fp32.
        ValueError: a value is not a power of two in range.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"encode_e8m0: x must be fp32; got {x.dtype}. Convert with .float().")
    bits = x.contiguous().view(torch.int32)
    scales = (bits >> 23).to(torch.uint8).view(torch.float8_e8m0fnu)
    # Decoding is the whole definition: zero, negatives, NaN, other subnormals and set mantissa bits all differ from it.
    wrong = _values(x.device).index_select(0, scales.view(torch.uint8).reshape(-1).int()) != x.reshape(-1)
    if wrong.any():
        got = float(x.reshape(-1)[wrong][0])
        raise ValueError(f"encode_e8m0: x must be powers of two in [2^-127, 2^127]; got {got}. Round with pow2_ceil.")
    return scales


def decode_e8m0(scales: Tensor) -> Tensor:
    """Return the values of E8M0 scales.

    Args:
        scales: [...] float8_e8m0fnu.

    Returns:
        [...] fp32, exact (byte 0 is the fp32 subnormal 2^-127).

    Raises:
        TypeError: scales is not float8_e8m0fnu.
        ValueError: a scale is NaN (byte 255).
    """
    require_e8m0("decode_e8m0", scales)
    data = scales.view(torch.uint8)
    if data.numel() and int(data.amax()) == _NAN_BYTE:
        count = int((data == _NAN_BYTE).sum())
        raise ValueError(
            f"decode_e8m0: scales must not be NaN; got byte 255 {count} time(s) of {data.numel()}. The bytes are "
            "damaged, unwritten, or not E8M0."
        )
    return _values(scales.device).index_select(0, data.reshape(-1).int()).view(scales.shape)


def e8m0_from_bytes(data: Tensor) -> Tensor:
    """Reinterpret raw scale bytes as E8M0 scales.

    Args:
        data: [...] uint8 or int8 as read from a file, contiguous or not.

    Returns:
        [...] float8_e8m0fnu over the same bytes.

    Raises:
        TypeError: data is not uint8 or int8, so its bytes are no longer the file's.
    """
    if data.dtype not in (torch.uint8, torch.int8):
        raise TypeError(
            f"e8m0_from_bytes: data must be raw bytes (uint8 or int8); got {data.dtype}. A numeric cast destroys E8M0 "
            "scales: read the bytes and reinterpret them."
        )
    return data.view(torch.float8_e8m0fnu)


def require_e8m0(name: str, scales: Tensor) -> None:
    """Refuse scales that are not float8_e8m0fnu, with the way to reinterpret raw bytes."""
    if scales.dtype != torch.float8_e8m0fnu:
        raise TypeError(
            f"{name}: scales must be float8_e8m0fnu; got {scales.dtype}. Reinterpret raw bytes with "
            ".view(torch.float8_e8m0fnu); a numeric cast destroys them."
        )


@cache
def _values(device: torch.device) -> Tensor:
    values = [2.0 ** (byte - _BIAS) for byte in range(_NAN_BYTE)] + [torch.nan]
    return torch.tensor(values, dtype=torch.float32, device=device)
