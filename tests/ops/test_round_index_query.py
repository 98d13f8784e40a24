# SPDX-License-Identifier: Apache-2.0
"""round_index_query: bit for bit rope, hadamard, the quantizer of the key format, and one product."""

from __future__ import annotations

import pytest
import torch

from megamoe.formats.cache_rows import RowFormat
from megamoe.formats.fp8 import Fp8RowTensor
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.models.deepseek_v4.shapes import op_shapes
from megamoe.ops.hadamard import hadamard
from megamoe.ops.quantize import quantize_fp8_rows, quantize_mxfp4
from megamoe.ops.rope import rope, rope_table
from megamoe.ops.round_index_query import KEY_FORMATS, IndexQuery, round_index_query

from .invariance import assert_row_invariant

TABLE = rope_table(16, 10000.0)
FP4, FP8, PLAIN = RowFormat.INDEX_FP4, RowFormat.INDEX_FP8, RowFormat.FP32


def parts(query: IndexQuery) -> tuple[torch.Tensor, ...]:
    """The tensors of a query, scales as bytes."""
    if isinstance(query, torch.Tensor):
        return (query,)
    return query.codes.view(torch.uint8), query.scales.view(torch.uint8)


def inputs(num_tokens: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """Queries of 3 heads of 64 channels, head weights, positions."""
    generator = torch.Generator().manual_seed(seed)
    q = (2.0 * torch.randn(num_tokens, 3, 64, generator=generator)).to(dtype)
    weights = torch.randn(num_tokens, 3, generator=generator)
    return q, weights, torch.randint(10**6, (num_tokens,), generator=generator)


# --- known answers ---


def test_codes_by_hand() -> None:
    """Position 0 turns nothing: 6 and 3 need scale 1; 12 needs scale 2."""
    q = torch.zeros(1, 1, 64)
    q[0, 0, :2], q[0, 0, 32] = torch.tensor([6.0, -3.0]), 12.0
    zero = torch.tensor([0])
    query, weights = round_index_query(
        q, torch.tensor([[3.0]]), zero, TABLE, key_format=FP4, hadamard=False, head_scale=0.5
    )
    assert isinstance(query, MxFp4Tensor) and weights.tolist() == [[1.5]]
    assert query.codes[0, 0, 0].item() == 0xD7 and query.codes[0, 0, 16].item() == 0x07
    assert query.scales.view(torch.uint8).tolist() == [[[127, 128]]]
    query, _ = round_index_query(q, torch.ones(1, 1), zero, TABLE, key_format=FP8, hadamard=False, head_scale=1.0)
    assert isinstance(query, Fp8RowTensor) and query.scales.shape == (1, 1, 1)
    query, _ = round_index_query(q, torch.ones(1, 1), zero, TABLE, key_format=PLAIN, hadamard=True, head_scale=1.0)
    assert isinstance(query, torch.Tensor) and query[0, 0, 0].item() == (6.0 - 3.0 + 12.0) / 8.0


# --- properties ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("key_format", KEY_FORMATS, ids=str)
def test_is_the_composition_bit_for_bit(key_format: RowFormat, turned: bool, dtype: torch.dtype, seed: int) -> None:
    q, weights, pos = inputs(35, seed, dtype)
    query, scaled = round_index_query(q, weights, pos, TABLE, key_format=key_format, hadamard=turned, head_scale=0.3)
    want = rope(q, pos, TABLE)
    want = hadamard(want) if turned else want
    rounded: IndexQuery = want
    if key_format is FP4:
        rounded = quantize_mxfp4(want)
    elif key_format is FP8:
        rounded = quantize_fp8_rows(want, group=64)
    assert type(query) is type(rounded) and torch.equal(scaled, weights * 0.3)
    for got, part in zip(parts(query), parts(rounded), strict=True):
        assert got.dtype == part.dtype and torch.equal(got, part)


@pytest.mark.parametrize("key_format", [FP4, FP8, PLAIN], ids=str)
def test_row_invariant_and_at_any_stride(key_format: RowFormat, seed: int) -> None:
    q, weights, pos = inputs(35, seed)

    def call(*rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, scaled = round_index_query(*rows, TABLE, key_format=key_format, hadamard=True, head_scale=0.125)
        return *parts(query), scaled

    assert_row_invariant(call, q, weights, pos)
    beside = torch.cat((torch.ones(35, 40).bfloat16(), q.flatten(1)), dim=1)
    columns = beside[:, 40:].unflatten(-1, (3, 64))
    stacked = torch.cat((torch.zeros(35, 7), weights), dim=1)[:, 7:]
    for got, want in zip(call(columns, stacked, pos), call(q, weights, pos), strict=True):
        assert got.is_contiguous() and torch.equal(got, want)


@pytest.mark.parametrize("shape", op_shapes("round_index_query"), ids=str)
def test_sizes_of_models(shape: object, seed: int) -> None:
    dims = shape.dims
    q = torch.randn(2, dims["Hi"], dims["K"], generator=torch.Generator().manual_seed(seed)).bfloat16()
    table = rope_table(dims["R"], 160000.0)
    weights, pos = torch.ones(2, dims["Hi"]), torch.tensor([3, 4])
    query, _ = round_index_query(q, weights, pos, table, key_format=FP4, hadamard=True, head_scale=0.5)
    for got, want in zip(parts(query), parts(quantize_mxfp4(hadamard(rope(q, pos, table)))), strict=True):
        assert torch.equal(got, want)


def test_nobody_changes_nobody(seed: int) -> None:
    q, weights, pos = inputs(4, seed)
    real = torch.tensor([0, 2, 3])
    pos[1] = -1
    for got, want in zip(
        round_index_query(q, weights, pos, TABLE, key_format=FP4, hadamard=True, head_scale=0.5),
        round_index_query(q[real], weights[real], pos[real], TABLE, key_format=FP4, hadamard=True, head_scale=0.5),
        strict=True,
    ):
        for one, other in zip(parts(got), parts(want), strict=True):
            assert torch.equal(one[real], other)


@pytest.mark.parametrize("key_format", [FP4, FP8, PLAIN], ids=str)
def test_no_tokens(key_format: RowFormat) -> None:
    none = torch.empty(0, dtype=torch.int64)
    query, weights = round_index_query(
        torch.empty(0, 3, 64), torch.empty(0, 3), none, TABLE, key_format=key_format, hadamard=True, head_scale=1.0
    )
    assert query.shape == (0, 3, 64) and weights.shape == (0, 3)


# --- refusals ---


def test_refusals() -> None:
    q, weights, pos = torch.zeros(2, 3, 96), torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"a power of two of them for the Hadamard rotation; got \[2, 3, 96\]"):
        round_index_query(q, weights, pos, TABLE, key_format=FP4, hadamard=True, head_scale=1.0)
    with pytest.raises(ValueError, match=r"at least the 16 channels of the table; got \[2, 3, 8\]"):
        round_index_query(q[..., :8], weights, pos, TABLE, key_format=PLAIN, hadamard=False, head_scale=1.0)
    with pytest.raises(ValueError, match=r"INDEX_FP4 needs a multiple of 32 channels; got \[2, 3, 48\]"):
        round_index_query(q[..., :48], weights, pos, TABLE, key_format=FP4, hadamard=False, head_scale=1.0)
    with pytest.raises(ValueError, match="key_format must be .*; got .*FP8_ROPE_BF16"):
        round_index_query(q, weights, pos, TABLE, key_format=RowFormat.FP8_ROPE_BF16, hadamard=False, head_scale=1.0)
    with pytest.raises(ValueError, match=r"head_weights must be \[T, Hi\]"):
        round_index_query(q, weights[:, :2], pos, TABLE, key_format=FP4, hadamard=False, head_scale=1.0)
    with pytest.raises(TypeError, match="head_weights must be float32; got bfloat16"):
        round_index_query(q, weights.bfloat16(), pos, TABLE, key_format=FP4, hadamard=False, head_scale=1.0)
    with pytest.raises(ValueError, match="finite"):
        round_index_query(q + torch.inf, weights, pos, TABLE, key_format=FP4, hadamard=False, head_scale=1.0)
