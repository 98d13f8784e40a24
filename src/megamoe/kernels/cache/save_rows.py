# SPDX-License-Identifier: Apache-2.0
"""save_rows: the last rows of sequences copied into snapshots.

Meaning    ops/save_rows.py; everything else as in cache/copy_cache.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.kernels.cache.copy_cache import TILES, row_pieces, tile_of
from megamoe.kernels.cache.copy_rows_config import Config
from megamoe.kernels.parts.pool import as_pool
from megamoe.kernels.store import kernel


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield from (Config("save", *tile) for tile in TILES)


def run(
    ring: CachePool, step: CachePool | None, target: CachePool, saves: torch.Tensor, block_tables: torch.Tensor
) -> None:
    """Compute save_rows."""
    if saves.shape[0]:
        pieces = row_pieces("save_rows", ring)
        rows = ring if step is None else step
        kernel(Config("save", *tile_of(pieces[0])), ring.device)(
            as_pool("save_rows", "ring", ring),
            as_pool("save_rows", "step", rows),
            as_pool("save_rows", "target", target),
            saves,
            block_tables,
            ring.rows_per_block,
            rows.rows_per_block,
            target.rows_per_block,
            *pieces,
            int(step is not None),
        )
