# SPDX-License-Identifier: Apache-2.0
"""The best entries from their scores, the second of the two kernels behind index_topk.

Grid       a cluster of blocks of 1,024 threads a token, each block with a share of the entries
Selection  the last selected score by four passes of 8 bits over scores in shared memory; then what lies above it, and
           of what equals it the lowest entries
Limits     any number of entries; those beyond what shared memory holds are read again in every pass
Bound      latency: the scores are in the L2 cache
"""

from __future__ import annotations

import torch

from megamoe.kernels.indexer.index_select_config import Config
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
    config = Config(entries.shape[1], CLUSTERS[0] if scores.shape[0] <= FEW_TOKENS else CLUSTERS[1])
    kernel(config, scores.device)(scores, requests, num_visible, entries, room)
