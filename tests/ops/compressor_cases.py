# SPDX-License-Identifier: Apache-2.0
"""Sequences that go through a compressor step by step; for the tests of compress_kv and write_index_keys."""

from __future__ import annotations

import dataclasses

import torch

from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.ops.compress_kv import compress_kv, entries_of
from megamoe.ops.copy_cache import copy_cache
from megamoe.ops.hadamard import hadamard
from megamoe.ops.plan_slots import EntryTables, RowTables, StepSlots, plan_slots
from megamoe.ops.read_cache import read_cache
from megamoe.ops.rope import rope_table
from megamoe.ops.write_cache import write_cache
from megamoe.ops.write_index_keys import write_index_keys
from megamoe.verify.values import moved, whole_storage

from .steps import slot_of, step_of

Part = tuple[int, int]
"""(request, tokens) of a step; request -1 for tokens that are nobody's."""


def pool_of(rows: torch.Tensor) -> CachePool:
    """A pool whose slot i holds row i."""
    pool = CachePool.allocate(1, max(rows.shape[0], 1), RowFormat.FP32, rows.shape[1])
    write_cache(rows, pool, torch.arange(rows.shape[0]))
    return pool


def block_slots(entries: range, ratio: int, overlap: bool) -> torch.Tensor:
    """The rows that entries pool, where row i is that of position i."""
    num_rows = (2 if overlap else 1) * ratio
    rows = [[(entry + 1) * ratio - num_rows + row for row in range(num_rows)] for entry in entries]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, num_rows).clamp(min=-1)


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """What steps have left in the pools."""

    state: CachePool
    entries: CachePool

    def same_bytes(self, other: Written) -> bool:
        return torch.equal(self.state.storage, other.state.storage) and torch.equal(
            self.entries.storage, other.entries.storage
        )


class Sequences:
    """Raw rows of several requests, and one compressor.

    `rotate` says that it is the compressor of index keys, and whether they are rotated; None for any other. Slots are
    planned on the CPU; the compressor runs on `device`, with the pools as they are before each step.
    """

    def __init__(
        self,
        ratio: int,
        overlap: bool,
        width: int,
        *,
        longest: int = 40,
        row_format: RowFormat = RowFormat.FP32,
        rotate: bool | None = None,
        out_dtype: torch.dtype = torch.float32,
        rope_dim: int = 2,
        device: str = "cpu",
    ) -> None:
        half = (2 if overlap else 1) * width
        self.ratio, self.overlap, self.width, self.longest = ratio, overlap, width, longest
        self.row_format, self.rotate, self.out_dtype = row_format, rotate, out_dtype
        self.raw = torch.randn(3, longest, 2 * half)
        self.ape, self.norm, self.table = (
            2 * torch.randn(ratio, half),
            torch.rand(width) + 0.5,
            rope_table(rope_dim, 1e4),
        )
        self.device = device
        if device == "cuda":
            self.norm = self.norm.bfloat16()  # as checkpoints have it, and a pack

    @property
    def num_rows(self) -> int:
        """Rows that an entry pools."""
        return (2 if self.overlap else 1) * self.ratio

    def run(
        self,
        steps: list[list[Part]],
        state: RowTables,
        entries: RowTables,
        *,
        in_step: bool,
        nobody: float = 0.0,
        poison: int = 0xFF,
        first_idx: int | None = None,
    ) -> Written:
        """Take the steps; the pools begin as bytes of NaN, so what is read before it is written shows.

        `first_idx` is given to the compressor in place of the right ones.
        """
        written = Written(
            self._pool(state, RowFormat.FP32, self.raw.shape[2], poison),
            self._pool(entries, self.row_format, self.width, poison),
        )
        starts = [0, 0, 0]
        for parts in steps:
            step = step_of(*((request, starts[request] if request >= 0 else 0, count) for request, count in parts))
            num_tokens = step.positions.shape[0]
            slots = StepSlots.empty(num_tokens, 1, torch.device("cpu"))
            plan_slots(step.tokens, state, (EntryTables(self.ratio, state, entries),), slots, in_rings=not in_step)
            (of_kind,) = slots.entries
            raw = self.raw[step.requests.long(), step.positions]
            raw[step.requests < 0] = nobody
            area = None
            if in_step:
                area = CachePool.allocate(1, num_tokens, RowFormat.FP32, raw.shape[1])
                area.storage.fill_(poison)
            addresses = step.addresses
            if first_idx is not None:
                addresses["first_idx"] = torch.full_like(step.first_idx, first_idx)
            given = {
                **addresses,
                "state_tables": state.block_tables,
                "state_slots": of_kind.state_slots,
                "table": self.table,
                "ratio": self.ratio,
                "out_dtype": self.out_dtype,
            }
            pools = written.state, area, written.entries
            if self.rotate is None:
                given |= {"entry_slots": of_kind.entry_slots, "overlap": self.overlap}
            else:
                given |= {"key_slots": of_kind.entry_slots, "rotate": self.rotate}
            write = compress_kv if self.rotate is None else write_index_keys
            given = {name: moved(value, self.device) for name, value in given.items()}
            there = moved(pools, self.device)
            write(*(moved(one, self.device) for one in (raw, self.ape, self.norm)), *there, **given)
            for pool, result in zip(pools, there, strict=True):
                if pool is not None and result is not pool:
                    whole_storage(pool.storage).copy_(whole_storage(result.storage))
            if area is not None:
                copy_cache(area, of_kind.state_slots, written.state, of_kind.state_kept)
            for request, count in parts:
                if request >= 0:
                    starts[request] += count
        return written

    @staticmethod
    def _pool(tables: RowTables, row_format: RowFormat, width: int, poison: int) -> CachePool:
        num_blocks = int(tables.block_tables.max()) + 2 if tables.block_tables.numel() else 1
        pool = CachePool.allocate(num_blocks, tables.rows_per_block, row_format, width)
        pool.storage.fill_(poison)
        return pool

    def slots(self, tables: RowTables, request: int, num_tokens: int) -> torch.Tensor:
        """Where the entries of a request are after that many tokens."""
        numbers = range(num_tokens // self.ratio)
        return torch.tensor([slot_of(tables, request, entry) for entry in numbers], dtype=torch.int64)

    def values(self, written: Written, tables: RowTables, request: int, num_tokens: int) -> torch.Tensor:
        """The entries of a request after that many tokens."""
        return read_cache(written.entries, self.slots(tables, request, num_tokens))

    def rows(self, request: int) -> torch.Tensor:
        """Values and scores of a request, `ape` added to the scores by position."""
        values, scores = self.raw[request].chunk(2, dim=-1)
        return torch.cat((values, scores + self.ape[torch.arange(self.longest) % self.ratio]), dim=-1)

    def expected(self, request: int, num_tokens: int) -> torch.Tensor:
        """The same from all rows at once, rounded as the row format does."""
        entries = range(num_tokens // self.ratio)
        if not len(entries):
            return torch.empty(0, self.width)
        new = entries_of(
            [(pool_of(self.rows(request)), block_slots(entries, self.ratio, self.overlap))],
            self.norm,
            torch.tensor(list(entries), dtype=torch.int64) * self.ratio,
            self.table,
            self.ratio,
            self.overlap,
            1e-6,
            self.out_dtype,
        )
        if self.rotate:
            new = hadamard(new)
        pool = CachePool.allocate(1, max(len(entries), 1), self.row_format, self.width)
        write_cache(new, pool, torch.arange(len(entries)))
        return read_cache(pool, torch.arange(len(entries)))
