# SPDX-License-Identifier: Apache-2.0
"""NVFP4: E2M1 codes, one E4M3 scale per 16 along K, one fp32 scale per tensor or per row.

Math       value = code * block scale * tensor scale
Numerics   dequantize: (code * block scale) is exact in fp32, times the tensor scale rounds once, then one rounding to
           the asked dtype. quantize: block scale b = e4m3(clamp(amax_16 / (6 * g), 2^-9, 448)), code =
           e2m1(x / (g * b)), every operation in fp32, division and not multiplication by a reciprocal.
Scales     a block scale is unsigned: bytes 0x00..0x7E. Bytes 0x7F..0xFF (NaN, and any with the sign bit) are refused by
           dequantize; construction looks at shapes and dtypes only, so that it never waits for a device.
           The tensor scale is never folded into the block scales: the product does not fit E4M3.
Source     docs/numerics.md, section "NVFP4"
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megamoe.formats import e2m1
from megamoe.formats.division import divide
from megamoe.formats.e4m3 import E4M3_MAX, E4M3_MIN_SUBNORMAL, lookup_e4m3
from megamoe.formats.fragment_layout import (
    CodeLayout,
    codes_from_fragments,
    codes_to_fragments,
    fits_fragments,
    scales_from_fragments,
    scales_to_fragments,
)
from megamoe.formats.scale_layout import ScaleLayout, from_tiled_128x4, tiled_128x4_bytes, to_tiled_128x4

BLOCK = 16
AMAX_FLOOR = 1e-12
TENSOR_SCALE_DIVISOR = 6.0 * 448.0
TENSOR_SCALE_MIN = 2.0**-117  # times the smallest block scale it is still a normal fp32 number
TENSOR_SCALE_MAX = 2.0**118  # times the largest block scale it is still finite

OUTPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class NvFp4Tensor:
    """An NVFP4 tensor of logical shape [..., N, K] with blocks along K.

    Args:
        codes: [..., N, K/2] uint8, two E2M1 codes per byte, the even column in the low nibble.
        scales: float8_e4m3fn, unsigned. ROW_MAJOR: [..., N, K/16]. TILED_128X4:
            [..., ceil(N/128) * ceil(K/64) * 512], one flat run of tiles per leading index. FRAGMENT_16X64:
            [..., N, K/16] in the order of fragment_layout.py, together with the codes.
        tensor_scale: fp32, multiplies. scale_per "tensor": the leading dimensions ([] for [N, K], [E] for [E, N, K]);
            scale_per "row": [..., N].
        scale_layout: order of scales.
        scale_per: "tensor" (weights) or "row" (activations, one scale per token).
        code_layout: order of codes; FRAGMENT_16X64 needs N a multiple of 16, K of 64, and scales in the same layout.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, or the parts are on different devices.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor
    scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR
    scale_per: Literal["tensor", "row"] = "tensor"
    code_layout: CodeLayout = CodeLayout.ROW_MAJOR

    def __post_init__(self) -> None:
        """Check dtypes, shapes and devices."""
        _check_parts(self)

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
        """Bytes of all parts, scale padding included."""
        return self.codes.numel() + self.scales.numel() + 4 * self.tensor_scale.numel()

    def row_major(self) -> "NvFp4Tensor":
        """Return this tensor with row-major codes and scales (itself if they are)."""
        if self.scale_layout is ScaleLayout.ROW_MAJOR:
            return self
        if self.scale_layout is ScaleLayout.FRAGMENT_16X64:
            return replace(
                self,
                codes=codes_from_fragments(self.codes),
                scales=scales_from_fragments(self.scales),
                scale_layout=ScaleLayout.ROW_MAJOR,
                code_layout=CodeLayout.ROW_MAJOR,
            )
        scales = from_tiled_128x4(self.scales, self.shape[-2], self.shape[-1] // BLOCK)
        return replace(self, scales=scales, scale_layout=ScaleLayout.ROW_MAJOR)

    def tiled(self) -> "NvFp4Tensor":
        """Return this tensor with row-major codes and scales in 128x4 tiles (itself if they are)."""
        if self.scale_layout is ScaleLayout.TILED_128X4:
            return self
        plain = self.row_major()
        return replace(plain, scales=to_tiled_128x4(plain.scales), scale_layout=ScaleLayout.TILED_128X4)

    def fragments(self) -> "NvFp4Tensor":
        """Return this tensor with codes and scales in fragment order, as Hopper kernels take weights (itself if so).

        Once, when a model is loaded: on a GPU it waits for the result.

        Raises:
            ValueError: N is not a multiple of 16, or K not of 64.
        """
        if self.code_layout is CodeLayout.FRAGMENT_16X64:
            return self
        plain = self.row_major()
        fragments = replace(
            plain,
            codes=codes_to_fragments(plain.codes),
            scales=scales_to_fragments(plain.scales),
            scale_layout=ScaleLayout.FRAGMENT_16X64,
            code_layout=CodeLayout.FRAGMENT_16X64,
        )
        if self.device.type == "cuda":  # kernels read weights before the launch ahead of them has ended
            torch.cuda.current_stream(self.device).synchronize()
        return fragments

    def to(self, device: torch.device | str) -> "NvFp4Tensor":
        """Return this tensor with all parts on a device."""
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            tensor_scale=self.tensor_scale.to(device),
        )

    def __len__(self) -> int:
        """Size of the leading dimension."""
        return self.codes.shape[0]

    def __getitem__(self, index: int | slice) -> "NvFp4Tensor":
        """Select along the leading dimension (an expert, or a range of experts), sharing memory.

        Raises:
            ValueError: there is no leading dimension before [N, K].
        """
        if self.ndim < 3:
            raise ValueError(
                f"NvFp4Tensor[...]: selects along a leading dimension before [N, K]; got shape {list(self.shape)}. "
                "Index codes, scales and tensor_scale to select rows."
            )
        return replace(self, codes=self.codes[index], scales=self.scales[index], tensor_scale=self.tensor_scale[index])

    def __iter__(self) -> Iterator["NvFp4Tensor"]:
        """Iterate over the leading dimension."""
        return (self[index] for index in range(len(self)))


