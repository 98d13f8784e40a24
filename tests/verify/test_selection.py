# SPDX-License-Identifier: Apache-2.0
"""compare_selections: swaps inside the bound pass, certain ones do not; and what the bound is made of."""

from __future__ import annotations

import pytest
import torch

from megamoe.formats.cache_rows import CachePool, RowFormat
from megamoe.ops.index_topk import index_scores
from megamoe.ops.read_cache import read_cache
from megamoe.ops.write_cache import write_cache
from megamoe.verify.selection import ScoreBounds, compare_selections, score_bounds

# --- known answers: entries 0 .. 4 have scores 5, 3, 3.1, 0, 0; two are held ---

SCORES = torch.tensor([[5.0, 3.0, 3.1, 0.0, 0.0]], dtype=torch.float64)


def compare(got: list[int], bound: float = 0.0, want: list[int] | None = None, num_visible: int = 5) -> None:
    bounds = torch.where(SCORES == 0.0, 0.0, bound).double()
    rows = (torch.tensor([got]), torch.tensor([[0, 2] if want is None else want]))
    compare_selections(*rows, ScoreBounds(SCORES, bounds), torch.tensor([num_visible]))


def test_the_same_selection_passes() -> None:
    compare([0, 2])


def test_a_swap_passes_inside_the_bound_only() -> None:
    compare([0, 1], bound=0.051)
    message = r"token 0 holds entry 1 with score 3.0 .* leaves out entry 2 with 3.1"
    with pytest.raises(AssertionError, match=message):
        compare([0, 1], bound=0.049)


def test_the_best_entry_must_be_held() -> None:
    with pytest.raises(AssertionError, match="leaves out entry 0 with 5.0"):
        compare([1, 2], bound=0.9)


def test_exact_ties_go_to_the_lowest() -> None:
    """Entries that no head likes have the score 0 in every implementation."""
    compare([0, 1, 2, 3], want=[0, 1, 2, 3])
    with pytest.raises(AssertionError, match="holds entry 4 with score 0.0 .* leaves out entry 3"):
        compare([0, 1, 2, 4], want=[0, 1, 2, 3], bound=0.1)


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ([0, -1], "holds 1 entries, want 2"),
        ([-1, 0], "holds 1 entries, want 2"),
        ([2, 0], "different entries below 5 in ascending order"),
        ([2, 2], "different entries below 5 in ascending order"),
        ([0, 5], "different entries below 5"),
    ],
)
def test_form(got: list[int], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        compare(got, bound=10.0)


def test_all_visible_entries_are_held_while_they_are_few() -> None:
    compare([0, 1, -1], want=[0, 1, -1], num_visible=2)
    for wrong in ([0, 1, 2], [1, 2, -1], [0, -1, -1]):
        with pytest.raises(AssertionError):
            compare(wrong, want=[0, 1, -1], num_visible=2, bound=10.0)
    compare([-1], want=[-1], num_visible=0)


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match=r"got torch.int64 \[1, 1\], want torch.int64 \[1, 2\]"):
        compare([0])


# --- the bound ---


def test_bounds_by_hand() -> None:
    """Two heads, keys of two values: a head that is certainly negative adds nothing."""
    q = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])
    keys = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.5, -0.25]])
    found = score_bounds(q, torch.tensor([[2.0, -0.5]]), keys)
    assert found.scores.tolist() == [[2 * 3.0 - 0.5 * 2.0, 0.0, -0.5 * 1.75]]
    # The first head's product with the last key is exactly 0: not certainly negative.
    squares = [4.0 * (1 + 4) + 0.25 * (9 + 1), 0.0, 4.0 * (0.25 + 0.25) + 0.25 * (2.25 + 0.0625)]
    assert found.bounds[0].tolist() == pytest.approx([2e-5 * square**0.5 for square in squares], rel=1e-12)


@pytest.mark.parametrize("order", ["forwards", "backwards", "truncated"])
def test_fp32_sums_in_any_order_stay_within_the_bound(order: str, seed: int) -> None:
    torch.manual_seed(seed)
    q, head_weights, keys = (
        torch.randn(3, 64, 128).half().float(),
        torch.randn(3, 64),
        torch.randn(50, 128).half().float(),
    )
    found = score_bounds(q, head_weights, keys)

    def add(total: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
        if order != "truncated":
            return total + term
        exact = total.double() + term.double()
        near = exact.float()
        beyond = near.double().abs() > exact.abs()
        return torch.where(beyond, torch.nextafter(near, torch.zeros_like(near)), near)

    columns = range(127, -1, -1) if order == "backwards" else range(128)
    logits = torch.zeros(3, 64, 50)
    for k in columns:
        logits = add(logits, q[:, :, k : k + 1] * keys[:, k])
    scores = torch.zeros(3, 50)
    for head in range(64):
        scores = add(scores, logits[:, head].clamp(min=0.0) * head_weights[:, head : head + 1])
    error = (scores.double() - found.scores).abs()
    assert 0.005 < float((error / found.bounds).max()) < 0.5, "a bound that nothing comes near compares nothing"


@pytest.mark.parametrize("row_format", [RowFormat.INDEX_FP4, RowFormat.INDEX_FP8], ids=lambda one: one.value)
def test_the_reference_stays_within_the_bound(row_format: RowFormat, seed: int) -> None:
    torch.manual_seed(seed)
    keys = CachePool.allocate(5, 16, row_format, 128)
    write_cache(torch.randn(80, 128), keys, torch.arange(80))
    q, head_weights = torch.randn(4, 64, 128).bfloat16(), torch.randn(4, 64)
    found = score_bounds(q, head_weights, read_cache(keys, torch.arange(80)))
    scores = index_scores(q, head_weights, keys, torch.arange(80))
    assert bool(((scores.double() - found.scores).abs() <= found.bounds).all())
