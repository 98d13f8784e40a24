# SPDX-License-Identifier: Apache-2.0
"""sample: one block a row; the token is found by digits of its logit, not by sorting.

Meaning    ops/sample.py, docs/decisions/0013-integer-masses.md; every step rounds as it says, and sums are of integers
Grid       one block of 1,024 threads a row
Passes     one over the row for the largest logit; for a drawn token five more for each of top-k, top-p and the draw:
           masses (or ones) are added by bins of a digit, and the next pass looks at one bin
Limits     up to 2^22 columns. Values that the reference refuses (NaN, a row of -inf) give some token of the row
Bound      memory: the row, from L2 after the first pass
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.sampling.sample_config import Config
from megamoe.kernels.store import kernel


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config(False)
    yield Config(True)


def run(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor | None,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Compute sample."""
    ids = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if ids.numel():
        rows = logits if logits.stride(1) == 1 else logits.contiguous()
        least = () if min_p is None else (min_p,)
        kernel(Config(min_p is not None), logits.device)(rows, temperature, top_k, top_p, *least, uniform, ids)
    return ids
