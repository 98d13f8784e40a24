# SPDX-License-Identifier: Apache-2.0
"""index_topk: two launches, index_scores and index_select, for as many tokens at a time as the workspace takes.

Meaning    ops/index_topk.py; this file only makes it fast
Memory     a workspace of 4 bytes an entry that the block table has room for, of so many tokens at a time that it stays
           within WORKSPACE_BYTES (always at least one token)
Limits     FP4 queries and keys of 128 channels; 8, 16, … 64 heads; top_k up to 1,024
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.formats.fp8 import Fp8RowTensor
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.kernels.indexer import (
    index_scores,
    index_scores_config,
    index_scores_sm90_config,
    index_select,
    index_select_config,
)

WIDTH = index_scores_config.WIDTH
HEAD_STEP, MAX_HEADS = 8, 64
ROW_ENTRIES = 128
"""Rows of the workspace are a multiple of this."""
WORKSPACE_BYTES = 64 * 2**20


def configs(dims: Mapping[str, int]) -> Iterator[Any]:
    """Yield what a model needs for one entry of its shape table."""
    yield index_scores_config.Config(dims["Hi"])
    yield index_scores_sm90_config.Config(dims["Hi"])
    for cluster in index_select.CLUSTERS:
        yield index_select_config.Config(dims["top_k"], cluster)


def run(
    q: torch.Tensor | MxFp4Tensor | Fp8RowTensor,
    head_weights: torch.Tensor,
    keys: CachePool,
    block_tables: torch.Tensor,
    requests: torch.Tensor,
    num_visible: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """Compute index_topk."""
    num_tokens, heads, width = q.shape
    if not isinstance(q, MxFp4Tensor) or keys.row_format is not RowFormat.INDEX_FP4:
        raise NotImplementedError(
            f"index_topk: the kernel takes FP4 queries and keys; got {type(q).__name__} and {keys.row_format.name} "
            'rows. Use a recipe with FP4 index keys, or run the reference: with megamoe.ops.use("reference").'
        )
    if width != WIDTH or heads % HEAD_STEP or not HEAD_STEP <= heads <= MAX_HEADS:
        raise NotImplementedError(
            f"index_topk: the kernel takes {HEAD_STEP}, {2 * HEAD_STEP}, ... {MAX_HEADS} heads of {WIDTH} channels; "
            f'got {heads} of {width}. Run the reference: with megamoe.ops.use("reference").'
        )
    if top_k > index_select.MAX_TOP_K:
        raise NotImplementedError(
            f"index_topk: the kernel selects up to {index_select.MAX_TOP_K} entries a token; got {top_k}. Run the "
            'reference: with megamoe.ops.use("reference").'
        )
    entries = torch.empty((num_tokens, top_k), dtype=torch.int32, device=q.device)
    if not num_tokens or not top_k:
        return entries
    room = block_tables.shape[1] * keys.rows_per_block
    is_scored = room > top_k  # else nobody can see more entries than it selects
    row = -(-room // ROW_ENTRIES) * ROW_ENTRIES if is_scored else ROW_ENTRIES
    at_once = min(num_tokens, max(1, WORKSPACE_BYTES // (4 * row)))
    scores = torch.empty((at_once, row), dtype=torch.int32, device=q.device)
    for first in range(0, num_tokens, at_once):
        some = slice(first, first + at_once)
        query = MxFp4Tensor(q.codes[some], q.scales[some])
        part = scores[: query.shape[0]]
        rows = requests[some], num_visible[some]
        if is_scored:
            index_scores.run(query, head_weights[some], keys, block_tables, *rows, top_k, part)
        index_select.run(part, *rows, room, entries[some])
    return entries
