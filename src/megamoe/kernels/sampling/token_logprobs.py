# SPDX-License-Identifier: Apache-2.0
"""token_logprobs: a cluster a row, which is read once; blocks list their most probable tokens, then lists are merged.

Meaning    ops/token_logprobs.py; this file only makes it fast
Grid       a cluster of 8 blocks of 512 threads a row; each block keeps its share of the row in shared memory
Sums       by thread, warp, block and cluster, in an order that depends on V alone
Limits     up to 131,072 columns
Bound      memory: the row, once
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.parts.launch import as_logits, require_columns
from megamoe.kernels.sampling.token_logprobs_config import Config
from megamoe.kernels.store import kernel


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config()


def run(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute token_logprobs."""
    require_columns("token_logprobs", logits.shape[1])
    num_rows, device = logits.shape[0], logits.device
    num_top = min(num_top, logits.shape[1])
    chosen = torch.empty(num_rows, dtype=torch.float32, device=device)
    top_ids = torch.empty((num_rows, num_top), dtype=torch.int64, device=device)
    top = torch.empty((num_rows, num_top), dtype=torch.float32, device=device)
    if num_rows:
        kernel(Config(), device)(as_logits(logits), token_ids.contiguous(), chosen, top_ids, top)
    return chosen, top_ids, top
