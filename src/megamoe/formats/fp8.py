# SPDX-License-Identifier: Apache-2.0
"""FP8 tensors: E4M3 codes with one scale per 128 x 128 block (weights) or per group along a row (activations).

Math       value = code * scale
Numerics   E8M0 scales: 2^ceil(log2(max(amax, 1e-4) / 448)) by exact bit arithmetic. fp32 scales: max(amax, 1e-4)
           / 448. code = e4m3(x / scale), round to nearest even, saturating. dequantize: one fp32 product (exact with
           E8M0 scales unless it leaves the range of fp32), then one rounding to the asked dtype.
Edges      the last block or group of a dimension may be partial; its scale covers the elements that exist.
Source     docs/numerics.md, section "FP8"
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megamoe.formats.division import divide
from megamoe.formats.e2m1 import as_float32, refuse_non_finite_amax
from megamoe.formats.e4m3 import E4M3_MAX, decode_e4m3, round_to_e4m3
from megamoe.formats.e8m0 import ceil_to_e8m0, decode_e8m0
from megamoe.formats.nvfp4 import require_one_device, require_output_dtype

BLOCK = 128
AMAX_FLOOR = 1e-4


@dataclass(frozen=True, eq=False)
class Fp8BlockTensor:
    """An FP8 tensor of shape [..., N, K] with one scale per 128 x 128 block.

    Args:
        codes: [..., N, K] float8_e4m3fn.
        scales: [..., ceil(N/128), ceil(K/128)] float8_e8m0fnu or fp32, multiplies.

    Raises:
        TypeError: a dtype is not as above; raw scale bytes are refused because a cast would destroy them.
        ValueError: a shape is not as above, or the parts are on different devices.
    """

    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        """Check dtypes, shapes and devices."""
        _check_dtypes("Fp8BlockTensor", self.codes, self.scales)
        expected = [*self.codes.shape[:-2], *(-(-size // BLOCK) for size in self.codes.shape[-2:])]
        _check_scale_shape("Fp8BlockTensor", "[..., ceil(N/128), ceil(K/128)]", self.codes, self.scales, expected)

    @property
    def shape(self) -> torch.Size:
        """Shape [..., N, K]."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.codes.ndim

    @property
    def device(self) -> torch.device:
        """Device of all parts."""
        return self.codes.device

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return self.codes.numel() + self.scales.numel() * self.scales.element_size()

    def to(self, device: torch.device | str) -> "Fp8BlockTensor":
        """Return this tensor with all parts on a device."""
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))

    def __len__(self) -> int:
        """Size of the leading dimension."""
        return self.codes.shape[0]

    def __getitem__(self, index: int | slice) -> "Fp8BlockTensor":
        """Select along the leading dimension (an expert, or a range of experts), sharing memory.

        Raises:
            ValueError: there is no leading dimension before [N, K].
        """
        if self.ndim < 3:
            raise ValueError(
                f"Fp8BlockTensor[...]: selects along a leading dimension before [N, K]; got shape {list(self.shape)}. "
                "Blocks of 128 rows share a scale: index codes and scales to select rows."
            )
        return Fp8BlockTensor(self.codes[index], self.scales[index])


