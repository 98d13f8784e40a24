# SPDX-License-Identifier: Apache-2.0
"""Drafts for many sequences from the classic multi-token-prediction stage.

The stage's row at position i is made of the backbone's streams at i and the token at i + 1, so it can only be written
when that token is certain: after a step the stage runs over the positions whose next token became known, which ends
with a guess at the token after the newest one. Further guesses feed the stage's own streams back; their rows lie beyond
what is certain and are overwritten by the next step.

At a page boundary L this means that row L - 1 of the stage does not belong to the prefix: it depends on the token at
L, which another sequence may not share. A snapshot therefore holds the rows before it, and the streams at L - 1; the
row is computed when the continuing sequence has told its own token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from megamoe.cache.batch import Batch, Commit, IntArray, Save
from megamoe.models.deepseek_v4.cache import SharedCache
from megamoe.models.deepseek_v4.mtp import MtpStage
from megamoe.models.deepseek_v4.snapshots import restore, save


class MtpDrafter:
    """One stage, used again for every further draft."""

    def __init__(
        self,
        stage: MtpStage,
        embed: Callable[[torch.Tensor], torch.Tensor],
        head: torch.Tensor,
        cache: SharedCache,
    ) -> None:
        """Bind the stage to the rings of a shared cache; its pools are the cache's first draft pools."""
        self._stage = stage
        self._embed = embed
        self._head = head
        self._cache = cache
        self._pools = cache.draft_layers[0]
        self._lengths = np.zeros(
            cache.size.num_sequences, dtype=np.int64
        )  # rows of the stage that are certain, by ring
        self._last_streams = torch.empty(0)  # [rings, X, D], made when the first streams show their shape
        self._saved_streams = torch.empty(0)  # [snapshots, X, D]

    def observe(
        self,
        hidden: torch.Tensor,
        commit: Commit,
        num_tokens: int,
        choose: Callable[[torch.Tensor, int], torch.Tensor],
    ) -> torch.Tensor:
        """Write the stage's rows of certain tokens, then guess; see megamoe.engine.drafter.Drafter."""
        behind = commit.starts - self._lengths[commit.rings]  # 1 right after a restore, else 0
        rows, next_ids = commit.rows, commit.next_ids
        in_order = len(rows) == len(hidden)
        if behind.any():
            assert 0 <= behind.min() and behind.max() <= 1
            late = behind.nonzero()[0]
            at = (commit.counts.cumsum() - commit.counts)[late]
            rows = np.insert(rows, at, len(hidden) + commit.rings[late])
            next_ids = np.insert(next_ids, at, commit.first_ids[late])
            hidden, in_order = torch.cat((hidden, self._last_streams)), False
        streams = hidden if in_order else hidden[torch.from_numpy(rows).to(hidden.device)]
        starts, counts = commit.starts - behind, commit.counts + behind
        streams = self._run(streams, next_ids, starts, counts, commit.rings, self._keep_streams(hidden, commit))
        self._lengths[commit.rings] = commit.starts + commit.counts
        wants = commit.wants_drafts.nonzero()[0]
        drafts: list[torch.Tensor] = []
        if not len(wants):
            return torch.empty(0, num_tokens, dtype=torch.int64)
        streams = streams[torch.from_numpy(counts.cumsum()[wants] - 1).to(streams.device)]  # [N, X, D]
        rings, one = commit.rings[wants], np.ones(len(wants), dtype=np.int64)
        for ahead in range(num_tokens):
            if ahead:
                ids = drafts[-1].cpu().numpy()
                streams = self._run(streams, ids, self._lengths[rings] + ahead - 1, one, rings)
            drafts.append(choose(self._stage.logits(streams, self._head), ahead))
        return torch.stack(drafts, dim=1)

    def start(self, ring_idx: int) -> None:
        """Forget a ring: a new sequence begins there at position 0."""
        self._lengths[ring_idx] = 0

    def restore(self, snapshot_idx: int, ring_idx: int, length: int) -> None:
        """Let a ring continue at `length`: its row length - 1 is computed with the first token."""
        restore([self._pools], snapshot_idx, ring_idx, length - 1)
        self._last_streams[ring_idx] = self._saved_streams[snapshot_idx]
        self._lengths[ring_idx] = length - 1

    def _keep_streams(self, hidden: torch.Tensor, commit: Commit) -> tuple[Save, ...]:
        """Keep the streams at the ends of pages; return the lengths at which the stage's rows are to be kept."""
        if not commit.saves:
            return ()
        if not self._saved_streams.numel():
            shape = hidden.shape[1:]
            self._saved_streams = hidden.new_zeros(self._cache.num_snapshots, *shape)
            self._last_streams = hidden.new_zeros(self._cache.size.num_sequences, *shape)
        for one in commit.saves:
            self._saved_streams[one.snapshot_idx] = hidden[one.row]
        return tuple(dataclasses.replace(one, length=one.length - 1) for one in commit.saves)

    def _run(
        self,
        streams: torch.Tensor,
        next_ids: IntArray,
        starts: IntArray,
        counts: IntArray,
        rings: IntArray,
        saves: tuple[Save, ...] = (),
    ) -> torch.Tensor:
        plan = self._cache.draft_plan(Batch(next_ids, starts, counts, rings, saves))
        streams = self._stage(streams, self._embed(plan.token_ids), plan, self._pools)
        if plan.in_rings and plan.saves is not None:
            save(plan.saves, [self._pools], self._cache.ring_tables, in_step=False)
        return streams
