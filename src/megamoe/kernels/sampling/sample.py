# SPDX-License-Identifier: Apache-2.0
"""sample: a cluster a row, which is read once; the token is found by histograms, not by sorting.

Meaning    ops/sample.py, docs/decisions/0013-integer-masses.md; every step rounds as it says, and sums are of integers
Grid       a cluster of 8 blocks of 512 threads a row; each block keeps its share of the row in shared memory
Steps      the best token; for a drawn one a histogram of masses by their distance to the best, and for each of top-k,
           top-p and the draw the bin in it and up to four histograms of that bin's logits
Limits     up to 131,072 columns. Values that the reference refuses (NaN, a row of -inf) give some token of the row
Bound      memory: the row, once
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.parts.launch import as_logits, require_columns
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
    require_columns("sample", logits.shape[1])
    ids = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if ids.numel():
        launch = kernel(Config(min_p is not None), logits.device)
        of_rows = [one.contiguous() for one in (temperature, top_k, top_p, min_p, uniform) if one is not None]
        launch(as_logits(logits), *of_rows, ids)
    return ids
