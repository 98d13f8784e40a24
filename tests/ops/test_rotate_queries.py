# SPDX-License-Identifier: Apache-2.0
"""rotate_queries: bit for bit rms_norm without a weight, then rope."""

from __future__ import annotations

import math

import pytest
import torch

from megamoe.models.deepseek_v4.shapes import op_shapes
from megamoe.ops.rms_norm import rms_norm
from megamoe.ops.rope import rope, rope_table
from megamoe.ops.rotate_queries import rotate_queries

from .invariance import assert_row_invariant

TABLE = rope_table(8, 10000.0)

# --- known answers ---


def test_one_pair_by_hand() -> None:
    """(3, 4) has the root mean square sqrt(12.5); one radian turns it."""
    table = rope_table(2, 10000.0)
    got = rotate_queries(torch.tensor([[[3.0, 4.0]]]), torch.tensor([1]), table, eps=0.0)
    a, b = 3.0 / math.sqrt(12.5), 4.0 / math.sqrt(12.5)
    want = [a * math.cos(1) - b * math.sin(1), b * math.cos(1) + a * math.sin(1)]
    assert got[0, 0].tolist() == pytest.approx(want, rel=1e-6)


def test_channels_before_the_rotary_ones_are_only_normed() -> None:
    q = torch.full((1, 2, 16), 2.0)
    got = rotate_queries(q, torch.tensor([5]), TABLE, eps=0.0)
    assert got[..., :8].tolist() == [[[1.0] * 8] * 2] and not torch.equal(got[..., 8:], torch.ones(1, 2, 8))


# --- properties ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_is_the_composition_bit_for_bit(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = (3.0 * torch.randn(37, 3, 24, generator=generator)).to(dtype)
    q[0] = 0.0
    pos = torch.randint(10**6, (37,), generator=generator)
    got = rotate_queries(q, pos, TABLE, eps=1e-5)
    assert got.dtype == dtype and torch.equal(got, rope(rms_norm(q, None, eps=1e-5), pos, TABLE))
    assert_row_invariant(lambda rows, where: rotate_queries(rows, where, TABLE, eps=1e-5), q, pos)


@pytest.mark.parametrize("shape", op_shapes("rotate_queries"), ids=str)
def test_the_columns_of_a_stacked_linear(shape: object, seed: int) -> None:
    """The queries stand beside the index queries: tokens at a stride, and the same bits; nothing is written."""
    dims = shape.dims
    num_heads, width = dims["H"], dims["C"]
    both = torch.randn(3, num_heads * width + 128, generator=torch.Generator().manual_seed(seed)).bfloat16()
    before = both.clone()
    q = both[:, : num_heads * width].unflatten(-1, (num_heads, width))
    table, pos = rope_table(dims["R"], 10000.0), torch.tensor([0, 7, 900_000])
    got = rotate_queries(q, pos, table)
    assert got.is_contiguous() and torch.equal(got, rotate_queries(q.contiguous(), pos, table))
    assert torch.equal(both, before)


def test_nobody_changes_nobody(seed: int) -> None:
    q = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(seed))
    q[[1, 4]] = torch.nan
    got = rotate_queries(q, torch.tensor([3, -1, 4, 0, -1]), TABLE)
    assert torch.equal(got[[0, 2, 3]], rotate_queries(q[[0, 2, 3]], torch.tensor([3, 4, 0]), TABLE))


def test_no_tokens() -> None:
    assert rotate_queries(torch.empty(0, 2, 16), torch.empty(0, dtype=torch.int64), TABLE).shape == (0, 2, 16)


# --- refusals ---


def test_refusals() -> None:
    q, pos = torch.zeros(2, 3, 16), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"at least the 8 channels of the table; got \[2, 3, 4\]"):
        rotate_queries(q[..., :4], pos, TABLE)
    with pytest.raises(ValueError, match=r"pos must be \[T\] with T = 2"):
        rotate_queries(q, torch.tensor([0]), TABLE)
    with pytest.raises(ValueError, match=r"q must be \[T, H, C\]"):
        rotate_queries(q[0], pos, TABLE)
    with pytest.raises(TypeError, match="pos must be int64; got int32"):
        rotate_queries(q, pos.int(), TABLE)
    with pytest.raises(TypeError, match="q must be bfloat16 or float32"):
        rotate_queries(q.half(), pos, TABLE)
