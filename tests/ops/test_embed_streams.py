# SPDX-License-Identifier: Apache-2.0
"""embed_streams: rows of a table in every stream, zeros for nobody."""

from __future__ import annotations

import pytest
import torch

from megamoe.ops.embed_streams import embed_streams

from .invariance import assert_row_invariant

# --- known answers ---


def test_rows_by_hand() -> None:
    table = torch.tensor([[1.0, -0.0], [2.0, 3.0], [torch.inf, 2.0**-140]])
    got = embed_streams(table, torch.tensor([2, 0, -1]), num_streams=2)
    assert got.tolist() == [[[torch.inf, 2.0**-140]] * 2, [[1.0, -0.0]] * 2, [[0.0, 0.0]] * 2]
    assert got[1, 0, 1].signbit() and not got[2].signbit().any()


def test_rounds_once_and_copies() -> None:
    table = torch.tensor([[1.0 + 2.0**-8, 1.0 + 2.0**-8 + 2.0**-12]])  # a tie goes to even, above it goes up
    got = embed_streams(table, torch.tensor([0]), num_streams=1, out_dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16 and got.tolist() == [[[1.0, 1.0 + 2.0**-7]]]
    got = embed_streams(table, torch.tensor([0]), num_streams=1)
    got.zero_()
    assert table[0, 0] != 0.0


# --- properties ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_is_the_lookup_and_the_repetition(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(50, 24, generator=generator).bfloat16()
    ids = torch.randint(50, (33,), generator=generator)
    got = embed_streams(table, ids, num_streams=4, out_dtype=dtype)
    assert got.is_contiguous() and torch.equal(got, table[ids].to(dtype)[:, None, :].repeat(1, 4, 1))
    assert_row_invariant(lambda rows: embed_streams(table, rows, num_streams=4, out_dtype=dtype), ids)


def test_nobody_changes_nobody(seed: int) -> None:
    """A step padded to its bucket: the rows of tokens that exist keep their bits."""
    table = torch.randn(9, 8, generator=torch.Generator().manual_seed(seed))
    ids = torch.tensor([3, 8, 0])
    padded = embed_streams(table, torch.tensor([3, -1, 8, 0, -1, -1]), num_streams=3)
    assert torch.equal(padded[[0, 2, 3]], embed_streams(table, ids, num_streams=3))
    assert not padded[[1, 4, 5]].count_nonzero()


def test_no_tokens_and_an_empty_table() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert embed_streams(torch.zeros(3, 8), none, num_streams=4).shape == (0, 4, 8)
    assert embed_streams(torch.zeros(0, 8), torch.tensor([-1]), num_streams=2).tolist() == [[[0.0] * 8] * 2]


# --- refusals ---


def test_refusals() -> None:
    table, ids = torch.zeros(3, 8), torch.tensor([0, 1])
    for bad in (3, -2):
        with pytest.raises(ValueError, match=rf"token_ids must be 0 to 2, .* or -1 for nobody; got {bad}"):
            embed_streams(table, torch.tensor([0, bad]), num_streams=4)
    with pytest.raises(ValueError, match="num_streams must be at least 1; got 0"):
        embed_streams(table, ids, num_streams=0)
    with pytest.raises(TypeError, match="token_ids must be int64; got int32"):
        embed_streams(table, ids.int(), num_streams=4)
    with pytest.raises(TypeError, match="table must be bfloat16 or float32"):
        embed_streams(table.half(), ids, num_streams=4, out_dtype=torch.float32)
    with pytest.raises(ValueError, match="out_dtype must be"):
        embed_streams(table, ids, num_streams=4, out_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"table must be \[V, D\]"):
        embed_streams(table[0], ids, num_streams=4)
