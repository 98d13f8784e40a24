# SPDX-License-Identifier: Apache-2.0
"""MXFP4: E2M1 codes and one E8M0 (power-of-two) scale per 32 along K; exact conversion to and from NVFP4.

Math       value = code * 2^(byte - 127)
Numerics   quantize: scale = 2^ceil(log2(max(amax_32, 6 * 2^-126) / 6)) by exact bit arithmetic, code =
           e2m1(x / scale). dequantize: one exact product in fp32, one rounding to the asked dtype; products from
           2^128 on, which only bytes 253 and 254 reach, become infinity.
Conversion to NVFP4 copies the codes: with k_j the exponent of block j and k_max the largest one among blocks that hold
           a non-zero code, the tensor scale is 2^m, m = max(k_max - 8, -126), and both 16-blocks of a 32-block get the
           E4M3 scale 2^(k_j - m). E4M3 holds the 18 powers 2^-9 .. 2^8, so a block is exact when k_max - k_j <= 17.
           Blocks of zeros are always exact. Exactness is checked per block by comparing scale products, not assumed.
Source     docs/numerics.md, section "MXFP4"
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megamoe.formats import e2m1, nvfp4
from megamoe.formats.division import divide
from megamoe.formats.e4m3 import E4M3_MAX, E4M3_MIN_SUBNORMAL
from megamoe.formats.e8m0 import ceil_to_e8m0, decode_e8m0, encode_e8m0, require_e8m0
from megamoe.formats.nvfp4 import NvFp4Tensor, require_one_device, require_output_dtype, scale_shape_hint

BLOCK = 32
AMAX_FLOOR = 6.0 * 2.0**-126

_E4M3_TOP_EXPONENT = 8  # 2^8 = 256 is the largest power of two in E4M3
_MIN_TENSOR_EXPONENT = -126  # keeps the tensor scale a normal fp32 number; E8M0 reaches only one below
_NO_EXPONENT = -1000


@dataclass(frozen=True, eq=False)
class MxFp4Tensor:
    """An MXFP4 tensor of logical shape [..., N, K] with blocks along K.

    Args:
        codes: [..., N, K/2] uint8, two E2M1 codes per byte, the even column in the low nibble.
        scales: [..., N, K/32] float8_e8m0fnu.

    Raises:
        TypeError: a dtype is not as above; raw scale bytes are refused because a cast would destroy them.
        ValueError: a shape is not as above, or the parts are on different devices.
    """

    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        """Check dtypes, shapes and devices."""
        if self.codes.dtype != torch.uint8:
            raise TypeError(
                f"MxFp4Tensor: codes must be uint8; got {self.codes.dtype}. Reinterpret raw bytes with "
                ".view(torch.uint8)."
            )
        require_e8m0("MxFp4Tensor", self.scales)
        if self.codes.ndim < 2 or self.codes.shape[-1] == 0 or self.codes.shape[-1] % (BLOCK // 2):
            raise ValueError(
                f"MxFp4Tensor: codes must be [..., N, K/2] with K a positive multiple of 32; got "
                f"{list(self.codes.shape)}. Pad K when converting."
            )
        expected = [*self.codes.shape[:-1], self.codes.shape[-1] // (BLOCK // 2)]
        got = list(self.scales.shape)
        if got != expected:
            hint = scale_shape_hint(got, expected, list(self.codes.shape), BLOCK)
            raise ValueError(
                f"MxFp4Tensor: scales must be [..., N, K/32] = {expected} for codes {list(self.codes.shape)}; got "
                f"{got}. {hint}"
            )
        require_one_device("MxFp4Tensor", self.codes, self.scales)

    @property
    def shape(self) -> torch.Size:
        """Logical shape [..., N, K]."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 2))

    @property
    def ndim(self) -> int:
        """Number of logical dimensions."""
        return self.codes.ndim

    @property
    def device(self) -> torch.device:
        """Device of all parts."""
        return self.codes.device

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return self.codes.numel() + self.scales.numel()

    def to(self, device: torch.device | str) -> "MxFp4Tensor":
        """Return this tensor with all parts on a device."""
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))


