# SPDX-License-Identifier: Apache-2.0
"""The best entries from their scores, the second of the two kernels behind index_topk.

Grid       a block of 1,024 threads a token, or a cluster of 8 with a share of the entries each
Selection  a bound that top_k scores reach, from the largest scores of groups of 8; the last selected score among those
           that reach it, by four passes of 8 bits; what lies above it, and of what equals it the lowest entries
Limits     top_k up to 1,024; any number of entries, which are read in every pass where they are too many for registers
           or too many are equal
Bound      latency: the scores are in the L2 cache
"""

from __future__ import annotations

import torch

from megamoe.kernels.indexer.index_select_config import HELD, THREADS, Config
from megamoe.kernels.store import kernel

CLUSTERS = (8, 1)
MAX_TOP_K = 1024
FEW_TOKENS = 15
"""Tokens up to which a cluster selects for each: 15 clusters are resident at once."""


def run(
    scores: torch.Tensor, requests: torch.Tensor, num_visible: torch.Tensor, room: int, entries: torch.Tensor
) -> None:
    """Write the entries [T, top_k] that tokens select.

    Args:
        scores: [T, at least room] as index_scores stores them; tokens that see at most top_k entries need none.
        requests, num_visible: [T] int32.
        room: entries that there can be.
        entries: [T, top_k] int32.
    """
    is_spread = scores.shape[0] <= FEW_TOKENS or room > HELD * THREADS
    config = Config(entries.shape[1], CLUSTERS[0] if is_spread else CLUSTERS[1])
    kernel(config, scores.device)(scores, requests, num_visible, entries, room)
