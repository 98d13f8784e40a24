# SPDX-License-Identifier: Apache-2.0
"""Compile key of write_latent."""

from __future__ import annotations

import dataclasses

from megamoe.kernels.parts.rows import BLOCK_THREADS, VECTOR, WARP, RowTile


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: C.
        rope: R.
        kv, weight: "bf16" or "f32".
        row_format: of the pool.
        query: Q, or None where there are rows and no queries.
        query_latent, query_weight: "bf16" or "f32", or None.
    """

    width: int
    rope: int
    kv: str
    weight: str
    row_format: str
    query: int | None
    query_latent: str | None
    query_weight: str | None


def one_warp_tile(width: int) -> RowTile:
    """Return the tile that leaves a row to one warp or less: blocks of both kinds of rows are alike, 128 threads."""
    num_vectors = width // VECTOR
    lanes = min(WARP, max(8, 1 << (-(-num_vectors // 4) - 1).bit_length()))
    return RowTile(width, lanes, -(-num_vectors // lanes), BLOCK_THREADS // lanes, num_vectors % lanes == 0)
