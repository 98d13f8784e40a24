# SPDX-License-Identifier: Apache-2.0
"""write_block_tables: single pages of block tables change, and nothing else."""

from __future__ import annotations

import random

import pytest
import torch

from megamoe.ops.write_block_tables import write_block_tables


def tables_of(num_requests: int, width: int) -> torch.Tensor:
    return torch.arange(num_requests * width, dtype=torch.int32).view(num_requests, width)


def changes_of(*changes: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(changes, dtype=torch.int32).reshape(-1, 3)


# --- known answers ---


def test_by_hand():
    tables = tables_of(2, 3)
    address = tables.data_ptr()
    write_block_tables(tables, changes_of((1, 0, 9), (-1, -1, -1), (0, 2, -1), (-1, 99, 5)))
    assert tables.tolist() == [[0, 1, -1], [9, 4, 5]] and tables.data_ptr() == address


def test_nothing_to_change():
    for changes in (changes_of(), changes_of((-1, -1, -1)), changes_of((-1, 7, 7), (-5, 0, 0))):
        for shape in ((2, 3), (2, 0), (0, 3)):
            tables = tables_of(*shape)
            write_block_tables(tables, changes)
            assert torch.equal(tables, tables_of(*shape))


# --- properties ---


def test_steps_of_changes_equal_a_table_that_is_kept_on_the_host(seed):
    """Pages are added, dropped and exchanged, in steps filled up with nobody's changes; a part of a larger table."""
    rng = random.Random(seed)
    whole = torch.full((6, 9), -5, dtype=torch.int32)
    tables, wanted = whole[1:5, 2:9], [[-5] * 7 for _ in range(4)]
    for _ in range(60):
        places = rng.sample([(request, column) for request in range(4) for column in range(7)], rng.randint(0, 6))
        changes = [(*place, rng.randint(-1, 50)) for place in places]
        for request, column, block in changes:
            wanted[request][column] = block
        changes += [(-1, rng.randint(-1, 20), rng.randint(-1, 20))] * rng.randint(0, 3)
        rng.shuffle(changes)
        write_block_tables(tables, changes_of(*changes))
        assert tables.tolist() == wanted
    border = torch.ones(6, 9, dtype=torch.bool)
    border[1:5, 2:9] = False
    assert bool((whole[border] == -5).all())


# --- refusals ---


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"tables": torch.zeros(2, 3)}, TypeError, "tables must be int32"),
        ({"changes": torch.zeros(1, 3, dtype=torch.int64)}, TypeError, "changes must be int32"),
        ({"changes": torch.zeros(1, 4, dtype=torch.int32)}, ValueError, "changes must be"),
        ({"changes": changes_of((2, 0, 1))}, ValueError, r"must lie in the tables \[2, 3\]; got requests up to 2"),
        ({"changes": changes_of((0, 3, 1))}, ValueError, "columns 3 to 3"),
        ({"changes": changes_of((0, -1, 1))}, ValueError, "columns -1 to -1"),
    ],
)
def test_refusals(change, error, message):
    given = {"tables": tables_of(2, 3), "changes": changes_of((1, 2, 0))}
    write_block_tables(**given)
    given |= change
    before = given["tables"].clone()
    with pytest.raises(error, match=message):
        write_block_tables(**given)
    assert torch.equal(given["tables"], before)
