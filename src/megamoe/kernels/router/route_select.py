# SPDX-License-Identifier: Apache-2.0
"""Experts and weights from router scores, the second of the two kernels behind route_experts.

Grid       one warp a token; a lane holds the scores of experts lane, lane + 32, …
Selection  top_k rounds of a warp-wide maximum of score + bias; equal ones go to the lowest expert. Or by table: a token
           id or expert outside its range cannot be refused here without a synchronization; its weights become NaN.
           A token id of -1 is nobody: its weights are 0 and its ids -1
Limits     up to 1024 experts, top_k up to 32
"""

from __future__ import annotations

import torch

from megamoe.kernels.router.route_select_config import Config
from megamoe.kernels.store import kernel

MAX_EXPERTS = 1024
MAX_TOP_K = 32


def run(
    scores: torch.Tensor,
    top_k: int,
    routed_scaling: float,
    bias: torch.Tensor | None,
    expert_table: torch.Tensor | None,
    token_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [T, A] fp32 and expert ids [T, A] int64."""
    num_tokens, num_experts = scores.shape
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=scores.device)
    expert_ids = torch.empty((num_tokens, top_k), dtype=torch.int64, device=scores.device)
    extra: tuple[torch.Tensor, ...]
    if expert_table is not None:
        mode = "table32" if expert_table.dtype == torch.int32 else "table64"
        extra = (expert_table.contiguous(),)
    elif bias is not None:
        mode, extra = "biased", (bias.contiguous(),)
    else:
        mode, extra = "score", ()
    launch = kernel(Config(num_experts, top_k, mode), scores.device)
    launch(scores, token_ids.contiguous(), *extra, weights, expert_ids, routed_scaling)
    return weights, expert_ids
