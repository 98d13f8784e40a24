# SPDX-License-Identifier: Apache-2.0
"""Row kernels where a reference refuses, where memory is not as they want it, and bit by bit where that is promised."""

from __future__ import annotations

import pytest
import torch

from megamoe.formats.cache_rows import RowFormat
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.models.deepseek_v4.shapes import op_shapes
from megamoe.ops.embed_streams import embed_streams
from megamoe.ops.hyper_connection import hyper_connection_head_norm
from megamoe.ops.rope import RopeTable, rope_table
from megamoe.ops.rotate_queries import rotate_queries
from megamoe.ops.round_index_query import round_index_query
from megamoe.ops.streams import add_to_streams, mean_of_streams
from megamoe.verify.inputs import INPUTS

pytestmark = pytest.mark.gpu

FAR = 2**20
"""Positions of the longest context end here."""


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def some(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device="cuda").bfloat16()


def frequencies(device: str) -> RopeTable:
    return rope_table(64, 160000.0, device=device)


@pytest.mark.parametrize("streams", [1, 4])
def test_ids_outside_the_table_read_nothing(streams: int, generator: torch.Generator) -> None:
    table = some(generator, 9, 4096)[2:7]  # rows before and behind that are not the table's
    ids = torch.tensor([0, -1, 4, 5, -2, 2**40, -(2**62), 2**32 + 1, 3], device="cuda")
    got = embed_streams(table, ids, num_streams=streams)
    known = (ids >= 0) & (ids < 5)
    want = torch.where(known[:, None], table[ids.clamp(0, 4)], torch.zeros((), dtype=table.dtype, device="cuda"))
    assert torch.equal(got, want[:, None].expand(-1, streams, -1))


def test_rows_outside_the_tokens_are_nobodys(generator: torch.Generator) -> None:
    inputs = INPUTS["hyper_connection_head_norm"][1]
    arguments = inputs.make(op_shapes("hyper_connection_head_norm")[0].dims, 9, generator)
    arguments["rows"] = torch.tensor([3, 14, -1, 2**33, 0], device="cuda")  # 14 tokens
    got = hyper_connection_head_norm(**arguments)
    alone = hyper_connection_head_norm(**{**arguments, "rows": torch.tensor([3, 0], device="cuda")})
    assert torch.equal(got[[0, 4]], alone) and not bool(got[1:4].any())


@pytest.mark.parametrize(("stride", "offset"), [(3 * 256, 256), (3 * 256 + 4, 4), (3 * 256, 1)])
def test_means_stand_side_by_side_at_any_alignment(stride: int, offset: int, generator: torch.Generator) -> None:
    x = some(generator, 19, 4, 256)
    whole = torch.full((20 * stride,), 7.0, dtype=torch.bfloat16, device="cuda")
    out = whole.as_strided((19, 256), (stride, 1), offset)
    assert mean_of_streams(x, out=out) is out
    assert torch.equal(out.cpu(), mean_of_streams(x.cpu()))
    out.fill_(7.0)
    assert bool((whole == 7.0).all())  # nothing beside the rows


def test_streams_of_all_bit_patterns(seed: int) -> None:
    """Subnormals, infinities and NaN: one addition, one rounding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-(2**15), 2**15, (64, 4, 256), generator=generator).to(torch.int16).view(torch.bfloat16)
    e = torch.randint(-(2**15), 2**15, (64, 256), generator=generator).to(torch.int16).view(torch.bfloat16)
    x[:16] = torch.randint(0x300, (16, 4, 256), generator=generator).to(torch.int16).view(torch.bfloat16)
    e[:16] = torch.randint(0x300, (16, 256), generator=generator).to(torch.int16).view(torch.bfloat16)
    for got, want in (
        (add_to_streams(x.cuda(), e.cuda()).cpu(), add_to_streams(x, e)),
        (mean_of_streams(x.cuda()).cpu(), mean_of_streams(x)),
    ):
        same = (got.view(torch.int16) == want.view(torch.int16)) | (got.isnan() & want.isnan())
        assert bool(same.all())


def test_queries_out_of_a_stacked_linear_at_far_positions(generator: torch.Generator) -> None:
    """Columns of a wider matrix, positions at both ends of the longest context, and nobody's."""
    whole = some(generator, 6, 64 * 512 + 64 * 128)
    q = whole[:, : 64 * 512].unflatten(1, (64, 512))
    positions = torch.tensor([0, FAR - 1, -1, 131072, 163840, 1], device="cuda")
    got = rotate_queries(q, positions, frequencies("cuda"))
    want = rotate_queries(q.cpu(), positions.cpu(), frequencies("cpu"))
    torch.testing.assert_close(got.cpu().float(), want.float(), rtol=2**-7, atol=1e-5)
    assert torch.equal(got, rotate_queries(q.contiguous(), positions, frequencies("cuda")))


def index_query(q: torch.Tensor, positions: torch.Tensor) -> MxFp4Tensor:
    """Return the rounded query, its head weights looked at here."""
    weights = torch.linspace(-1.0, 1.0, q.shape[0] * q.shape[1], device=q.device).view(q.shape[:2])
    query, scaled = round_index_query(
        q,
        weights,
        positions,
        frequencies(q.device.type),
        key_format=RowFormat.INDEX_FP4,
        hadamard=True,
        head_scale=0.125,
    )
    assert torch.equal(scaled, weights * 0.125)
    assert isinstance(query, MxFp4Tensor)
    return query


@pytest.mark.parametrize("num_heads", [16, 64])
def test_index_queries_out_of_a_stacked_linear(num_heads: int, generator: torch.Generator) -> None:
    """Out of a stacked linear; a share of codes may lie beside a step."""
    q = some(generator, 33, 5 * 128 + num_heads * 128)[:, 5 * 128 :].unflatten(1, (num_heads, 128))
    positions = torch.randint(-1, FAR, (33,), generator=generator, device="cuda")
    got, want = index_query(q, positions), index_query(q.cpu(), positions.cpu())
    assert float((got.codes.cpu() != want.codes).float().mean()) < 1e-3
    assert float((got.scales.view(torch.uint8).cpu() != want.scales.view(torch.uint8)).float().mean()) < 1e-3


def test_index_queries_that_are_not_finite_say_so(generator: torch.Generator) -> None:
    q = some(generator, 4, 64, 128)
    q[1, 3, 100], q[2, 5, 0], q[3, 1] = float("nan"), float("inf"), 0.0
    scales = index_query(q, torch.arange(4, device="cuda")).scales.view(torch.uint8)
    damaged = torch.zeros(4, 64, dtype=torch.bool, device="cuda")
    damaged[1, 3] = damaged[2, 5] = True
    assert torch.equal((scales == 255).all(-1), damaged) and torch.equal((scales == 255).any(-1), damaged)
    assert scales[3, 1].tolist() == [1] * 4
