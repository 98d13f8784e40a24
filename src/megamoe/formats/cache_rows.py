# SPDX-License-Identifier: Apache-2.0
"""Rows of the key-value caches, and the paged pool that holds them.

Page       a page of P rows is the data of all P rows, then the scale bytes of all P rows. With W values per row:

           FP8_ROPE_BF16  data W - 64 bytes E4M3 (one scale per 64) + 128 bytes of 64 bf16 rotary values; scales
                          (W - 64) / 64 E8M0 bytes + one zero byte. W = 512: 576 + 8 = 584 bytes.
           BF16, FP32     data 2 W or 4 W bytes; no scales.
           INDEX_FP8      data W bytes E4M3; one fp32 power-of-two scale. W = 128: 132 bytes.
           INDEX_FP4      data W / 2 bytes E2M1; W / 32 E8M0 bytes. W = 128: 68 bytes.

Stride     pages need not touch: block b starts at b * stride bytes, stride >= page bytes, so that several layers' pages
           can share one block.
Range      FP8_ROPE_BF16 rows hold values within +-57344 = 448 * 2^7; a row is written saturated. So no group's scale
           exceeds 2^7, and fp16, which attention multiplies, holds every value: exactly from 2^-17 on.
Numerics   E4M3 scales 2^ceil(log2(max(amax, 1e-4) / 448)); E2M1 scales 2^ceil(log2(max(amax, 6 * 2^-126) / 6)); rotary
           values one rounding to bf16. Multi-byte numbers are little-endian.
Source     docs/numerics.md, section "Cache rows"
"""

import enum
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.formats import e2m1, fp8, mxfp4
from megamoe.formats.e4m3 import decode_e4m3
from megamoe.formats.e8m0 import decode_e8m0

ROPE_WIDTH = 64
FP8_GROUP = 64
MAX_LATENT = 57344.0
"""Largest value of an FP8_ROPE_BF16 row: 448 * 2^7, the largest scale with which every E4M3 code is an fp16 number."""
FP4_GROUP = mxfp4.BLOCK


class RowFormat(enum.Enum):
    """How one cache row is stored."""

    FP8_ROPE_BF16 = "fp8_rope_bf16"
    BF16 = "bf16"
    FP32 = "fp32"
    INDEX_FP8 = "index_fp8"
    INDEX_FP4 = "index_fp4"


class EncodedRows(NamedTuple):
    """Bytes of T rows: data [T, data_bytes] and scales [T, scale_bytes], both uint8."""

    data: Tensor
    scales: Tensor


def row_bytes(row_format: RowFormat, width: int) -> tuple[int, int]:
    """Return (data bytes, scale bytes) of one row.

    Args:
        row_format: how the row is stored.
        width: values per row. FP8_ROPE_BF16: a multiple of 64, at least 128. INDEX_FP4: a multiple of 32.

    Returns:
        Bytes of the row in the page's data part and in its scale part.

    Raises:
        ValueError: the format does not hold rows of this width.
    """
    if width < 1:
        raise ValueError(f"{row_format.name}: width must be positive; got {width}. It is the number of values per row.")
    if row_format is RowFormat.BF16:
        return 2 * width, 0
    if row_format is RowFormat.FP32:
        return 4 * width, 0
    if row_format is RowFormat.INDEX_FP8:
        return width, 4
    if row_format is RowFormat.INDEX_FP4:
        if width % FP4_GROUP:
            raise ValueError(f"INDEX_FP4: width must be a multiple of 32; got {width}. Use INDEX_FP8, BF16 or FP32.")
        return width // 2, width // FP4_GROUP
    if width % FP8_GROUP or width < ROPE_WIDTH + FP8_GROUP:
        raise ValueError(
            f"FP8_ROPE_BF16: width must be a multiple of 64 and at least 128 (groups of 64, then 64 rotary values); "
            f"got {width}. Use BF16 or FP32."
        )
    return width - ROPE_WIDTH + 2 * ROPE_WIDTH, width // FP8_GROUP


def page_bytes(row_format: RowFormat, rows_per_block: int, width: int) -> int:
    """Return the bytes of one page of rows_per_block rows, without padding between pages."""
    return rows_per_block * sum(row_bytes(row_format, width))


