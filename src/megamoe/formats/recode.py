# SPDX-License-Identifier: Apache-2.0
"""MXFP4 <-> NVFP4 of one weight without touching its codes, and the proof that no value changed.

`mxfp4` has the same conversions for whole stacks and any block; this file does what a converter needs for terabytes: it
looks at scales (one byte in seventeen) and copies codes.

Proof      The value of an element is a function of its code and its block's scales only. So two tensors are equal if
           every block has the same sixteen or thirty-two codes, and for every pair of scales that occurs all sixteen
           codes dequantize to the same sixteen fp32 numbers, bit for bit. The second part is looked up in a
           table, made by dequantizing all codes under all scales with `nvfp4.dequantize` and `mxfp4.dequantize`. Blocks
           that fail this are dequantized and compared element by element: zeros have equal values under any scale.
Weights    2-D, scales row-major, one tensor scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megamoe.formats import mxfp4, nvfp4
from megamoe.formats.e4m3 import E4M3_MAX, E4M3_MIN_SUBNORMAL
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_layout import ScaleLayout

BLOCK = mxfp4.BLOCK
CODE_BYTES = BLOCK // 2

_NAN = 0xFF
_TOP_POWER = 8  # E4M3 holds the powers 2^-9 .. 2^8
_LOWEST_POWER = -9
_MIN_TENSOR_EXPONENT = -126
_PREFIX = 4096  # candidates looked at before all of a tensor's codes are read

CodesOf = Callable[[Tensor], Tensor]
"""Block numbers [n] int64, counted along rows, to their packed codes [n, 16] uint8."""


@dataclass(frozen=True, eq=False)
class ScaleScan:
    """What the scales of weights with one tensor scale in common allow.

    Attributes:
        top_exponent: as `mxfp4.shared_top_exponent`: the largest exponent of a block that is not all zeros.
        spans: blocks of all weights by `top_exponent - exponent` (clamped to 0..255), blocks of zeros included.
        inexact: one int64 tensor [n] for each weight: numbers of the blocks that have no equal in NVFP4.
    """

    top_exponent: int
    spans: Mapping[int, int]
    inexact: tuple[Tensor, ...]


def scan_scales(scales: list[Tensor], codes_of: list[CodesOf]) -> ScaleScan:
    """Find the tensor scale for MXFP4 weights that must share one, and the blocks it cannot hold.

    Codes are asked for only where they decide: whether a block with an extreme scale holds only zeros.

    Args:
        scales: float8_e8m0fnu [N, K/32] of each weight.
        codes_of: reads codes of each weight.

    Raises:
        ValueError: no weight is given, or a scale is NaN (byte 255).
    """
    if not scales or len(scales) != len(codes_of):
        raise ValueError(f"scan_scales: needs as many readers as weights, at least one; got {len(scales)}.")
    data = [one.view(torch.uint8).reshape(-1) for one in scales]
    counts = torch.stack([_count_bytes(one) for one in data])  # [weights, 256]
    if int(counts[:, _NAN].sum()):
        raise ValueError(
            f"scan_scales: scales must not be NaN; got byte 255 {int(counts[:, _NAN].sum())} time(s). The bytes are "
            "damaged, unwritten, or not E8M0."
        )
    top = _top_byte(data, codes_of, counts) - 127
    total = counts.sum(0)
    spans: dict[int, int] = {}
    for byte in total.nonzero().flatten().flip(0).tolist():
        span = min(max(top - (byte - 127), 0), 255)
        spans[span] = spans.get(span, 0) + int(total[byte])
    exponent = _tensor_exponent(top)
    lowest, highest = exponent + _LOWEST_POWER + 127, exponent + _TOP_POWER + 127
    inexact = []
    for one, reader, count in zip(data, codes_of, counts, strict=True):
        inside = count[max(lowest, 0) : highest + 1].sum()
        if int(inside) == one.numel():
            inexact.append(torch.empty(0, dtype=torch.int64))
            continue
        suspects = ((one < lowest) | (one > highest)).nonzero().flatten()
        inexact.append(suspects[~_are_zero(reader(suspects))])
    return ScaleScan(top, spans, tuple(inexact))


def tensor_scale_of(top_exponent: int) -> float:
    """Return the NVFP4 tensor scale for a largest block exponent, a power of two in fp32's normal range."""
    return float(2.0 ** _tensor_exponent(top_exponent))


def nvfp4_scales(scales: Tensor, top_exponent: int) -> Tensor:
    """Return the NVFP4 block scales of MXFP4 scales; those out of range are clamped, as `mxfp4_to_nvfp4` does.

    Args:
        scales: [N, K/32] float8_e8m0fnu without NaN.
        top_exponent: from `scan_scales`.

    Returns:
        [N, K/16] float8_e4m3fn, newly allocated.
    """
    return _translate(scales, _e4m3_of_e8m0(_tensor_exponent(top_exponent)), 2).view(torch.float8_e4m3fn)


