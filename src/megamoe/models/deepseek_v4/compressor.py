# SPDX-License-Identifier: Apache-2.0
"""Compressor: every `ratio` tokens become one entry."""

from __future__ import annotations

import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.models.deepseek_v4.plan import EntryPlan
from megamoe.models.deepseek_v4.weights import CompressorWeights
from megamoe.ops.compress_kv import compress_kv
from megamoe.ops.linear import linear
from megamoe.ops.rope import RopeTable
from megamoe.ops.write_cache import write_cache


class Compressor:
    """Projects tokens to raw rows, keeps them by position, and pools the blocks a step completes."""

    def __init__(self, weights: CompressorWeights, *, ratio: int, overlap: bool, table: RopeTable, eps: float) -> None:
        """Bind weights and the rotary table of the layer."""
        self.weights = weights
        self.ratio = ratio
        self.overlap = overlap
        self.table = table
        self.eps = eps

    def __call__(self, x: torch.Tensor, positions: torch.Tensor, plan: EntryPlan, state: CachePool) -> torch.Tensor:
        """Store the raw rows of `x` and return the entries completed in this step.

        Args:
            x: [T, D] normed layer input.
            positions: [T] int64.
            plan: slots of this step for this kind of layer.
            state: fp32 pool of raw rows (values then scores).

        Returns:
            [W, C] in the dtype of x, rotated at the first position of each block.
        """
        w = self.weights
        values = linear(x, w.wkv, out_dtype=torch.float32)  # [T, coff * C]
        scores = linear(x, w.wgate, out_dtype=torch.float32) + w.ape[positions % self.ratio]
        write_cache(torch.cat([values, scores], dim=-1), state, plan.state_slots)
        return compress_kv(
            state,
            plan.row_slots,
            w.norm,
            plan.entry_pos,
            self.table,
            ratio=self.ratio,
            overlap=self.overlap,
            eps=self.eps,
            out_dtype=x.dtype,
        )