@dataclass(frozen=True, eq=False)
class CachePool:
    """Pages of cache rows in device memory.

    Slot s is row s % rows_per_block of block s // rows_per_block.

    Args:
        storage: [num_blocks, page_bytes] uint8 with strides (block stride, 1); the block stride may exceed page_bytes,
            and bytes between pages belong to others.
        rows_per_block: rows per page.
        row_format: how a row is stored.
        width: values per row.

    Raises:
        TypeError: storage is not uint8.
        ValueError: shape, strides or alignment do not fit the format.
    """

    storage: Tensor
    rows_per_block: int
    row_format: RowFormat
    width: int

    def __post_init__(self) -> None:
        """Check dtype, shape, strides and alignment."""
        if self.storage.dtype != torch.uint8:
            raise TypeError(
                f"CachePool: storage must be uint8; got {self.storage.dtype}. Reinterpret with .view(torch.uint8)."
            )
        if self.rows_per_block < 1:
            raise ValueError(f"CachePool: rows_per_block must be positive; got {self.rows_per_block}. Check the plan.")
        wanted = page_bytes(self.row_format, self.rows_per_block, self.width)
        if self.storage.ndim != 2 or self.storage.shape[1] != wanted:
            raise ValueError(
                f"CachePool: storage must be [num_blocks, {wanted}] for {self.rows_per_block} rows of {self.width} "
                f"values in {self.row_format.name}; got {list(self.storage.shape)}. Slice a larger block: "
                f"block[:, start : start + {wanted}]."
            )
        stride, unit = self.storage.stride()
        if unit != 1 or (self.storage.shape[0] > 1 and stride < wanted):
            raise ValueError(
                f"CachePool: storage strides must be (block stride >= {wanted}, 1); got {self.storage.stride()}. Pages "
                "must not overlap and their bytes must be adjacent."
            )
        alignment = _ALIGNMENT[self.row_format]
        if stride % alignment or self.storage.storage_offset() % alignment:
            raise ValueError(
                f"CachePool: {self.row_format.name} pages must start at multiples of {alignment} bytes; got block "
                f"stride {stride}, offset {self.storage.storage_offset()}. Pad the block stride or move the page."
            )

    @classmethod
    def allocate(
        cls,
        num_blocks: int,
        rows_per_block: int,
        row_format: RowFormat,
        width: int,
        device: torch.device | str = "cpu",
        block_stride_bytes: int | None = None,
    ) -> "CachePool":
        """Allocate a pool of zero bytes.

        Args:
            num_blocks: number of pages.
            rows_per_block: rows per page.
            row_format: how a row is stored.
            width: values per row.
            device: where.
            block_stride_bytes: bytes from one page to the next; None: the page's bytes rounded up to 16.

        Returns:
            The pool.

        Raises:
            ValueError: the width does not fit the format, or the stride is too small or misaligned.
        """
        wanted = page_bytes(row_format, rows_per_block, width)
        stride = -(-wanted // 16) * 16 if block_stride_bytes is None else block_stride_bytes
        if stride < wanted:
            raise ValueError(
                f"CachePool.allocate: block_stride_bytes must be at least the page's {wanted} bytes; got {stride}. "
                "Leave it out for the smallest."
            )
        block = torch.zeros(num_blocks, stride, dtype=torch.uint8, device=device)
        return cls(block[:, :wanted], rows_per_block, row_format, width)

    @property
    def device(self) -> torch.device:
        """Device of the storage."""
        return self.storage.device

    @property
    def num_blocks(self) -> int:
        """Number of pages."""
        return self.storage.shape[0]

    @property
    def num_slots(self) -> int:
        """Number of rows in all pages."""
        return self.num_blocks * self.rows_per_block

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.storage.shape[1]

    @property
    def block_stride_bytes(self) -> int:
        """Bytes from one page to the next."""
        return self.storage.stride(0)

    @property
    def data_rows(self) -> Tensor:
        """Data part as a view [num_blocks, rows_per_block, data_bytes] uint8; writing to it writes to the pool."""
        data_bytes, _ = row_bytes(self.row_format, self.width)
        size = (self.num_blocks, self.rows_per_block, data_bytes)
        return self.storage.as_strided(size, (self.block_stride_bytes, data_bytes, 1), self.storage.storage_offset())

    @property
    def scale_rows(self) -> Tensor:
        """Scale part as a view [num_blocks, rows_per_block, scale_bytes] uint8; writing to it writes to the pool."""
        data_bytes, scale_bytes = row_bytes(self.row_format, self.width)
        size = (self.num_blocks, self.rows_per_block, scale_bytes)
        offset = self.storage.storage_offset() + self.rows_per_block * data_bytes
        return self.storage.as_strided(size, (self.block_stride_bytes, max(scale_bytes, 1), 1), offset)


def encode_rows(x: Tensor, row_format: RowFormat) -> EncodedRows:
    """Turn values into the bytes of cache rows.

    Args:
        x: [T, width] fp32, bf16 or fp16; T may be 0. Finite, except that BF16 and FP32 rows store any value.
            FP8_ROPE_BF16 rows saturate at MAX_LATENT.
        row_format: how the rows are stored.

    Returns:
        EncodedRows: data [T, data_bytes] and scales [T, scale_bytes], uint8. Newly allocated, except that BF16 rows of
        bf16 x and FP32 rows of fp32 x share memory with x.

    Raises:
        TypeError: x is not fp32, bf16 or fp16.
        ValueError: x is not [T, width], the width does not fit the format, or a value to be quantized is not finite.
    """
    if x.ndim != 2:
        raise ValueError(f"encode_rows: x must be [T, width]; got {list(x.shape)}. Flatten the leading dimensions.")
    row_bytes(row_format, x.shape[1])
    if row_format is RowFormat.BF16 and x.dtype == torch.bfloat16:
        return EncodedRows(_as_bytes(x), x.new_empty((x.shape[0], 0), dtype=torch.uint8))
    x = e2m1.as_float32("encode_rows", x)
    num_rows, width = x.shape
    if row_format is RowFormat.BF16:
        return EncodedRows(_as_bytes(x.bfloat16()), x.new_empty((num_rows, 0), dtype=torch.uint8))
    if row_format is RowFormat.FP32:
        return EncodedRows(_as_bytes(x), x.new_empty((num_rows, 0), dtype=torch.uint8))
    if row_format is RowFormat.INDEX_FP4:
        packed, scales = mxfp4.quantize_groups("encode_rows", x)
        return EncodedRows(packed, scales.view(torch.uint8))
    if row_format is RowFormat.INDEX_FP8:
        codes, scales = fp8.quantize_groups("encode_rows", x, width, torch.float8_e8m0fnu)
        return EncodedRows(codes.view(torch.uint8), _as_bytes(decode_e8m0(scales)))
    e2m1.refuse_non_finite("encode_rows", x)  # before the clamp, which would make an infinity an ordinary number
    x = x.clamp(-MAX_LATENT, MAX_LATENT)
    latent, rope = x[:, :-ROPE_WIDTH].contiguous(), x[:, -ROPE_WIDTH:]
    codes, scales = fp8.quantize_groups("encode_rows", latent, FP8_GROUP, torch.float8_e8m0fnu)
    data = torch.cat((codes.view(torch.uint8), _as_bytes(rope.bfloat16())), dim=1)
    return EncodedRows(data, torch.nn.functional.pad(scales.view(torch.uint8), (0, 1)))


def decode_rows(data: Tensor, scales: Tensor, row_format: RowFormat, width: int) -> Tensor:
    """Turn the bytes of cache rows into values.

    Args:
        data: [T, data_bytes] uint8, contiguous or not.
        scales: [T, scale_bytes] uint8.
        row_format: how the rows are stored.
        width: values per row.

    Returns:
        [T, width] fp32, newly allocated.

    Raises:
        TypeError: data or scales is not uint8.
        ValueError: shapes do not fit the format, or a quantized code or its scale is NaN (an unwritten or damaged row).
    """
    data_bytes, scale_bytes = row_bytes(row_format, width)
    if data.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise TypeError(f"decode_rows: data, scales must be uint8; got {data.dtype}, {scales.dtype}. Pass raw bytes.")
    if data.ndim != 2 or list(data.shape[1:]) != [data_bytes] or list(scales.shape) != [data.shape[0], scale_bytes]:
        raise ValueError(
            f"decode_rows: {row_format.name} rows of {width} values are data [T, {data_bytes}] and scales "
            f"[T, {scale_bytes}]; got {list(data.shape)} and {list(scales.shape)}. Take them from "
            "CachePool.data_rows and scale_rows."
        )
    if row_format is RowFormat.BF16:
        return _as_numbers(data, torch.bfloat16).float()
    if row_format is RowFormat.FP32:
        return _as_numbers(data, torch.float32).clone()
    if row_format is RowFormat.INDEX_FP4:
        values = e2m1.decode_packed(data).view(-1, width // FP4_GROUP, FP4_GROUP)
        return values.mul_(decode_e8m0(scales.view(torch.float8_e8m0fnu))[..., None]).view(-1, width)
    if row_format is RowFormat.INDEX_FP8:
        scale = _as_numbers(scales, torch.float32)
        if scale.numel() and not (float(scale.amin()) >= 0.0 and float(scale.amax()) < torch.inf):
            raise ValueError(
                f"decode_rows: INDEX_FP8 scales must be finite and not negative; got {float(scale.amin())} to "
                f"{float(scale.amax())}. The row is unwritten or damaged."
            )
        return decode_e4m3(data.view(torch.float8_e4m3fn)).mul_(scale)
    latent_width = width - ROPE_WIDTH
    latent = decode_e4m3(data[:, :latent_width].view(torch.float8_e4m3fn))
    scale = decode_e8m0(scales[:, :-1].view(torch.float8_e8m0fnu))
    latent.view(*scale.shape, FP8_GROUP).mul_(scale[..., None])
    return torch.cat((latent, _as_numbers(data[:, latent_width:], torch.bfloat16).float()), dim=1)


def _as_bytes(x: Tensor) -> Tensor:
    """Return the bytes of numbers [T, n] as [T, n * size], sharing memory where x is contiguous."""
    return x.reshape(-1).view(torch.uint8).view(x.shape[0], x.shape[1] * x.element_size())


def _as_numbers(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers in bytes [T, n * size] as [T, n], sharing memory where data is contiguous and aligned."""
    flat = data.reshape(-1)
    flat = flat.clone() if flat.storage_offset() % dtype.itemsize else flat
    return flat.view(dtype).view(data.shape[0], data.shape[1] // dtype.itemsize)


# Bytes a page's start must be a multiple of, so that bf16 and fp32 parts can be read in place.
_ALIGNMENT = {
    RowFormat.FP8_ROPE_BF16: 2,
    RowFormat.BF16: 2,
    RowFormat.FP32: 4,
    RowFormat.INDEX_FP8: 4,
    RowFormat.INDEX_FP4: 1,
}
