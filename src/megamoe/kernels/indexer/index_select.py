# SPDX-License-Identifier: Apache-2.0
"""The best entries from their scores, the second of the two kernels behind index_topk.

Grid       a block of 1,024 threads a token, or a cluster of 8 with a share of the entries each
Selection  the last selected score by four passes of 8 bits over scores in registers; then what lies above it, and of
           what equals it the lowest entries
Limits     any number of entries; where they are more than registers hold they are read again in every pass
Bound      latency: the scores are in the L2 cache
"""

from __future__ import annotations

import torch

from megamoe.kernels.indexer.index_select_config import HELD, HELD_BY_ONE, THREADS, Config
from megamoe.kernels.store import kernel

CLUSTERS = (8, 1)
FEW_TOKENS = 16
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
    is_spread = room > HELD_BY_ONE and (scores.shape[0] <= FEW_TOKENS or room > HELD * THREADS)
    config = Config(entries.shape[1], CLUSTERS[0] if is_spread else CLUSTERS[1])
    kernel(config, scores.device)(scores, requests, num_visible, entries, room)
