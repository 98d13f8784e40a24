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

from megamoe.kernels.parts.held_row import require_columns
from megamoe.kernels.sampling.token_logprobs_config import Config
from megamoe.kernels.store import kernel
from megamoe.ops.token_logprobs import Logprobs


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config()


def run(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> Logprobs:
    """Compute token_logprobs."""
    require_columns("token_logprobs", logits.shape[1])
    num_rows, device = logits.shape[0], logits.device
    num_top = min(num_top, logits.shape[1])
    chosen = torch.empty(num_rows, dtype=torch.float32, device=device)
    top_ids = torch.empty((num_rows, num_top), dtype=torch.int64, device=device)
    top = torch.empty((num_rows, num_top), dtype=torch.float32, device=device)
    if num_rows:
        rows = logits if logits.stride(1) == 1 else logits.contiguous()
        kernel(Config(), device)(rows, token_ids, chosen, top_ids, top)
    return Logprobs(chosen, top_ids, top)
