# SPDX-License-Identifier: Apache-2.0
"""Compressor: every `ratio` tokens become one entry."""

from __future__ import annotations

import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.models.deepseek_v4.config import LayerKind
from megamoe.models.deepseek_v4.plan import StepPlan
from megamoe.models.deepseek_v4.weights import CompressorWeights
from megamoe.ops.compress_kv import compress_kv
from megamoe.ops.linear import linear
from megamoe.ops.rope import RopeTable


class Compressor:
    """Projects tokens to raw rows, keeps them by position, and writes the entries of the blocks a step completes."""

    def __init__(self, weights: CompressorWeights, *, ratio: int, overlap: bool, table: RopeTable, eps: float) -> None:
        """Bind weights and the rotary table of the layer."""
        self.weights = weights
        self.ratio = ratio
        self.overlap = overlap
        self.table = table
        self.eps = eps

    def __call__(
        self,
        x: torch.Tensor,
        plan: StepPlan,
        kind: LayerKind,
        state: CachePool,
        step: CachePool | None,
        entries: CachePool,
    ) -> None:
        """Store the raw rows of `x` and write the entries completed in this step.

        Args:
            x: [T, D] normed layer input; entries are rounded to its dtype before their row format.
            plan: this step.
            kind: of the layer.
            state: FP32 rings of raw rows.
            step: FP32 raw rows of a step that does not go into the rings.
            entries: where the entries go.
        """
        slots = plan.entry_slots(kind)
        compress_kv(
            self.project(x),
            self.weights.ape,
            self.weights.norm,
            state,
            None if plan.in_rings else step,
            entries,
            positions=plan.positions,
            requests=plan.slots.requests,
            first_idx=plan.slots.first_idx,
            state_tables=plan.tables[kind].state.block_tables,
            state_slots=slots.state_slots,
            entry_slots=slots.entry_slots,
            table=self.table,
            ratio=self.ratio,
            overlap=self.overlap,
            eps=self.eps,
            out_dtype=x.dtype,
        )

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Return the raw rows [T, 2 * coff * C] fp32 of `x`: values, then scores without `ape`."""
        values = linear(x, self.weights.wkv, out_dtype=torch.float32)  # [T, coff * C]
        return torch.cat([values, linear(x, self.weights.wgate, out_dtype=torch.float32)], dim=-1)
