# SPDX-License-Identifier: Apache-2.0
"""penalize: by hand, independent rows, refusals."""

from __future__ import annotations

import pytest
import torch

from megamoe.ops.penalize import penalize


def run(logits: list[list[float]], pairs: list[tuple[int, int, float]], **factors: float) -> list[list[float]]:
    values = torch.tensor(logits)
    count = len(values)
    penalize(
        values,
        torch.tensor([pair[0] for pair in pairs], dtype=torch.int64),
        torch.tensor([pair[1] for pair in pairs], dtype=torch.int64),
        torch.tensor([pair[2] for pair in pairs], dtype=torch.float32),
        repetition=torch.full((count,), factors.get("repetition", 1.0)),
        presence=torch.full((count,), factors.get("presence", 0.0)),
        frequency=torch.full((count,), factors.get("frequency", 0.0)),
    )
    return values.tolist()


# --- known answers ---


def test_repetition_moves_logits_down_on_both_sides_of_zero() -> None:
    assert run([[3.0, -3.0, 0.0, 3.0]], [(0, 0, 0), (0, 1, 0), (0, 2, 1)], repetition=2.0) == [[1.5, -6.0, 0.0, 3.0]]


def test_presence_once_and_frequency_per_occurrence_in_the_output() -> None:
    pairs = [(0, 0, 1.0), (0, 1, 3.0), (0, 2, 0.0)]
    assert run([[1.0, 1.0, 1.0, 1.0]], pairs, presence=0.5, frequency=0.25) == [[0.25, -0.25, 1.0, 1.0]]


def test_repetition_comes_first() -> None:
    assert run([[4.0]], [(0, 0, 2.0)], repetition=2.0, presence=0.5, frequency=0.25) == [[1.0]]


def test_masked_tokens_stay_masked_and_nothing_changes_nothing() -> None:
    inf = float("inf")
    assert run([[-inf, 1.5]], [(0, 0, 1.0)], repetition=2.0, presence=1.0) == [[-inf, 1.5]]
    assert run([[1.5, -2.5]], [(0, 0, 2.0), (0, 1, 0.0)]) == [[1.5, -2.5]]
    assert run([[1.5]], []) == [[1.5]]


# --- properties ---


def test_rows_have_their_own_factors(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 40, generator=generator)
    factors = torch.rand(3, 6, generator=generator) + 0.5
    row_idx = torch.arange(6).repeat_interleave(9)
    token_ids = torch.stack([torch.randperm(40, generator=generator)[:9] for _ in range(6)]).flatten()
    counts = torch.randint(0, 4, (54,), generator=generator).float()
    together = logits.clone()
    penalize(together, row_idx, token_ids, counts, repetition=factors[0], presence=factors[1], frequency=factors[2])
    for row in range(6):
        mine, alone = row_idx == row, logits[row : row + 1].clone()
        penalize(
            alone,
            row_idx[mine] * 0,
            token_ids[mine],
            counts[mine],
            repetition=factors[0, row : row + 1],
            presence=factors[1, row : row + 1],
            frequency=factors[2, row : row + 1],
        )
        assert torch.equal(alone[0], together[row])
        untouched = torch.ones(40, dtype=torch.bool)
        untouched[token_ids[mine]] = False
        assert torch.equal(together[row][untouched], logits[row][untouched])


# --- refusals ---


def test_refusals() -> None:
    for pair, message in (
        ((1, 0, 0), "row_idx must be 0 to 0, or -1 for nobody; got 1"),
        ((0, -2, 0), "token_ids must be 0 to 1, or -1 for nobody; got -2"),
    ):
        with pytest.raises(ValueError, match=message):
            run([[0.0, 0.0]], [pair])
    with pytest.raises(TypeError, match="counts must be float32"):
        one = torch.ones(1)
        idx = torch.zeros(1, dtype=torch.int64)
        penalize(torch.zeros(1, 1), idx, idx, idx, repetition=one, presence=one, frequency=one)
