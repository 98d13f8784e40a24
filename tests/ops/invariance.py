# SPDX-License-Identifier: Apache-2.0
"""The property every operation has: a token's result has the same bits whatever other tokens are in the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Output = torch.Tensor | tuple[torch.Tensor, ...]


def _parts(output: Output) -> tuple[torch.Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def assert_row_invariant(op: Callable[..., Output], *rows: torch.Tensor) -> None:
    """Call `op` on all rows, on single rows, on runs around the tile size, and on permuted rows.

    Args:
        op: takes the row tensors and returns one or more tensors with a row per token.
        *rows: tensors [T, ...], T at least 33, indexed together.
    """
    num_rows = rows[0].shape[0]
    full = _parts(op(*rows))
    spans = [(0, 1), (7, 8), (8, 9), (num_rows - 1, num_rows), (1, 8), (2, 10), (3, 12), (0, 0), (5, num_rows)]
    for start, stop in spans:
        for got, want in zip(_parts(op(*(row[start:stop] for row in rows))), full, strict=True):
            assert got.shape[0] == stop - start
            assert torch.equal(got, want[start:stop]), (
                f"rows {start}..{stop} differ from the same rows among {num_rows}"
            )
    order = torch.arange(num_rows).flip(0)
    for got, want in zip(_parts(op(*(row[order] for row in rows))), full, strict=True):
        assert torch.equal(got, want[order]), "permuted rows differ"


def assert_nobody_changes_nothing(
    op: Callable[..., Output],
    rows: Sequence[torch.Tensor],
    nobody: Sequence[int | None],
    results: Sequence[float | None],
    *,
    seed: int,
) -> None:
    """Call `op` on the rows alone, and among rows of nobody: after the others, between them, before and on their own.

    Args:
        op: takes the row tensors and returns one or more tensors with a row per token.
        rows: tensors [T, ...], T at least 9, indexed together.
        nobody: for each, what a row of nobody holds; None for anything finite.
        results: for each output, what a row of nobody gets; None for anything finite.
        seed: of the anything.
    """
    num_rows, generator = rows[0].shape[0], torch.Generator().manual_seed(seed)
    want = _parts(op(*rows))
    for places in ([num_rows + one for one in range(7)], [0, 1, 5], [3, 4, 8, num_rows + 2]):
        is_nobody = torch.zeros(num_rows + len(places), dtype=torch.bool)
        is_nobody[places] = True
        for _ in range(2):  # other contents
            padded = [_padded(row, is_nobody, mark, generator) for row, mark in zip(rows, nobody, strict=True)]
            for got, right, result in zip(_parts(op(*padded)), want, results, strict=True):
                assert torch.equal(got[~is_nobody], right), f"rows of nobody at {places} change other rows"
                _check_nobody(got[is_nobody], result)
    everybody = torch.ones(5, dtype=torch.bool)
    alone = [_padded(row[:0], everybody, mark, generator) for row, mark in zip(rows, nobody, strict=True)]
    for got, result in zip(_parts(op(*alone)), results, strict=True):
        _check_nobody(got, result)


def _padded(rows: torch.Tensor, is_nobody: torch.Tensor, mark: int | None, generator: torch.Generator) -> torch.Tensor:
    shape = (is_nobody.shape[0], *rows.shape[1:])
    anything = torch.randn(shape, generator=generator) * 1e4
    padded = anything.to(rows.dtype) if mark is None else torch.full(shape, mark, dtype=rows.dtype)
    padded[~is_nobody] = rows
    return padded


def _check_nobody(got: torch.Tensor, result: float | None) -> None:
    if result is None:
        assert bool(got.isfinite().all())
    else:
        assert torch.equal(got, torch.full_like(got, result))
