# SPDX-License-Identifier: Apache-2.0
"""Steps for tests of the operations that find rows by position, and the same arithmetic on plain integers."""

from __future__ import annotations

import dataclasses

import torch

from megamoe.ops.plan_slots import RowTables

NOBODY = -1

Run = tuple[int, int, int]
"""(request, position of its first token, tokens); request -1 for tokens that are nobody's."""


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """The tokens of a step, as operations take them."""

    positions: torch.Tensor
    requests: torch.Tensor
    first_idx: torch.Tensor

    @property
    def addresses(self) -> dict[str, torch.Tensor]:
        return {"positions": self.positions, "requests": self.requests, "first_idx": self.first_idx}

    @property
    def tokens(self) -> torch.Tensor:
        """[4, T] int32, as plan_slots takes them; a token's id is its position plus 100."""
        ids = torch.where(self.positions >= 0, self.positions + 100, -1)
        return torch.stack([one.to(torch.int32) for one in (ids, self.positions, self.requests, self.first_idx)])


def step_of(*runs: Run) -> Step:
    """Return the step that runs these tokens, one request after the other."""
    positions: list[int] = []
    requests: list[int] = []
    first_idx: list[int] = []
    for request, start, count in runs:
        first = len(positions)
        for offset in range(count):
            nobody = request == NOBODY
            positions.append(NOBODY if nobody else start + offset)
            requests.append(request)
            first_idx.append(first + offset if nobody else first)
    return Step(
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor(requests, dtype=torch.int32),
        torch.tensor(first_idx, dtype=torch.int32),
    )


def slot_of(tables: RowTables, request: int, row: int) -> int:
    """Return where a row of a request lies, walking its blocks one after the other and round again."""
    if request < 0 or row < 0:
        return -1
    blocks = tables.block_tables[request].tolist()
    column = 0
    while row >= tables.rows_per_block:
        row -= tables.rows_per_block
        column = column + 1 if column + 1 < len(blocks) else 0
    return int(blocks[column]) * tables.rows_per_block + row


def tables_of(num_requests: int, num_blocks: int, rows_per_block: int, *, spare: int = 0) -> RowTables:
    """Return block tables with random, distinct blocks; `spare` blocks are no request's."""
    blocks = torch.randperm(num_requests * num_blocks + spare)[: num_requests * num_blocks]
    return RowTables(blocks.reshape(num_requests, num_blocks).to(torch.int32), rows_per_block)