@dataclass(frozen=True, eq=False)
class Fp8RowTensor:
    """An FP8 tensor of shape [..., T, K] with one scale per group of values along each row.

    Args:
        codes: [..., T, K] float8_e4m3fn.
        scales: [..., T, ceil(K/group)] float8_e8m0fnu or fp32, multiplies.
        group: values per scale.

    Raises:
        TypeError: a dtype is not as above; raw scale bytes are refused because a cast would destroy them.
        ValueError: a shape is not as above, group is not positive, or the parts are on different devices.
    """

    codes: Tensor
    scales: Tensor
    group: int = 128

    def __post_init__(self) -> None:
        """Check dtypes, shapes and devices."""
        _check_dtypes("Fp8RowTensor", self.codes, self.scales)
        _check_group("Fp8RowTensor", self.group)
        expected = [*self.codes.shape[:-1], -(-self.codes.shape[-1] // self.group)]
        _check_scale_shape("Fp8RowTensor", f"[..., T, ceil(K/{self.group})]", self.codes, self.scales, expected)

    @property
    def shape(self) -> torch.Size:
        """Shape [..., T, K]."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.codes.ndim

    @property
    def device(self) -> torch.device:
        """Device of all parts."""
        return self.codes.device

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return self.codes.numel() + self.scales.numel() * self.scales.element_size()

    def to(self, device: torch.device | str) -> "Fp8RowTensor":
        """Return this tensor with all parts on a device."""
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))


def quantize_blocks(x: Tensor, scale_dtype: torch.dtype = torch.float8_e8m0fnu) -> Fp8BlockTensor:
    """Round values to FP8 with one scale per 128 x 128 block.

    Args:
        x: [..., N, K] fp32, bf16 or fp16, finite; N and K positive, multiples of 128 or not.
        scale_dtype: float8_e8m0fnu or fp32.

    Returns:
        Fp8BlockTensor, newly allocated.

    Raises:
        TypeError: x or scale_dtype is not as above.
        ValueError: a shape is not as above, or x holds a NaN or an infinity.
    """
    x = as_float32("fp8.quantize_blocks", x)
    if x.ndim < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"fp8.quantize_blocks: x must be [..., N, K], N and K positive; got {list(x.shape)}. Check x.")
    num_rows, num_columns = x.shape[-2:]
    padded = torch.nn.functional.pad(x, (0, -num_columns % BLOCK, 0, -num_rows % BLOCK))
    row_tiles, column_tiles = padded.shape[-2] // BLOCK, padded.shape[-1] // BLOCK
    tiles = padded.view(*x.shape[:-2], row_tiles, BLOCK, column_tiles, BLOCK)
    scale, stored = _make_scales("fp8.quantize_blocks", tiles.abs().amax((-1, -3)), scale_dtype)
    codes = round_to_e4m3(tiles / scale[..., None, :, None]).view(padded.shape)
    return Fp8BlockTensor(codes[..., :num_rows, :num_columns].contiguous(), stored)


def quantize_rows(x: Tensor, *, group: int = 128, scale_dtype: torch.dtype = torch.float8_e8m0fnu) -> Fp8RowTensor:
    """Round values to FP8 with one scale per group along each row.

    Args:
        x: [..., T, K] fp32, bf16 or fp16, finite; K positive, a multiple of group or not; T may be 0.
        group: values per scale.
        scale_dtype: float8_e8m0fnu or fp32.

    Returns:
        Fp8RowTensor, newly allocated.

    Raises:
        TypeError: x or scale_dtype is not as above.
        ValueError: a shape or group is not as above, or x holds a NaN or an infinity.
    """
    x = as_float32("fp8.quantize_rows", x)
    _check_group("fp8.quantize_rows", group)
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(f"fp8.quantize_rows: x must be [..., T, K] with K positive; got {list(x.shape)}. Check x.")
    codes, stored = quantize_groups("fp8.quantize_rows", x, group, scale_dtype)
    return Fp8RowTensor(codes, stored, group)


def quantize_groups(function: str, x: Tensor, group: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round fp32 [..., K] to E4M3 codes [..., K] and scales [..., ceil(K/group)] by the FP8 rule."""
    width = x.shape[-1]
    missing = -width % group
    padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
    groups = padded.view(*x.shape[:-1], padded.shape[-1] // group, group)
    scale, stored = _make_scales(function, groups.abs().amax(-1), scale_dtype)
    codes = round_to_e4m3(groups / scale[..., None]).view(padded.shape)
    return (codes[..., :width].contiguous() if missing else codes), stored


def dequantize(t: Fp8BlockTensor | Fp8RowTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values of an FP8 tensor.

    Args:
        t: block or row tensor.
        dtype: fp32, bf16 or fp16.

    Returns:
        The shape of t in dtype, contiguous, newly allocated.

    Raises:
        TypeError: dtype is not as above.
        ValueError: a code or a scale is NaN, or an fp32 scale is negative or infinite.
    """
    require_output_dtype("fp8.dequantize", dtype)
    values = decode_e4m3(t.codes)
    scale = _scale_values(t.scales)
    group = BLOCK
    if isinstance(t, Fp8RowTensor):
        group = t.group
    else:
        scale = scale.repeat_interleave(BLOCK, dim=-2)[..., : t.shape[-2], :]
    if t.shape[-1] % group == 0:
        values.view(*scale.shape, group).mul_(scale[..., None])
    else:
        values.mul_(scale.repeat_interleave(group, dim=-1)[..., : t.shape[-1]])
    return values.to(dtype)


def _make_scales(function: str, amax: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if scale_dtype not in (torch.float8_e8m0fnu, torch.float32):
        raise TypeError(f"{function}: scale_dtype must be float8_e8m0fnu or float32; got {scale_dtype}. Choose one.")
    refuse_non_finite_amax(function, amax)
    scale = divide(amax.clamp_(min=AMAX_FLOOR), E4M3_MAX)
    if scale_dtype == torch.float32:
        return scale, scale
    return ceil_to_e8m0(scale)


def _scale_values(scales: Tensor) -> Tensor:
    if scales.dtype == torch.float8_e8m0fnu:
        return decode_e8m0(scales)
    if scales.numel() and not (float(scales.amin()) >= 0.0 and float(scales.amax()) < torch.inf):
        raise ValueError(
            f"fp8.dequantize: scales must be finite and not negative; got {float(scales.amin())} to "
            f"{float(scales.amax())}. Check that they were read as fp32."
        )
    return scales


def _check_dtypes(name: str, codes: Tensor, scales: Tensor) -> None:
    if codes.dtype != torch.float8_e4m3fn:
        raise TypeError(
            f"{name}: codes must be float8_e4m3fn; got {codes.dtype}. Reinterpret raw bytes with "
            ".view(torch.float8_e4m3fn)."
        )
    if scales.dtype not in (torch.float8_e8m0fnu, torch.float32):
        raise TypeError(
            f"{name}: scales must be float8_e8m0fnu or float32; got {scales.dtype}. Reinterpret raw bytes with "
            ".view(torch.float8_e8m0fnu); a numeric cast destroys them."
        )


def _check_scale_shape(name: str, wanted: str, codes: Tensor, scales: Tensor, expected: list[int]) -> None:
    if codes.ndim < 2 or codes.shape[-1] == 0:
        raise ValueError(f"{name}: codes must have two or more dimensions, the last positive; got {list(codes.shape)}.")
    got = list(scales.shape)
    if got != expected:
        transposed = len(got) >= 2 and [*got[:-2], got[-1], got[-2]] == expected
        hint = "The scales are transposed." if transposed else "Check that codes and scales come from the same tensor."
        raise ValueError(
            f"{name}: scales must be {wanted} = {expected} for codes {list(codes.shape)}; got {got}. {hint}"
        )
    require_one_device(name, codes, scales)


def _check_group(name: str, group: int) -> None:
    if group < 1:
        raise ValueError(f"{name}: group must be positive; got {group}. Activations use 128, cache rows 64.")