def mxfp4_scales_of(scales: Tensor, tensor_scale: Tensor, num_columns: int) -> Tensor | None:
    """Return the MXFP4 scales under which the codes of an NVFP4 weight mean the same, or None.

    None means that some block needs a closer look (`mxfp4.nvfp4_to_mxfp4`): its two halves differ, or its scale is no
    power of two.

    Args:
        scales: [N, K/16] float8_e4m3fn.
        tensor_scale: fp32 [].
        num_columns: K.

    Returns:
        [N, K/32] float8_e8m0fnu, newly allocated, or None.
    """
    if num_columns % BLOCK:
        return None
    half = _translate(scales, _e8m0_of_e4m3(float(tensor_scale)), 1).view(-1, 2)  # [N * K/32, 2]
    first, second = half[:, 0].contiguous(), half[:, 1].contiguous()
    if _bytes(first) != _bytes(second) or (first.numel() and int(first.amax()) == _NAN):
        return None
    return first.view(scales.shape[0], num_columns // BLOCK).view(torch.float8_e8m0fnu)


def fits_fp8_blocks(scales: Tensor) -> bool:
    """Say whether an MXFP4 weight with these scales is certain to be exact in 128 x 128 FP8 blocks.

    In units of the block's scale 2^s, codes reach from 0.5 * 2^(k_min - s) to 6 * 2^(k_max - s), and E4M3 holds
    multiples of 2^-9 up to 448 with four significant bits: enough if the exponents of a block span 14 and all are in
    -30..120, away from the floor of `fp8.quantize_blocks` and the end of fp32. Otherwise the values decide.

    Args:
        scales: [N, K/32] float8_e8m0fnu.
    """
    data = scales.view(torch.uint8)
    if not data.numel() or int(data.amax()) == _NAN or int(data.amin()) < 127 - 30 or int(data.amax()) > 127 + 120:
        return False
    rows, columns = -data.shape[0] % 128, -data.shape[1] % 4
    exponents = data.to(torch.int16)
    lowest = torch.nn.functional.pad(exponents, (0, columns, 0, rows), value=255)
    highest = torch.nn.functional.pad(exponents, (0, columns, 0, rows), value=0)
    tiles = (lowest.shape[0] // 128, 128, lowest.shape[1] // 4, 4)
    return bool((highest.view(tiles).amax((1, 3)) - lowest.view(tiles).amin((1, 3)) <= 14).all())


def unequal_scales(mx_scales: Tensor, nv_scales: Tensor, tensor_scale: Tensor) -> Tensor:
    """Return the blocks whose scales give some code another value; with equal codes, all others are equal.

    Args:
        mx_scales: [N, K/32] float8_e8m0fnu.
        nv_scales: [N, K/16] float8_e4m3fn.
        tensor_scale: fp32 [].

    Returns:
        int64 [n]: block numbers, counted along rows. Such a block can still be equal: zeros are, under any scale.
    """
    equal_e8m0 = _e8m0_of_e4m3(float(tensor_scale))
    # The common case the other way round, because there are half as many scales to look up: the only E4M3 byte that is
    # equal to each E8M0 byte. Bytes without one become 255, which is NaN in both.
    expected = _translate(mx_scales, _inverse(equal_e8m0), 2)
    if _bytes(expected) == _bytes(nv_scales) and not (expected.numel() and int(expected.amax()) == _NAN):
        return torch.empty(0, dtype=torch.int64)
    mapped = _translate(nv_scales, equal_e8m0, 1)
    wanted = mx_scales.contiguous().view(torch.uint8).reshape(-1)
    return ((mapped.view(-1, 2) != wanted[:, None]).any(-1) | (wanted == _NAN)).nonzero().flatten()


def differing_blocks(mx: MxFp4Tensor, nv: NvFp4Tensor) -> Tensor:
    """Return the blocks of 32 whose dequantized values are not the same bits, or not finite.

    Args:
        mx: [N, K].
        nv: [N, K], scales row-major, one tensor scale.

    Returns:
        int64 [n]: block numbers, counted along rows, in order; empty when every value is equal.

    Raises:
        ValueError: shapes or layouts are not as above, or a scale is NaN.
    """
    if mx.shape != nv.shape or mx.ndim != 2 or nv.scale_layout is not ScaleLayout.ROW_MAJOR or nv.scale_per != "tensor":
        raise ValueError(
            f"differing_blocks: needs two weights [N, K] with row-major scales and one tensor scale; got "
            f"{list(mx.shape)} and {list(nv.shape)}. Compare weights one by one."
        )
    numbers = unequal_scales(mx.scales, nv.scales, nv.tensor_scale)
    if _bytes(mx.codes) != _bytes(nv.codes):
        suspect = (mx.codes != nv.codes).view(-1, CODE_BYTES).any(-1)
        suspect[numbers] = True
        numbers = suspect.nonzero().flatten()
    if not numbers.numel():
        return numbers
    left = mxfp4.dequantize(MxFp4Tensor(mx.codes.reshape(-1, CODE_BYTES)[numbers], mx.scales.reshape(-1, 1)[numbers]))
    right = nvfp4.dequantize(
        NvFp4Tensor(nv.codes.reshape(-1, CODE_BYTES)[numbers], nv.scales.reshape(-1, 2)[numbers], nv.tensor_scale)
    )
    unequal = (left.view(torch.int32) != right.view(torch.int32)).any(-1) | ~left.isfinite().all(-1)
    return numbers[unequal]


def _bytes(t: Tensor) -> bytes:
    # Comparing bytes is memcmp, ten times faster than comparing uint8 tensors.
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _translate(scales: Tensor, table: bytes, repeat: int) -> Tensor:
    """Look up every byte [N, B]; returns uint8 [N, B * repeat]."""
    data = scales.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().translate(table)
    found = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    found = found.view(scales.shape)
    return _double(found) if repeat == 2 else found


def _double(data: Tensor) -> Tensor:
    """Repeat every byte [N, B] twice along the last dimension."""
    wide = data.to(torch.int16).mul_(257)  # byte * 0x0101, the top bit wrapping into the sign
    return wide.view(torch.uint8).view(*data.shape[:-1], data.shape[-1] * 2)


def _count_bytes(data: Tensor) -> Tensor:
    """Return how often each byte value occurs, [256] int64."""
    return torch.bincount(data, minlength=256)


def _top_byte(data: list[Tensor], codes_of: list[CodesOf], counts: Tensor) -> int:
    """Return the largest scale byte of a block that is not all zeros; 127 if there is none."""
    for byte in counts.sum(0).nonzero().flatten().flip(0).tolist():
        for weight, (one, reader) in enumerate(zip(data, codes_of, strict=True)):
            if not int(counts[weight, byte]):
                continue
            first = torch.tensor([_bytes(one).find(byte)])
            if not bool(_are_zero(reader(first)).all()):  # usually it decides
                return int(byte)
            numbers = (one == byte).nonzero().flatten()
            for part in (numbers[1:_PREFIX], numbers[_PREFIX:]):
                if part.numel() and not bool(_are_zero(reader(part)).all()):
                    return int(byte)
    return 127


def _are_zero(codes: Tensor) -> Tensor:
    return (codes & 0x77).amax(-1) == 0 if codes.numel() else torch.ones(codes.shape[0], dtype=torch.bool)


def _tensor_exponent(top: int) -> int:
    return max(top - _TOP_POWER, _MIN_TENSOR_EXPONENT)


@lru_cache(maxsize=512)
def _e4m3_of_e8m0(tensor_exponent: int) -> bytes:
    """E8M0 byte -> E4M3 byte of the same scale over 2^tensor_exponent, clamped to what E4M3 holds."""
    exponents = torch.arange(256, dtype=torch.float64) - 127 - tensor_exponent
    clamped = torch.exp2(exponents).clamp(E4M3_MIN_SUBNORMAL, E4M3_MAX)
    return bytes(clamped.float().to(torch.float8_e4m3fn).view(torch.uint8).tolist())


@lru_cache(maxsize=512)
def _e8m0_of_e4m3(tensor_scale: float) -> bytes:
    """E4M3 byte -> E8M0 byte under which all sixteen codes have the same finite values, or 255."""
    codes = torch.tensor([low | (low + 1) << 4 for low in range(0, 16, 2)], dtype=torch.uint8)  # all sixteen
    theirs = mxfp4.dequantize(
        MxFp4Tensor(
            codes.repeat(255, 2), torch.arange(255, dtype=torch.uint8)[:, None].contiguous().view(torch.float8_e8m0fnu)
        )
    )[:, :16]
    ours = nvfp4.dequantize(
        NvFp4Tensor(
            codes.repeat(0x7F, 1),
            torch.arange(0x7F, dtype=torch.uint8)[:, None].contiguous().view(torch.float8_e4m3fn),
            torch.tensor(tensor_scale, dtype=torch.float32),
        )
    )
    equal = (ours.view(torch.int32)[:, None] == theirs.contiguous().view(torch.int32)[None]).all(-1)  # [127, 255]
    equal &= theirs.isfinite().all(-1)
    table = [_NAN] * 256
    for e4m3, e8m0 in equal.nonzero().tolist():
        table[e4m3] = e8m0
    return bytes(table)


@lru_cache(maxsize=512)
def _inverse(table: bytes) -> bytes:
    """Turn a table of distinct bytes round; what it maps to 255, and what it does not reach, becomes 255."""
    inverse = bytearray([_NAN] * 256)
    for byte, image in enumerate(table):
        if image != _NAN:
            assert inverse[image] == _NAN, "two E4M3 scales are equal to one E8M0 scale"
            inverse[image] = byte
    return bytes(inverse)
