# SPDX-License-Identifier: Apache-2.0
"""copy_cache: rows of pools copied, a few threads for a narrow row and a warp for 4 KiB of a wide one.

Meaning    ops/copy_cache.py; this file only makes it fast
Grid       128 threads a block; rows of any size and format are one object
Memory     16-byte loads and stores of data, four bytes of scales
Limits     pages at multiples of 16 bytes, below 2 GiB; rows of a multiple of 16 bytes with a multiple of 4 bytes of
           scales; slots below 2^31
Bound      memory: each row read and written
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.formats.cache_rows import CachePool, row_bytes
from megamoe.kernels.cache.copy_rows_config import Config
from megamoe.kernels.parts.pool import as_pool
from megamoe.kernels.store import kernel

TILES = ((8, 5), (32, 8))
"""Lanes, and vectors of each of them, of narrow rows and of wide ones."""
NARROW = 40
"""Most vectors of a narrow row, which eight threads copy at once: a latent has 36."""


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield from (Config("copy", *tile) for tile in TILES)


def row_pieces(op: str, pool: CachePool) -> tuple[int, int]:
    """Return the 16-byte vectors of a row's data and the 4-byte words of its scales.

    Raises:
        NotImplementedError: a row is not made of these.
    """
    data_bytes, scale_bytes = row_bytes(pool.row_format, pool.width)
    if data_bytes % 16 or scale_bytes % 4:
        raise NotImplementedError(
            f"{op}: the kernel takes rows of a multiple of 16 bytes with a multiple of 4 bytes of scales; got "
            f"{data_bytes} and {scale_bytes} bytes ({pool.row_format.name} of width {pool.width}). Run the reference: "
            'with megamoe.ops.use("reference").'
        )
    return data_bytes // 16, scale_bytes // 4


def tile_of(vectors: int) -> tuple[int, int]:
    """Return how a row of so many vectors is shared out."""
    return TILES[vectors > NARROW]


def run(source: CachePool, source_slots: torch.Tensor, target: CachePool, target_slots: torch.Tensor) -> None:
    """Compute copy_cache."""
    if source_slots.shape[0]:
        pieces = row_pieces("copy_cache", source)
        kernel(Config("copy", *tile_of(pieces[0])), source.device)(
            as_pool("copy_cache", "source", source),
            source_slots,
            as_pool("copy_cache", "target", target),
            target_slots,
            source.rows_per_block,
            target.rows_per_block,
            *pieces,
        )
