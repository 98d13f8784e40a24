# SPDX-License-Identifier: Apache-2.0
"""E2M1: the 4-bit floating-point codes under NVFP4 and MXFP4.

Codes      bit 3 is the sign; bits 0-2 are the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6. Code 8 is -0. There is no NaN and
           no infinity.
Numerics   round to nearest, ties to the even code: thresholds on |x| are 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.
           |x| above 6 saturates to 6. The sign of zero, and of a value that rounds to zero, is kept.
Packing    byte j of a row holds column 2j in the low nibble and column 2j + 1 in the high nibble.
Source     docs/numerics.md, section "E2M1"
"""

from functools import cache

import torch
from torch import Tensor

E2M1_VALUES: tuple[float, ...] = (
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
)  # fmt: skip
"""Value of each code 0..15."""

E2M1_MAX = 6.0

_CELL_SHIFT = 21
_NUM_CELLS = 1 << 32 - _CELL_SHIFT


def encode_e2m1(x: Tensor) -> Tensor:
    """Round values to E2M1 codes.

    Args:
        x: [...] fp32, bf16 or fp16, any values but NaN and infinity; |x| above 6 saturates.

    Returns:
        [...] uint8 codes 0..15, one per byte, newly allocated.

    Raises:
        TypeError: x is not fp32, bf16 or fp16.
        ValueError: x holds a NaN or an infinity.
    """
    x = as_float32("encode_e2m1", x)
    refuse_non_finite("encode_e2m1", x)
    return round_to_e2m1(x)


def round_to_e2m1(x: Tensor) -> Tensor:
    """Round fp32 values to E2M1 codes without looking for NaN; for callers that have already refused it.

    Args:
        x: [...] fp32 without NaN; infinity saturates.

    Returns:
        [...] uint8 codes 0..15.
    """
    bits = x.reshape(-1).view(torch.int32)
    # Sign, exponent and two mantissa bits number a cell of 2^21 bit patterns. Every rounding threshold is the first of
    # its cell, so the cell decides. A tie goes up where bit 22 of the threshold is set; where it is not, down: to the
    # cell below, hence the subtraction.
    lower = bits.bitwise_right_shift(22).bitwise_and_(1).add_(bits).sub_(1)
    cell = lower.bitwise_right_shift_(_CELL_SHIFT).bitwise_and_(_NUM_CELLS - 1)
    return _code_of_cell(x.device).index_select(0, cell).view(x.shape)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Look up the values of unpacked codes.

    Args:
        codes: [...] uint8, each 0..15.

    Returns:
        [...] fp32.

    Raises:
        TypeError: codes is not uint8.
        ValueError: a code is above 15.
    """
    _require_uint8("decode_e2m1", codes)
    if codes.numel() and int(codes.amax()) > 15:
        raise ValueError(
            f"decode_e2m1: a code is 0..15; got {int(codes.amax())}. Packed bytes hold two codes: call unpack first."
        )
    return lookup_e2m1(codes)


def lookup_e2m1(codes: Tensor) -> Tensor:
    """Return the values of unpacked codes without looking at their range; for callers that have just made them."""
    return _values(codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)


def decode_packed(packed: Tensor) -> Tensor:
    """Look up the values of packed codes: decode_e2m1(unpack(packed)) in one gather.

    Args:
        packed: [..., K/2] uint8.

    Returns:
        [..., K] fp32.

    Raises:
        TypeError: packed is not uint8.
    """
    _require_uint8("decode_packed", packed)
    pairs = _value_pairs(packed.device).index_select(0, packed.reshape(-1).int())
    return pairs.view(torch.float32).view(*packed.shape[:-1], packed.shape[-1] * 2)


def pack(codes: Tensor) -> Tensor:
    """Put two codes in each byte, the even column in the low nibble.

    Args:
        codes: [..., K] uint8, each 0..15, K even.

    Returns:
        [..., K/2] uint8, newly allocated.

    Raises:
        TypeError: codes is not uint8.
        ValueError: K is odd.
    """
    _require_uint8("pack", codes)
    if codes.ndim == 0 or codes.shape[-1] % 2:
        raise ValueError(f"pack: K must be even; got codes {list(codes.shape)}. Pad K to a multiple of the block size.")
    flat = codes.reshape(-1)
    flat = flat.clone() if flat.storage_offset() % 2 else flat
    pairs = flat.view(torch.int16)  # even column in the low byte: hosts and devices are little-endian
    return (pairs | pairs >> 4).to(torch.uint8).view(*codes.shape[:-1], codes.shape[-1] // 2)


def unpack(packed: Tensor) -> Tensor:
    """Split each byte into its two codes, the low nibble first.

    Args:
        packed: [..., K/2] uint8.

    Returns:
        [..., K] uint8 codes 0..15, newly allocated.

    Raises:
        TypeError: packed is not uint8.
    """
    _require_uint8("unpack", packed)
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def as_float32(function: str, x: Tensor) -> Tensor:
    """Return x as contiguous fp32, refusing dtypes whose conversion to fp32 would round."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{function}: x must be fp32, bf16 or fp16; got {x.dtype}. Convert with .float() if that rounding is meant."
        )
    return x.float().contiguous()


def refuse_non_finite(function: str, x: Tensor) -> None:
    """Refuse NaN and infinity in x (fp32)."""
    refuse_non_finite_amax(function, x.abs())


def refuse_non_finite_amax(function: str, amax: Tensor) -> None:
    """Refuse NaN and infinity where amax holds the largest magnitudes of some blocks; a maximum keeps a NaN."""
    if amax.numel() and not float(amax.amax()) < torch.inf:
        raise ValueError(
            f"{function}: x must be finite; got {float(amax.amax())}, and no code stands for NaN or infinity. Look for "
            "the operation that produced it."
        )


def _require_uint8(function: str, codes: Tensor) -> None:
    if codes.dtype != torch.uint8:
        raise TypeError(f"{function}: codes must be uint8; got {codes.dtype}. Reinterpret with .view(torch.uint8).")


@cache
def _values(device: torch.device) -> Tensor:
    return torch.tensor(E2M1_VALUES, dtype=torch.float32, device=device)


@cache
def _value_pairs(device: torch.device) -> Tensor:
    # One int64 holds the two fp32 values of a byte, so a gather moves both at once.
    pairs = [(E2M1_VALUES[byte & 15], E2M1_VALUES[byte >> 4]) for byte in range(256)]
    return torch.tensor(pairs, dtype=torch.float32, device=device).view(torch.int64).view(256)


@cache
def _code_of_cell(device: torch.device) -> Tensor:
    first = torch.arange(_NUM_CELLS // 2, dtype=torch.int32) << _CELL_SHIFT  # smallest magnitude of each positive cell
    thresholds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    codes = (first.view(torch.float32)[:, None] >= thresholds).sum(1)
    positive, negative = codes, codes + 8
    # One below -0 is the last positive cell, one below +0 the last of all; otherwise both are NaN, which never comes.
    positive[-1], negative[-1] = 8, 0
    return torch.cat((positive, negative)).to(torch.uint8).to(device)
