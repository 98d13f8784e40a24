# SPDX-License-Identifier: Apache-2.0
"""token_logprobs: one block a row; the most probable tokens one after another.

Meaning    ops/token_logprobs.py; this file only makes it fast
Grid       one block of 1,024 threads a row
Passes     two over the row, and one for each of the most probable tokens, from L2
Bound      memory: the row
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.sampling.token_logprobs_config import Config
from megamoe.kernels.store import kernel
from megamoe.ops.token_logprobs import Logprobs


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config()


def run(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> Logprobs:
    """Compute token_logprobs."""
    num_rows, device = logits.shape[0], logits.device
    num_top = min(num_top, logits.shape[1])
    chosen = torch.empty(num_rows, dtype=torch.float32, device=device)
    top_ids = torch.empty((num_rows, num_top), dtype=torch.int64, device=device)
    top = torch.empty((num_rows, num_top), dtype=torch.float32, device=device)
    if num_rows:
        rows = logits if logits.stride(1) == 1 else logits.contiguous()
        kernel(Config(), device)(rows, token_ids, chosen, top_ids, top)
    return Logprobs(chosen, top_ids, top)
