# SPDX-License-Identifier: Apache-2.0
"""Token-expert pairs by expert, on the device: a stable counting sort in one block, and the passes that follow from it.

A pass is one expert and at most `tokens_per_pass` of its pairs: what one streaming of that expert's weights serves.
Experts without pairs have no pass. Nothing is read back by the host: sizes are bounds, the number of passes stays on
the device. A shared expert, which every token visits, has a pair a token behind all others; its passes come last.

An id outside 0 .. E - 1 (-1 for none, E or more for an expert of another rank) has no place in the order and no pass.
A token all of whose ids are -1 is nobody: the shared expert has no pair for it, either.
"""

from __future__ import annotations

import dataclasses

import torch

from megamoe.kernels.experts.sort_pairs_config import NUM_COUNTERS, PASS_FIELDS, THREADS, Config
from megamoe.kernels.store import kernel

MAX_EXPERTS = THREADS


@dataclasses.dataclass(frozen=True)
class SortedPairs:
    """Pairs by expert.

    Attributes:
        order: [pairs] int32, the pair at each sorted position; a pair is token * A + slot, or T * A + token of the
            shared expert, whose pairs begin at T * A. Behind the last of either, NO_PAIR.
        passes: [bound, 4] int32: expert or SHARED_EXPERT, first sorted position, number of pairs, unused.
        num_passes: [3] int32: their number, and two counters that start at 0.
    """

    order: torch.Tensor
    passes: torch.Tensor
    num_passes: torch.Tensor


def max_passes(num_pairs: int, num_experts: int, tokens_per_pass: int) -> int:
    """Return a bound on the number of passes of routed experts."""
    return min(num_pairs, num_experts + num_pairs // tokens_per_pass)


def sort_pairs(
    op: str, expert_ids: torch.Tensor, num_experts: int, tokens_per_pass: int, with_shared: bool = False
) -> SortedPairs:
    """Sort pairs by expert, tokens ascending within one.

    Args:
        op: for messages.
        expert_ids: [T, A] int64, contiguous; one outside 0 .. num_experts - 1 is nobody's.
        num_experts: E, at most 512.
        tokens_per_pass: see the module.
        with_shared: every token visits the shared expert, too.
    """
    if num_experts > MAX_EXPERTS:
        raise NotImplementedError(
            f"{op}: the kernel takes at most {MAX_EXPERTS} experts on a GPU; got {num_experts}. Spread them over more "
            'GPUs, or run the reference: with megamoe.ops.use("reference").'
        )
    num_pairs, num_shared = expert_ids.numel(), expert_ids.shape[0] if with_shared else 0
    num_passes = max_passes(num_pairs, num_experts, tokens_per_pass) + -(-num_shared // tokens_per_pass)
    device = expert_ids.device
    pairs = SortedPairs(
        torch.empty(num_pairs + num_shared, dtype=torch.int32, device=device),
        torch.empty(num_passes, PASS_FIELDS, dtype=torch.int32, device=device),
        torch.empty(NUM_COUNTERS, dtype=torch.int32, device=device),
    )
    launch = kernel(Config(num_experts, tokens_per_pass), expert_ids.device)
    launch(expert_ids.view(-1), pairs.order, pairs.passes, pairs.num_passes)
    return pairs
