# SPDX-License-Identifier: Apache-2.0
"""penalize: a thread a pair, in place.

Meaning    ops/penalize.py; every step rounds as it says
Grid       128 threads a block
Limits     a pair outside the logits changes nothing
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.parts.launch import as_logits
from megamoe.kernels.sampling.penalize_config import Config
from megamoe.kernels.store import kernel


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config()


def run(
    logits: torch.Tensor,
    row_idx: torch.Tensor,
    token_ids: torch.Tensor,
    counts: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """Compute penalize."""
    rows = as_logits(logits)
    pairs = (row_idx, token_ids, counts, repetition, presence, frequency)
    kernel(Config(), logits.device)(rows, *[one.contiguous() for one in pairs])
    if rows is not logits:
        logits.copy_(rows)