def quantize(x: Tensor) -> MxFp4Tensor:
    """Round values to MXFP4.

    Args:
        x: [..., N, K] fp32, bf16 or fp16, finite; K a positive multiple of 32; N may be 0.

    Returns:
        MxFp4Tensor, newly allocated.

    Raises:
        TypeError: x is not fp32, bf16 or fp16.
        ValueError: a shape is not as above, or x holds a NaN or an infinity.
    """
    x = e2m1.as_float32("mxfp4.quantize", x)
    if x.ndim < 2 or x.shape[-1] == 0 or x.shape[-1] % BLOCK:
        raise ValueError(
            f"mxfp4.quantize: x must be [..., N, K] with K a positive multiple of 32; got {list(x.shape)}. Pad K with "
            "zeros."
        )
    packed, scales = quantize_groups("mxfp4.quantize", x)
    return MxFp4Tensor(packed, scales)


def quantize_groups(function: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Round fp32 [..., K] to packed codes [..., K/2] and E8M0 scales [..., K/32]; K is a multiple of 32."""
    blocks = x.view(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    amax = blocks.abs().amax(-1)
    e2m1.refuse_non_finite_amax(function, amax)
    scale, stored = ceil_to_e8m0(divide(amax.clamp_(min=AMAX_FLOOR), e2m1.E2M1_MAX))
    codes = e2m1.round_to_e2m1(blocks / scale[..., None]).view(x.shape)
    return e2m1.pack(codes), stored


def dequantize(t: MxFp4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values of an MXFP4 tensor.

    Args:
        t: [..., N, K].
        dtype: fp32, bf16 or fp16.

    Returns:
        [..., N, K] dtype, contiguous, newly allocated.

    Raises:
        TypeError: dtype is not as above.
        ValueError: a scale is NaN (byte 255).
    """
    require_output_dtype("mxfp4.dequantize", dtype)
    values = e2m1.decode_packed(t.codes).view(*t.scales.shape, BLOCK)
    return values.mul_(decode_e8m0(t.scales)[..., None]).view(t.shape).to(dtype)


def shared_top_exponent(*tensors: MxFp4Tensor) -> Tensor:
    """Return the largest scale exponent over several tensors, for one tensor scale in common (w1 with w3).

    Blocks that hold only zeros do not count, whatever their scale.

    Args:
        tensors: each [..., N, K]; the leading dimensions agree.

    Returns:
        int32 of the leading dimensions ([] for [N, K], [E] for [E, N, K]); 0 where every block is zero.

    Raises:
        ValueError: no tensor is given, leading dimensions differ, or a scale is NaN.
    """
    if not tensors or any(t.shape[:-2] != tensors[0].shape[:-2] for t in tensors):
        raise ValueError(
            f"shared_top_exponent: needs one or more tensors with equal leading dimensions; got "
            f"{[list(t.shape) for t in tensors]}. Convert tensors of different experts one by one."
        )
    tops = []
    for t in tensors:
        exponent = _exponents(t).masked_fill_(_zero_blocks(t), _NO_EXPONENT).flatten(-2)
        tops.append(exponent.amax(-1) if exponent.shape[-1] else exponent.new_full(exponent.shape[:-1], _NO_EXPONENT))
    top = torch.stack(tops).amax(0)
    return torch.where(top == _NO_EXPONENT, 0, top).to(torch.int32)


def mxfp4_to_nvfp4(t: MxFp4Tensor, *, top_exponent: int | Tensor | None = None) -> tuple[NvFp4Tensor, Tensor]:
    """Convert MXFP4 to NVFP4 with codes copied, and say which blocks are exact.

    Args:
        t: [..., N, K].
        top_exponent: the exponent the tensor scale is made for, -127..127, int or integer tensor of the leading
            dimensions; None: shared_top_exponent(t). Pass shared_top_exponent(w1, w3) to give both one tensor scale.

    Returns:
        The NvFp4Tensor (row-major scales, one tensor scale per leading index), and a bool mask [..., N, K/32] that is
        True where the block's codes are copied and its scale is the same number, or the block holds only zeros. Blocks
        where it is False hold the NVFP4 rounding of the block's values.

    Raises:
        ValueError: a scale is NaN, or top_exponent is out of range or of another shape.
    """
    leading = t.shape[:-2]
    top = _top_exponent(t, top_exponent)
    tensor_exponent = (top - _E4M3_TOP_EXPONENT).clamp_(min=_MIN_TENSOR_EXPONENT)
    tensor_scale = ((tensor_exponent + 127) << 23).view(torch.float32)
    wanted = decode_e8m0(t.scales)  # [..., N, K/32]
    # The quotient of powers of two is exact in fp64, where it neither overflows nor becomes subnormal.
    quotient = wanted.double() / tensor_scale.double()[..., None, None]
    block_scale = quotient.clamp_(E4M3_MIN_SUBNORMAL, E4M3_MAX).float().to(torch.float8_e4m3fn)
    product = block_scale.double() * tensor_scale.double()[..., None, None]
    exact = (product == wanted.double()) | _zero_blocks(t)
    scales = block_scale.view(torch.uint8).repeat_interleave(2, dim=-1).view(torch.float8_e4m3fn)
    codes = t.codes.clone()
    if not bool(exact.all()):
        rest = dequantize(t).masked_fill_(_spread(exact, BLOCK), 0.0)
        rounded = nvfp4.quantize(rest, tensor_scale=tensor_scale)
        codes = torch.where(_spread(exact, BLOCK // 2), codes, rounded.codes)
        scales = torch.where(_spread(exact, 2), scales.view(torch.uint8), rounded.scales.view(torch.uint8))
        scales = scales.view(torch.float8_e4m3fn)
    return NvFp4Tensor(codes, scales, tensor_scale.expand(leading).contiguous()), exact


def nvfp4_to_mxfp4(t: NvFp4Tensor) -> tuple[MxFp4Tensor, Tensor]:
    """Convert NVFP4 to MXFP4 with codes copied, and say which blocks are exact.

    A block of 32 is exact when both its 16-blocks have block scale * tensor scale equal to one power of two in E8M0's
    range; a half that holds only zeros takes the other half's scale.

    Args:
        t: [..., N, K] with K a multiple of 32, scales in either layout, one tensor scale per tensor or per row.

    Returns:
        The MxFp4Tensor, and a bool mask [..., N, K/32] of exact blocks. Blocks where it is False hold the MXFP4
        rounding of the block's values.

    Raises:
        ValueError: K is not a multiple of 32, or t holds scales that dequantize refuses.
    """
    if t.shape[-1] % BLOCK:
        raise ValueError(
            f"nvfp4_to_mxfp4: K must be a multiple of 32; got {list(t.shape)}. Pad K with zeros before quantizing."
        )
    t = t.row_major()
    nvfp4.refuse_tensor_scale("nvfp4_to_mxfp4", t.tensor_scale)
    block_scale = nvfp4.block_scale_values("nvfp4_to_mxfp4", t.scales)
    scale_of_row = t.tensor_scale[..., None] if t.scale_per == "row" else t.tensor_scale[..., None, None]
    # A product of 4 and 24 significant bits is exact in fp64.
    product = block_scale.double() * scale_of_row.double()  # [..., N, K/16]
    pairs = (*t.shape[:-1], t.shape[-1] // BLOCK, 2)
    # A zero block scale makes its half zero whatever the codes, so copying the codes would not be exact: such a half
    # counts as zeros only if its codes are.
    first, second = product.view(pairs).unbind(-1)
    first_is_zero, second_is_zero = _all_zero_codes(t.codes, nvfp4.BLOCK // 2).view(pairs).unbind(-1)
    scale = torch.where(first_is_zero, second, first)
    mantissa, exponent = torch.frexp(scale)
    is_power = (mantissa == 0.5) & (exponent - 1 >= -127) & (exponent - 1 <= 127)
    keep = is_power & ((first == second) | first_is_zero | second_is_zero)
    exact = keep | (first_is_zero & second_is_zero)
    scales = encode_e8m0(torch.where(keep, scale, 1.0).float())
    codes = t.codes.clone()
    if not bool(exact.all()):
        rounded = quantize(nvfp4.dequantize(t).masked_fill_(_spread(exact, BLOCK), 0.0))
        codes = torch.where(_spread(exact, BLOCK // 2), codes, rounded.codes)
        scales = torch.where(exact, scales.view(torch.uint8), rounded.scales.view(torch.uint8))
        scales = scales.view(torch.float8_e8m0fnu)
    return MxFp4Tensor(codes, scales), exact


def mxfp4_to_nvfp4_lossless(t: MxFp4Tensor, *, top_exponent: int | Tensor | None = None) -> NvFp4Tensor:
    """Convert MXFP4 to NVFP4, refusing a tensor of which any block would change.

    Args:
        t: as for mxfp4_to_nvfp4.
        top_exponent: as for mxfp4_to_nvfp4.

    Returns:
        NvFp4Tensor with the same values.

    Raises:
        ValueError: a block is not exact; the message names the first one. Also as mxfp4_to_nvfp4.
    """
    converted, exact = mxfp4_to_nvfp4(t, top_exponent=top_exponent)
    if not bool(exact.all()):
        block = _first_false(exact)
        exponent = int(_exponents(t)[block])
        top = int(_top_exponent(t, top_exponent).expand(t.shape[:-2])[block[:-2]])
        raise ValueError(
            f"mxfp4_to_nvfp4_lossless: block {list(block)} has scale 2^{exponent} under a largest scale 2^{top}; one "
            f"tensor scale holds exponents {max(top - 8, -126) - 9}..{max(top - 8, -126) + 8}. "
            f"{int((~exact).sum())} of {exact.numel()} blocks differ. Keep the tensor as MXFP4, or dequantize it."
        )
    return converted


def nvfp4_to_mxfp4_lossless(t: NvFp4Tensor) -> MxFp4Tensor:
    """Convert NVFP4 to MXFP4, refusing a tensor of which any block would change.

    Args:
        t: as for nvfp4_to_mxfp4.

    Returns:
        MxFp4Tensor with the same values.

    Raises:
        ValueError: a block is not exact; the message names the first one. Also as nvfp4_to_mxfp4.
    """
    converted, exact = nvfp4_to_mxfp4(t)
    if not bool(exact.all()):
        block = _first_false(exact)
        pair = t.row_major().scales.double().reshape(*exact.shape, 2)[block]
        raise ValueError(
            f"nvfp4_to_mxfp4_lossless: block {list(block)} has block scales {float(pair[0])} and {float(pair[1])}, "
            "which with its tensor scale are not one power of two. "
            f"{int((~exact).sum())} of {exact.numel()} blocks differ. "
            "Only a tensor that was MXFP4 before converts without loss; keep it as NVFP4."
        )
    return converted


def _top_exponent(t: MxFp4Tensor, top_exponent: int | Tensor | None) -> Tensor:
    if top_exponent is None:
        return shared_top_exponent(t)
    top = torch.as_tensor(top_exponent, device=t.device)
    if top.is_floating_point() or top.is_complex() or top.dtype == torch.bool:
        raise TypeError(
            f"mxfp4_to_nvfp4: top_exponent must be an integer; got {top.dtype}. Pass shared_top_exponent(...)."
        )
    if top.ndim and top.shape != t.shape[:-2]:
        raise ValueError(
            f"mxfp4_to_nvfp4: top_exponent must be [] or {list(t.shape[:-2])}; got {list(top.shape)}. One per leading "
            "index."
        )
    if top.numel() and not (int(top.amin()) >= -127 and int(top.amax()) <= 127):
        raise ValueError(
            f"mxfp4_to_nvfp4: top_exponent must be in -127..127; got {int(top.amin())} to {int(top.amax())}. It is the "
            "exponent, byte - 127."
        )
    return top.to(torch.int32)


def _exponents(t: MxFp4Tensor) -> Tensor:
    decode_e8m0(t.scales)  # refuses NaN
    return t.scales.view(torch.uint8).to(torch.int32) - 127


def _zero_blocks(t: MxFp4Tensor) -> Tensor:
    return _all_zero_codes(t.codes, BLOCK // 2)


def _all_zero_codes(packed: Tensor, block_bytes: int) -> Tensor:
    # Bit 3 of a nibble is the sign; -0 is a zero.
    return (packed & 0x77).reshape(*packed.shape[:-1], packed.shape[-1] // block_bytes, block_bytes).amax(-1) == 0


def _spread(mask: Tensor, count: int) -> Tensor:
    return mask.repeat_interleave(count, dim=-1)


def _first_false(mask: Tensor) -> tuple[int, ...]:
    return tuple(int(index) for index in (~mask).nonzero()[0])