def quantize(
    x: Tensor, *, tensor_scale: Tensor | None = None, scale_per: Literal["tensor", "row"] = "tensor"
) -> NvFp4Tensor:
    """Round values to NVFP4.

    Args:
        x: [..., N, K] fp32, bf16 or fp16, finite; K a positive multiple of 16; N may be 0.
        tensor_scale: fp32 of the shape scale_per asks for (or [] for all), in [2^-117, 2^118]; values beyond
            2688 * tensor_scale saturate. None: max(amax, 1e-12) / 2688 over each tensor or row.
        scale_per: one tensor scale per [N, K] matrix ("tensor") or per row ("row").

    Returns:
        NvFp4Tensor with row-major scales, newly allocated.

    Raises:
        TypeError: x is not fp32, bf16 or fp16, or tensor_scale is not fp32.
        ValueError: a shape is not as above, x holds a NaN or an infinity, or tensor_scale is out of range.
    """
    x = e2m1.as_float32("nvfp4.quantize", x)
    if x.ndim < 2 or x.shape[-1] == 0 or x.shape[-1] % BLOCK:
        raise ValueError(
            f"nvfp4.quantize: x must be [..., N, K] with K a positive multiple of 16; got {list(x.shape)}. Pad K with "
            "zeros."
        )
    if scale_per not in ("tensor", "row"):
        raise ValueError(f"nvfp4.quantize: scale_per must be 'tensor' or 'row'; got {scale_per!r}. Choose one.")
    blocks = x.view(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    block_amax = blocks.abs().amax(-1)  # [..., N, K/16]; a NaN in the block stays NaN here
    e2m1.refuse_non_finite_amax("nvfp4.quantize", block_amax)
    if tensor_scale is None:
        amax = block_amax.amax(-1)  # [..., N]
        if scale_per == "tensor":
            amax = amax.amax(-1) if amax.shape[-1] else amax.new_zeros(amax.shape[:-1])
        tensor_scale = divide(amax.clamp_(min=AMAX_FLOOR), TENSOR_SCALE_DIVISOR)
    else:
        tensor_scale = _given_tensor_scale(tensor_scale, x.shape[:-1] if scale_per == "row" else x.shape[:-2])
    scale_of_row = tensor_scale[..., None] if scale_per == "row" else tensor_scale[..., None, None]
    wanted = block_amax / (6.0 * scale_of_row)
    scales = wanted.clamp_(E4M3_MIN_SUBNORMAL, E4M3_MAX).to(torch.float8_e4m3fn)
    steps = scale_of_row * scales.float()  # [..., N, K/16]
    codes = e2m1.round_to_e2m1(blocks / steps[..., None]).view(x.shape)
    return NvFp4Tensor(e2m1.pack(codes), scales, tensor_scale, ScaleLayout.ROW_MAJOR, scale_per)


def dequantize(t: NvFp4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values of an NVFP4 tensor.

    Args:
        t: [..., N, K], scales in either layout.
        dtype: fp32, bf16 or fp16.

    Returns:
        [..., N, K] dtype, contiguous, newly allocated.

    Raises:
        TypeError: dtype is not as above.
        ValueError: a block scale is NaN or has its sign bit set, or a tensor scale is negative, NaN or infinite.
    """
    require_output_dtype("nvfp4.dequantize", dtype)
    t = t.row_major()
    tensor_scale = t.tensor_scale
    refuse_tensor_scale("nvfp4.dequantize", tensor_scale)
    scale_of_row = tensor_scale[..., None, None] if t.scale_per == "row" else tensor_scale[..., None, None, None]
    values = e2m1.decode_packed(t.codes).view(*t.scales.shape, BLOCK)
    values.mul_(block_scale_values("nvfp4.dequantize", t.scales)[..., None]).mul_(scale_of_row)
    return values.view(t.shape).to(dtype)


def block_scale_values(function: str, scales: Tensor) -> Tensor:
    """Return block scales in fp32, refusing bytes that are not unsigned E4M3."""
    data = scales.view(torch.uint8)
    byte = int(data.amax()) if data.numel() else 0
    if byte >= 0x7F:
        what = "NaN" if byte & 0x7F == 0x7F else "the sign bit set"
        raise ValueError(
            f"{function}: block scales must be unsigned E4M3 (bytes 0x00..0x7E); got byte {byte:#04x} ({what}), "
            f"{int((data >= 0x7F).sum())} such of {data.numel()}. The scales are damaged or are not E4M3."
        )
    return lookup_e4m3(scales)


def refuse_tensor_scale(function: str, tensor_scale: Tensor) -> None:
    """Refuse tensor scales that are negative, NaN or infinite; zero is allowed."""
    if tensor_scale.numel() and not (float(tensor_scale.amin()) >= 0.0 and float(tensor_scale.amax()) < torch.inf):
        raise ValueError(
            f"{function}: tensor_scale must be finite and not negative; got {float(tensor_scale.amin())} to "
            f"{float(tensor_scale.amax())}. Check that the scale was read as fp32."
        )


def require_output_dtype(function: str, dtype: torch.dtype) -> None:
    """Refuse dtypes that values are not returned in."""
    if dtype not in OUTPUT_DTYPES:
        raise TypeError(f"{function}: dtype must be fp32, bf16 or fp16; got {dtype}. Convert the fp32 result.")


def _given_tensor_scale(tensor_scale: Tensor, shape: torch.Size) -> Tensor:
    if tensor_scale.dtype != torch.float32:
        raise TypeError(f"nvfp4.quantize: tensor_scale must be fp32; got {tensor_scale.dtype}. Convert with .float().")
    if tensor_scale.ndim and tensor_scale.shape != shape:
        raise ValueError(
            f"nvfp4.quantize: tensor_scale must be [] or {list(shape)}; got {list(tensor_scale.shape)}. Pass one scale "
            "per matrix, or scale_per='row' with one per row."
        )
    if tensor_scale.numel():
        low, high = float(tensor_scale.amin()), float(tensor_scale.amax())
        if not (low >= TENSOR_SCALE_MIN and high <= TENSOR_SCALE_MAX):
            raise ValueError(
                f"nvfp4.quantize: tensor_scale must be in [2^-117, 2^118]; got {low} to {high}. It is amax / 2688, not "
                "the reciprocal; an uncalibrated scale can be left out to use the values' own amax."
            )
    return tensor_scale.expand(shape)


def _check_parts(t: NvFp4Tensor) -> None:
    if t.codes.dtype != torch.uint8:
        raise TypeError(
            f"NvFp4Tensor: codes must be uint8; got {t.codes.dtype}. Reinterpret raw bytes with .view(torch.uint8)."
        )
    if t.scales.dtype != torch.float8_e4m3fn:
        raise TypeError(
            f"NvFp4Tensor: scales must be float8_e4m3fn; got {t.scales.dtype}. Reinterpret raw bytes with "
            ".view(torch.float8_e4m3fn); E8M0 scales belong in MxFp4Tensor."
        )
    if t.tensor_scale.dtype != torch.float32:
        raise TypeError(f"NvFp4Tensor: tensor_scale must be fp32; got {t.tensor_scale.dtype}. Keep it as stored.")
    if t.scale_per not in ("tensor", "row"):
        raise ValueError(f"NvFp4Tensor: scale_per must be 'tensor' or 'row'; got {t.scale_per!r}. Choose one.")
    if t.codes.ndim < 2 or t.codes.shape[-1] == 0 or t.codes.shape[-1] % (BLOCK // 2):
        raise ValueError(
            f"NvFp4Tensor: codes must be [..., N, K/2] with K a positive multiple of 16; got {list(t.codes.shape)}. "
            "Pad K when converting."
        )
    *leading, num_rows, half = t.codes.shape
    num_blocks = half // (BLOCK // 2)
    if (t.code_layout is CodeLayout.FRAGMENT_16X64) != (t.scale_layout is ScaleLayout.FRAGMENT_16X64):
        raise ValueError(
            f"NvFp4Tensor: codes and scales must both be in fragment order or neither; got codes "
            f"{t.code_layout.value}, scales {t.scale_layout.value}. Convert both with .fragments() or .row_major()."
        )
    if t.code_layout is CodeLayout.FRAGMENT_16X64 and not fits_fragments(num_rows, half * 2):
        raise ValueError(
            f"NvFp4Tensor: fragment order needs N a multiple of 16 and K of 64; got N {num_rows}, K {half * 2}. Pad "
            "the weight with zeros when converting."
        )
    if t.scale_layout is not ScaleLayout.TILED_128X4:
        expected, wanted = [*leading, num_rows, num_blocks], "[..., N, K/16]"
    else:
        expected, wanted = [*leading, tiled_128x4_bytes(num_rows, num_blocks)], "[..., ceil(N/128)*ceil(K/64)*512]"
    got = list(t.scales.shape)
    if got != expected:
        hint = scale_shape_hint(got, expected, list(t.codes.shape), BLOCK)
        raise ValueError(
            f"NvFp4Tensor: {t.scale_layout.value} scales must be {wanted} = {expected} for codes "
            f"{list(t.codes.shape)}; got {got}. {hint}"
        )
    expected_scale = list(t.codes.shape[:-1]) if t.scale_per == "row" else leading
    if list(t.tensor_scale.shape) != expected_scale:
        raise ValueError(
            f"NvFp4Tensor: tensor_scale with scale_per={t.scale_per!r} must be {expected_scale} for codes "
            f"{list(t.codes.shape)}; got {list(t.tensor_scale.shape)}. Reshape a stored scalar with .reshape(()), "
            "stack one per expert."
        )
    require_one_device("NvFp4Tensor", t.codes, t.scales, t.tensor_scale)


def scale_shape_hint(got: list[int], expected: list[int], codes: list[int], block: int) -> str:
    """Name the likely mistake behind a scale shape that does not fit the codes (both [..., rows, columns])."""
    if len(got) >= 2 and [*got[:-2], got[-1], got[-2]] == expected:
        return "The scales are transposed: store them with N first, blocks along K last."
    if len(got) >= 2 and got[:-2] == codes[:-2] and got[-1] * block == codes[-2] and got[-2] == codes[-1] * 2:
        return "The codes are N-major ([K, N/2]): unpack, transpose to [N, K] and pack along K."
    return "Check that codes and scales come from the same tensor and that blocks run along K."


def require_one_device(name: str, *parts: Tensor) -> None:
    """Refuse parts that lie on different devices."""
    devices = {part.device for part in parts}
    if len(devices) > 1:
        raise ValueError(
            f"{name}: all parts must be on one device; got {sorted(map(str, devices))}. Move them with .to(device)."
        )
