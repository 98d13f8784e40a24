# SPDX-License-Identifier: Apache-2.0
"""copy_cache: rows of pools copied, a few threads a row.

Meaning    ops/copy_cache.py; this file only makes it fast
Grid       128 threads for one or several rows
Memory     16-byte loads and stores
Limits     pages at multiples of 16 bytes; rows of 16-byte multiples with 0, 4 or 8 bytes of scales
Bound      memory: each row read and written
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.formats.cache_rows import CachePool, RowFormat, row_bytes
from megamoe.kernels.cache.copy_rows_config import Config
from megamoe.kernels.parts.pool import as_pool
from megamoe.kernels.store import kernel

LATENT_WIDTH = 512


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    for row_format in row_formats(dims["width"]):
        yield Config("copy", *row_bytes(row_format, dims["width"]))


def row_formats(width: int) -> tuple[RowFormat, ...]:
    """Return the formats in which a model copies rows of a width: latents are 512 wide, so are raw index rows."""
    return (RowFormat.FP8_ROPE_BF16, RowFormat.FP32) if width == LATENT_WIDTH else (RowFormat.FP32,)


def require_rows(op: str, pool: CachePool) -> tuple[int, int]:
    """Return the bytes of a row's data and scales, refusing rows that the kernel does not move."""
    data_bytes, scale_bytes = row_bytes(pool.row_format, pool.width)
    if data_bytes % 16 or scale_bytes not in (0, 4, 8):
        raise NotImplementedError(
            f"{op}: the kernel moves rows of a multiple of 16 bytes with 0, 4 or 8 bytes of scales; got {data_bytes} "
            f'and {scale_bytes}. Run the reference: with megamoe.ops.use("reference").'
        )
    return data_bytes, scale_bytes


def run(source: CachePool, source_slots: torch.Tensor, target: CachePool, target_slots: torch.Tensor) -> None:
    """Compute copy_cache."""
    if source_slots.shape[0]:
        launch = kernel(Config("copy", *require_rows("copy_cache", source)), source.device)
        launch(
            as_pool("copy_cache", "source", source),
            source_slots,
            as_pool("copy_cache", "target", target),
            target_slots,
            source.rows_per_block,
            target.rows_per_block,
        )
