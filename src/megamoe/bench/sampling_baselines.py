# SPDX-License-Identifier: Apache-2.0
"""What the kernels that choose tokens are timed against: the usual lines of torch."""

from __future__ import annotations

import torch

from megamoe.ops.token_logprobs import Logprobs


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sort, cut, add up, and take the first token beyond the random number; the best one at temperature 0."""
    ordered, order = logits.sort(dim=-1, descending=True)
    weights = ((ordered - ordered[:, :1]) / temperature.clamp(min=1e-6)[:, None]).softmax(-1)
    rank = torch.arange(logits.shape[1], device=logits.device)
    weights = torch.where((rank < top_k[:, None]) | (top_k[:, None] <= 0), weights, 0.0)
    if min_p is not None:
        weights = torch.where(weights >= min_p[:, None] * weights[:, :1], weights, 0.0)
    running = weights.cumsum(-1)
    weights = torch.where(running - weights < top_p[:, None] * running[:, -1:], weights, 0.0)
    running = weights.cumsum(-1)
    picked = torch.searchsorted(running, uniform[:, None] * running[:, -1:], right=True)
    ids = order.gather(1, picked.clamp(max=logits.shape[1] - 1))[:, 0]
    return torch.where(temperature > 0.0, ids, order[:, 0])


def penalize(
    logits: torch.Tensor,
    row_idx: torch.Tensor,
    token_ids: torch.Tensor,
    counts: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """Gather, change, scatter."""
    values, factor = logits[row_idx, token_ids], repetition[row_idx]
    values = torch.where(values > 0.0, values / factor, values * factor)
    lowered = values - frequency[row_idx] * counts - presence[row_idx]
    logits[row_idx, token_ids] = torch.where(counts > 0.0, lowered, values)


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> Logprobs:
    """Log-softmax, one gather, topk."""
    logprobs = logits.log_softmax(-1)
    top, ids = logprobs.topk(num_top, dim=-1)
    return Logprobs(logprobs.gather(1, token_ids[:, None])[:, 0], ids, top)
