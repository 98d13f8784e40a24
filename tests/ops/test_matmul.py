# SPDX-License-Identifier: Apache-2.0
"""row_invariant_matmul: right, and the same bits for a row whatever else is in the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from megamoe.ops.matmul import BLOCK_K, TILE_ROWS, row_invariant_matmul

Matmul = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
ROWS = [0, 1, TILE_ROWS - 1, TILE_ROWS, TILE_ROWS + 1, 41]


@pytest.fixture(params=[1, 2, 4], ids=lambda count: f"{count}-threads")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run with this many threads; more threads than cores is slow but allowed."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


# --- known answers ---


def test_small_numbers() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]])
    w = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, -4.0]])
    assert row_invariant_matmul(x, w).tolist() == [[6.0, -10.0], [-0.5, -2.0]]


@pytest.mark.parametrize("num_k", [0, 1, BLOCK_K - 1, BLOCK_K, BLOCK_K + 1, 3 * BLOCK_K + 5])
@pytest.mark.parametrize("num_rows", ROWS)
def test_integers_are_exact(num_rows: int, num_k: int) -> None:
    x = (torch.arange(num_rows * num_k) % 7 - 3).float().view(num_rows, num_k)
    w = (torch.arange(6 * num_k) % 5 - 2).float().view(6, num_k)
    y = row_invariant_matmul(x, w)
    assert torch.equal(y, (x.double() @ w.double().T).float())
    assert y.is_contiguous()


# --- properties ---


def _depends_on_company(matmul: Matmul, x: torch.Tensor, w: torch.Tensor, generator: torch.Generator) -> bool:
    full = matmul(x, w)
    spans = [(row, row + 1) for row in range(TILE_ROWS + 1)] + [(1, 8), (3, 11), (5, 14), (2, 32)]
    order = torch.randperm(x.shape[0], generator=generator)
    return not torch.equal(matmul(x[order], w), full[order]) or any(
        not torch.equal(matmul(x[start:stop], w), full[start:stop]) for start, stop in spans
    )


@pytest.mark.parametrize("num_columns", [1, 3, 4, 24, 33, 260])
@pytest.mark.parametrize("num_k", [64, 1000, 2048])
def test_a_row_has_the_same_bits_in_any_company(threads: None, num_k: int, num_columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(41, num_k, generator=generator), torch.randn(num_columns, num_k, generator=generator)
    assert not _depends_on_company(row_invariant_matmul, x, w, generator)


def test_the_check_sees_a_special_case_for_one_row(seed: int) -> None:
    """What BLAS libraries do: another order of additions when there is a single row."""

    def special(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return row_invariant_matmul(x.flip(1), w.flip(1)) if len(x) == 1 else row_invariant_matmul(x, w)

    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(41, 256, generator=generator), torch.randn(8, 256, generator=generator)
    assert _depends_on_company(special, x, w, generator)


def test_layout_of_the_input_does_not_matter(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(9, 48, generator=generator), torch.randn(20, 48, generator=generator)
    want = row_invariant_matmul(x, w)
    assert torch.equal(row_invariant_matmul(x.T.contiguous().T, w), want)
    wide = torch.randn(9, 3, 48, generator=generator)
    wide[:, 1] = x
    assert torch.equal(row_invariant_matmul(wide[:, 1], w), want)


# --- refusals ---


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"needs x \[M, K\] and w \[N, K\]; got \[2, 3\] and \[4, 5\]"):
        row_invariant_matmul(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"got \[3\] and \[4, 3\]"):
        row_invariant_matmul(torch.zeros(3), torch.zeros(4, 3))
    with pytest.raises(TypeError, match="must be float32; got torch.bfloat16"):
        row_invariant_matmul(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(4, 3))
