# SPDX-License-Identifier: Apache-2.0
"""Drafts for many sequences from DSpark.

A stage's row at position t is made of the backbone's outputs at t alone, so it is written as soon as the position is
certain. That makes page boundaries simple: the rows before L belong to the prefix of length L, nothing is owed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from megamoe.cache.batch import Batch, Commit, IntArray, Save
from megamoe.models.deepseek_v4.cache import SharedCache
from megamoe.models.deepseek_v4.dspark import DSpark
from megamoe.models.deepseek_v4.plan import StepPlan
from megamoe.models.deepseek_v4.snapshots import restore


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Tapped:
    """What a step gives when its target layers are tapped.

    Attributes:
        streams: [T, X, D] of the last block.
        taps: [T, N * D], stream means of the target layers.
    """

    streams: torch.Tensor
    taps: torch.Tensor


class DSparkDrafter:
    """One block per sequence and step."""

    def __init__(
        self,
        dspark: DSpark,
        table: torch.Tensor,
        head: torch.Tensor,
        cache: SharedCache,
    ) -> None:
        """Bind the stages to the rings of a shared cache; their pools are the cache's draft pools."""
        self._dspark = dspark
        self._table = table
        self._head = head
        self._cache = cache
        self._pools = cache.draft_layers

    def observe(
        self,
        hidden: Tapped,
        commit: Commit,
        num_tokens: int,
        choose: Callable[[torch.Tensor, int], torch.Tensor],
    ) -> torch.Tensor:
        """Write the stages' rows of certain tokens, then guess; see megamoe.engine.drafter.Drafter."""
        taps = hidden.taps
        if len(commit.rows) != len(taps):
            taps = taps[torch.from_numpy(commit.rows).to(taps.device)]
        plan = self._plan(commit.next_ids, commit.starts, commit.counts, commit.rings, commit.saves)
        self._dspark.fill(self._dspark.main(taps), plan, self._pools)
        wants = commit.wants_drafts.nonzero()[0]
        if not len(wants):
            return torch.empty(0, num_tokens, dtype=torch.int64)
        last = (commit.starts + commit.counts - 1)[wants]
        newest_ids = commit.next_ids[commit.counts.cumsum()[wants] - 1]
        newest = torch.from_numpy(newest_ids).to(taps.device)
        hidden_rows = self._block(newest, self._plan(newest_ids, last, np.ones_like(last), commit.rings[wants]))
        return self._dspark.chain(self._dspark.base_logits(hidden_rows, self._head), newest, num_tokens, choose)

    def start(self, ring_idx: int) -> None:
        """Forget a ring: nothing is kept besides its rows, and rows of other sequences are never read."""

    def restore(self, snapshot_idx: int, ring_idx: int, length: int) -> None:
        """Let a ring continue at `length`."""
        restore(self._pools, snapshot_idx, ring_idx, length)

    def _block(self, newest: torch.Tensor, last: StepPlan) -> torch.Tensor:
        shape = self._dspark.shape
        ids = newest.new_full((len(newest), shape.block_size), shape.noise_token_id)
        ids[:, 0] = newest
        return self._dspark.block(self._table, ids, last, self._pools)

    def _plan(
        self, ids: IntArray, starts: IntArray, counts: IntArray, rings: IntArray, saves: tuple[Save, ...] = ()
    ) -> StepPlan:
        return self._cache.draft_plan(Batch(ids, starts, counts, rings, saves))
