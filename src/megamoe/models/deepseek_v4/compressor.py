# SPDX-License-Identifier: Apache-2.0
"""Compressor: every `ratio` tokens become one entry. Its projection is a part of one stacked linear (attention.py)."""

from __future__ import annotations

import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.models.deepseek_v4.config import LayerKind
from megamoe.models.deepseek_v4.plan import StepPlan
from megamoe.models.deepseek_v4.weights import CompressorWeights
from megamoe.ops.compress_kv import compress_kv
from megamoe.ops.rope import RopeTable


class Compressor:
    """Keeps the raw rows of tokens by position, and writes the entries of the blocks a step completes."""

    def __init__(self, weights: CompressorWeights, *, ratio: int, overlap: bool, table: RopeTable, eps: float) -> None:
        """Bind weights and the rotary table of the layer."""
        self.weights = weights
        self.ratio = ratio
        self.overlap = overlap
        self.table = table
        self.eps = eps

    def __call__(
        self,
        raw: torch.Tensor,
        plan: StepPlan,
        kind: LayerKind,
        state: CachePool,
        step: CachePool | None,
        entries: CachePool,
        out_dtype: torch.dtype,
    ) -> None:
        """Store the raw rows of a step and write the entries completed in this step.

        Args:
            raw: [T, 2 * coff * C] fp32, the layer's input times wkv, then times wgate; any row stride.
            plan: this step.
            kind: of the layer.
            state: FP32 rings of raw rows.
            step: FP32 raw rows of a step that does not go into the rings.
            entries: where the entries go.
            out_dtype: what entries are rounded to before their row format.
        """
        slots = plan.entry_slots(kind)
        compress_kv(
            raw,
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
            out_dtype=out_dtype,
        )
