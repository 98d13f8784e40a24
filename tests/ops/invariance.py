# SPDX-License-Identifier: Apache-2.0
"""The property every operation has: a token's result has the same bits whatever other tokens are in the call."""

from __future__ import annotations

from collections.abc import Callable

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
