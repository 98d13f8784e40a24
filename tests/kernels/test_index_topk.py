# SPDX-License-Identifier: Apache-2.0
"""index_topk: how entries are shared out, the decoder's arithmetic, what is refused; on a GPU the edges.

`megamoe verify` does the rest.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest
import torch

from megamoe.formats import mxfp4
from megamoe.formats.cache_rows import CachePool, RowFormat, encode_rows
from megamoe.formats.e2m1 import decode_packed
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.kernels.indexer import index_scores, index_topk
from megamoe.kernels.indexer.index_scores_config import STAGE_BYTES, TILE, WARP_KEYS, WARPS
from megamoe.kernels.indexer.index_scores_sm90_config import TILE as TILE_SM90
from megamoe.ops.index_topk import index_topk as door
from megamoe.ops.read_cache import reference as read_cache
from megamoe.verify.selection import compare_selections, score_bounds

DEVICE = pathlib.Path(index_topk.__file__).with_name("indexer_device.py")


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 131, 132, 600, 4096])
@pytest.mark.parametrize("capacity", [129, 2048, 16384, 262144])
def test_blocks_share_the_entries(num_tokens: int, capacity: int) -> None:
    splits = index_scores.num_splits(num_tokens, capacity, 132)
    assert 1 <= splits <= -(-capacity // index_scores.TILE)
    if num_tokens == 1 and capacity == 262144:
        assert splits >= 128, "a block a multiprocessor, but for those that would end no earlier"
    assert WARPS * WARP_KEYS == TILE == 2 * index_scores.TILE == 2 * TILE_SM90
    assert STAGE_BYTES == 32 * (2 * 16 + 2 * 4)


@pytest.mark.parametrize("rows", [*range(1, 300), 1024, 4096])
def test_the_inverse_divides(rows: int) -> None:
    inverse = index_scores.inverse_of(rows) % 2**32
    last = 2**32 // rows
    for number in [*range(0, min(last, 5000)), *range(last - 2 * rows, last), last // rows * rows - 1]:
        quotient = number * inverse >> 32 if inverse else number
        assert 0 <= number < last and quotient == number // rows


def test_the_decoder_places_every_code() -> None:
    """Shifts and masks as they stand in the source: codes i and i + 4, each code * 2^-126 in bf16."""
    steps = re.findall(
        r"(?:(shl|shr)\.[bu]32 a, \{\$r0\}, (\d+); )?and\.b32 a, (?:a|\{\$r0\}), 0x80008000;\s+"
        r"(shl|shr)\.[bu]32 b, \{\$r0\}, (\d+); and\.b32 b, b, 0x01C001C0;",
        DEVICE.read_text(),
    )
    assert len(steps) == 4
    words = torch.randint(0, 2**32, (1000,), generator=torch.Generator().manual_seed(1))
    packed = torch.stack([words >> 8 * byte & 0xFF for byte in range(4)], 1).to(torch.uint8)
    values = decode_packed(packed)  # [1000, 8]

    def shifted(how: str, by: str) -> torch.Tensor:
        return words if not how else (words << int(by)) & 0xFFFFFFFF if how == "shl" else words >> int(by)

    for pair, (sign, sign_by, rest, rest_by) in enumerate(steps):
        bits = (shifted(sign, sign_by) & 0x80008000) | (shifted(rest, rest_by) & 0x01C001C0)
        for half in range(2):
            number = (bits >> 16 * half & 0xFFFF) << 16
            number = torch.where(number >= 2**31, number - 2**32, number).to(torch.int32).view(torch.float32)
            assert torch.equal(number.double() * 2.0**126, values[:, pair + 4 * half].double())


@pytest.mark.parametrize(
    ("heads", "width", "row_format", "message"),
    [
        (60, 128, RowFormat.INDEX_FP4, r"takes 8, 16, \.\.\. 64 heads of 128 channels; got 60 of 128"),
        (72, 128, RowFormat.INDEX_FP4, "got 72 of 128"),
        (64, 64, RowFormat.INDEX_FP4, "got 64 of 64"),
        (64, 128, RowFormat.BF16, "takes FP4 queries and keys; got MxFp4Tensor and BF16 rows"),
    ],
)
def test_what_is_refused(heads: int, width: int, row_format: RowFormat, message: str) -> None:
    keys = CachePool.allocate(2, 4, row_format, width)
    q = mxfp4.quantize(torch.ones(1, heads, width))
    one = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=message):
        index_topk.run(q, torch.ones(1, heads), keys, one[None], one, one, 3)


# On a GPU.


class Case:
    """Requests whose keys lie in shuffled pages of a pool of NaN."""

    def __init__(self, num_tokens: int, num_requests: int, room: int, *, page: int = 64, heads: int = 64) -> None:
        generator = torch.Generator("cuda").manual_seed(room + page)
        per_request = -(-room // page)
        num_blocks = num_requests * per_request + 3
        self.keys = CachePool.allocate(num_blocks, page, RowFormat.INDEX_FP4, 128, device="cuda")
        self.keys.storage.fill_(0xFF)
        order = torch.randperm(num_blocks, generator=generator, device="cuda")[: num_requests * per_request]
        self.tables = order.view(num_requests, per_request).to(torch.int32)
        values = torch.randn(order.numel() * page, 128, generator=generator, device="cuda")
        data, scales = encode_rows(values, RowFormat.INDEX_FP4)
        self.keys.data_rows[order] = data.view(len(order), page, -1)
        self.keys.scale_rows[order] = scales.view(len(order), page, -1)
        self.q = mxfp4.quantize(torch.randn(num_tokens, heads, 128, generator=generator, device="cuda"))
        self.weights = torch.randn(num_tokens, heads, generator=generator, device="cuda")

    def select(self, requests: Any, num_visible: Any, top_k: int, tokens: slice = slice(None)) -> torch.Tensor:
        requests, num_visible = (
            torch.as_tensor(one, dtype=torch.int32, device="cuda") for one in (requests, num_visible)
        )
        return door(
            MxFp4Tensor(self.q.codes[tokens], self.q.scales[tokens]),
            self.weights[tokens],
            self.keys,
            block_tables=self.tables,
            requests=requests[tokens],
            num_visible=num_visible[tokens],
            top_k=top_k,
        )

    def check(self, requests: list[int], num_visible: list[int], top_k: int) -> None:
        """Compare every token with exact scores, and with itself alone."""
        got = self.select(requests, num_visible, top_k)
        for token, (request, count) in enumerate(zip(requests, num_visible, strict=True)):
            own = slice(token, token + 1)
            assert torch.equal(self.select(requests, num_visible, top_k, own)[0], got[token])
            count = count if request >= 0 else 0
            if count <= top_k:
                assert got[token].tolist() == [*range(count), *[-1] * (top_k - count)]
                continue
            entries = torch.arange(count, device="cuda")
            page = self.keys.rows_per_block
            keys = read_cache(self.keys, self.tables[request].long()[entries // page] * page + entries % page)
            found = score_bounds(
                mxfp4.dequantize(MxFp4Tensor(self.q.codes[own], self.q.scales[own])), self.weights[own], keys
            )
            want = found.scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k].sort(dim=1).values
            compare_selections(got[own].long(), want, found, torch.tensor([count]))


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "top_k"), [(64, 512), (64, 1024), (16, 64)])
def test_lengths(heads: int, top_k: int) -> None:
    """Nobody with a garbage length, length 0, at most top_k, one more, and borders of tiles; alone and together."""
    visible = [10**9, 0, top_k, top_k + 1, 2047, 2048, 2049, 5000]
    Case(8, 3, 5000, heads=heads).check([-1, 0, 1, 2, 0, 1, 2, 0], visible, top_k)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [1, 3, 16, 128])
def test_pages_of_any_size(page: int) -> None:
    """With pages of 1 more than 800 pages."""
    Case(2, 2, 1500, page=page).check([1, 0], [1499, 1300], 512)


@pytest.mark.gpu
def test_a_million_tokens() -> None:
    """262,144 entries in 4,096 pages: shares of the selecting blocks are as large as shared memory holds."""
    case = Case(3, 1, 262144)
    case.check([0, 0, 0], [262144, 131073, 262143], 1024)
    case.check([0, 0, 0], [262144, 200001, 513], 512)


@pytest.mark.gpu
def test_one_block_selects_as_a_cluster_does() -> None:
    """40 tokens at once have a block each, one alone has eight; beyond 16,384 entries scores are read again."""
    case = Case(40, 1, 40000)
    visible = [40000 - 617 * token for token in range(40)]
    together = case.select([0] * 40, visible, 1024)
    for token in range(0, 40, 3):
        assert torch.equal(case.select([0] * 40, visible, 1024, slice(token, token + 1))[0], together[token])


@pytest.mark.gpu
def test_the_workspace_is_shared_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(9, 1, 5000)
    whole = case.select([0] * 9, [5000 - token for token in range(9)], 512)
    monkeypatch.setattr(index_topk, "WORKSPACE_BYTES", 4 * 5120 * 4)  # four tokens at a time
    assert torch.equal(case.select([0] * 9, [5000 - token for token in range(9)], 512), whole)


@pytest.mark.gpu
def test_equal_infinite_and_nan_scores() -> None:
    """Equal ones go to the lowest entries; NaN sorts first, of a head weight and of a key."""
    case = Case(4, 1, 70000)
    case.weights[0], case.weights[1], case.weights[2] = 0.0, torch.nan, -torch.inf
    lowest = list(range(512))
    for visible in (70000, 3000):
        got = case.select([0] * 4, [visible] * 4, 512)
        assert got[0].tolist() == lowest and got[1].tolist() == lowest
    block, row = divmod(2999, 64)
    case.keys.scale_rows[case.tables[0, block], row] = 255
    got = case.select([0] * 4, [3000] * 4, 512)
    assert bool((got[3] == 2999).any()) and bool((got[0] == 2999).any())


@pytest.mark.gpu
def test_pages_beyond_4_gib() -> None:
    stride = 64 * 68 + 16 * 4096
    case = Case(1, 1, 12800)
    far = CachePool.allocate(70000, 64, RowFormat.INDEX_FP4, 128, device="cuda", block_stride_bytes=stride)
    blocks = 69999 - torch.arange(200, device="cuda")
    far.data_rows[blocks] = case.keys.data_rows[case.tables[0].long()]
    far.scale_rows[blocks] = case.keys.scale_rows[case.tables[0].long()]
    want = case.select([0], [12800], 512)
    case.keys, case.tables = far, blocks.to(torch.int32)[None]
    assert torch.equal(case.select([0], [12800], 512), want)


@pytest.mark.gpu
def test_a_graph_follows_the_lengths() -> None:
    case = Case(4, 4, 30000)
    requests = torch.arange(4, dtype=torch.int32, device="cuda")
    visible = torch.tensor([100, 30000, 5000, 0], dtype=torch.int32, device="cuda")
    case.select(requests, visible, 512)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = case.select(requests, visible, 512)
    for lengths in ([30000, 100, 513, 7], [0, 0, 0, 0], [29999, 30000, 512, 20000]):
        visible.copy_(torch.tensor(lengths))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result, case.select(requests, visible, 512))
