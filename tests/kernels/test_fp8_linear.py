# SPDX-License-Identifier: Apache-2.0
"""fp8_linear on Hopper: how columns are dealt out, the decoders' arithmetic, how work is shared out, what is refused.

On a GPU: fp32 results against fp64, NaN, and both paths' borders; `megamoe verify` does the rest.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import pytest
import torch

import megamoe
from megamoe.formats import fp8
from megamoe.formats.e4m3 import lookup_e4m3
from megamoe.formats.fp8 import Fp8BlockTensor, Fp8RowTensor
from megamoe.kernels.fp8 import fp8_linear, fp8_tiles_sm90
from megamoe.kernels.fp8.fp8_linear import stream_limit
from megamoe.kernels.fp8.fp8_stream import MAX_BLOCKS, PASS_TOKENS, stream_configs
from megamoe.kernels.fp8.fp8_stream_config import BLOCK, SHARED_BYTES, WARPS
from megamoe.kernels.fp8.fp8_tiles_sm90_config import UNDO
from megamoe.kernels.store import store_for, target_of
from megamoe.models.deepseek_v4.shapes import MODELS, op_calls
from megamoe.ops.quantize import quantize_fp8_rows
from megamoe.verify.tolerance import assert_within

WIDTHS = sorted({call.dims["K"] for model in MODELS for call in op_calls(model) if call.op == "fp8_linear"})


def bf16_halves(word: torch.Tensor) -> torch.Tensor:
    """Return the two bf16 numbers of 32-bit words: [..., 2]."""
    halves = torch.stack((word & 0xFFFF, word >> 16 & 0xFFFF), -1)
    return torch.where(halves >= 0x8000, halves - 0x10000, halves).to(torch.int16).view(torch.bfloat16)


# How columns are dealt out. Position p of step s is what the matrix instruction multiplies with position p.


def weight_positions(folded: bool) -> list[int]:
    """Return the column at each position of each step of a block of 128, from the words that lane t has of a row."""
    order = (0, 2, 1, 3) if folded else (0, 1, 2, 3)  # of a word's four values, as they are decoded
    columns = []
    for half in range(2):
        for step in range(4):
            positions = [0] * 16
            for t in range(4):
                piece = 32 * t + 16 * half if folded else 64 * half + 16 * t  # the lane's 16 bytes
                for index, value in enumerate(order):
                    positions[2 * t + index % 2 + 8 * (index // 2)] = piece + 4 * step + value
            columns += positions
    return columns


def token_places(folded: bool) -> list[int]:
    """Return the column at each place of an expanded block of 128, as the threads of fp8_expand write them."""
    order = (0, 2, 1, 3) if folded else (0, 1, 2, 3)
    columns = []
    for thread in range(8):
        start, stride = (thread * 4, 32) if folded else (thread // 4 * 64 + thread % 4 * 4, 16)
        for pair in range(2):  # 16 bytes each
            for part in range(4):
                columns += [start + stride * part + value for value in order[2 * pair : 2 * pair + 2]]
    return columns


@pytest.mark.parametrize("folded", [True, False])
def test_weights_and_tokens_meet(folded: bool) -> None:
    dealt = weight_positions(folded)
    assert sorted(dealt) == list(range(BLOCK)), "every column once"
    assert dealt == token_places(folded)


def test_pieces_of_folded_weights_lie_in_different_banks() -> None:
    """Eight lanes load 16 bytes at a time: two rows of 128 bytes, whose pieces the copy engine has swizzled."""
    for half in range(2):
        for first in range(0, 32, 8):
            lanes = range(first, first + 8)
            units = [((lane % 4 * 2) ^ (lane // 4)) ^ half for lane in lanes]
            assert sorted(units) == list(range(8))
            for lane, unit in zip(lanes, units, strict=True):
                assert unit ^ (lane // 4) == lane % 4 * 2 + half, "the swizzle undone"


# The decoder of folded weights.


def test_folded_codes_times_scales_are_exact() -> None:
    codes = torch.arange(256)
    values = lookup_e4m3(codes.to(torch.uint8).view(torch.float8_e4m3fn)).double()
    even = ((codes << 4) & 0x07F0) | ((codes << 8) & 0x8000)
    odd = (((codes << 8) >> 4) & 0x07F0) | ((codes << 8) & 0x8000)
    assert torch.equal(even, odd)
    numbers = bf16_halves(even)[:, 0]
    finite = (codes & 0x7F) != 0x7F
    for byte in (1, 60, 105, 127, 130, 141):
        factor = bf16_halves(torch.tensor((byte + 113) << 7))[0]
        want = values * 2.0 ** (byte - 127)
        got = (numbers * factor).double() * UNDO
        exact = finite & (want.abs() >= 2.0**-110)
        assert torch.equal(got[exact], want[exact]), byte
    met = ((codes & 0x7F) + 1) & 0x80
    assert torch.equal(met != 0, ~finite)


# How work is shared out.


@pytest.mark.parametrize("num_columns", sorted({640, 8320, *WIDTHS}))
def test_slices_cover_every_column_once_and_do_not_depend_on_the_number_of_tokens(num_columns: int) -> None:
    edges = set()
    for num_tokens in (1, 8, 9, 16, 17, PASS_TOKENS):
        configs = stream_configs(num_columns, num_tokens, "bf16")
        slices = []
        for config in configs:
            assert config.slices <= config.split and config.split * config.teams == WARPS
            assert config.shared_bytes <= SHARED_BYTES and config.depth >= max(3, config.early)
            assert config.token_offset % 16 == config.ring_offset % 16 == 0
            assert config.num_blocks <= MAX_BLOCKS[config.num_tiles] and num_tokens <= 8 * config.num_tiles
            first = config.first_column // BLOCK
            for warp in range(config.slices):
                start = warp * config.slice_blocks
                slices.append((first + start, first + min(start + config.slice_blocks, config.num_blocks)))
        assert [block for start, end in slices for block in range(start, end)] == list(range(num_columns // BLOCK))
        assert [config.adds for config in configs] == [False] + [True] * (len(configs) - 1)
        assert [config.out for config in configs] == ["f32"] * (len(configs) - 1) + ["bf16"]
        edges.add(tuple(slices))
    assert len(edges) == 1


@pytest.mark.parametrize("dims", [call.dims for call in op_calls("pro") if call.op == "fp8_linear"], ids=str)
def test_compile_keys_cover_every_number_of_tokens(dims: dict[str, int]) -> None:
    keys = set(fp8_linear.configs(dims))
    for num_tokens in range(1, PASS_TOKENS + 1):
        assert set(stream_configs(dims["K"], num_tokens, "bf16")) <= keys
    for folded in (True, False):
        for num_tokens in (stream_limit(dims["N"]) + 1, 64, 65, 128, 1000, 4096):
            rows, tokens = fp8_tiles_sm90.tile_shape(dims["N"], num_tokens, folded, 132)
            assert fp8_tiles_sm90.Config(rows, tokens, folded, "bf16") in keys


# Refusals, and nothing to do.


def test_what_is_refused() -> None:
    x, w = fp8.quantize_rows(torch.ones(2, 256)), fp8.quantize_blocks(torch.ones(32, 256))
    with pytest.raises(NotImplementedError, match="a scale per 128; got 64. Quantize them with quantize_fp8_rows"):
        fp8_linear.run(fp8.quantize_rows(torch.ones(2, 256), group=64), w, torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"N a multiple of 16 and K of 128; got \[24, 256\].*use\(.reference"):
        fp8_linear.run(x, fp8.quantize_blocks(torch.ones(24, 256)), torch.bfloat16)
    wide = torch.zeros(32, 512, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, :256]
    with pytest.raises(NotImplementedError, match=r"contiguous and 16-byte aligned; got strides \[512, 1\].*Clone"):
        fp8_linear.run(x, Fp8BlockTensor(wide, w.scales), torch.bfloat16)


def test_no_tokens_need_no_kernel() -> None:
    w = fp8.quantize_blocks(torch.ones(16, 128))
    x = Fp8RowTensor(torch.empty(0, 128).to(torch.float8_e4m3fn), torch.empty(0, 1))
    y = fp8_linear.run(x, w, torch.float32)
    assert y.shape == (0, 16) and y.dtype == torch.float32


# On a GPU.


@pytest.fixture(scope="module")
def pack() -> Iterator[None]:
    """Open the pack that MEGAMOE_TEST_PACK names, where there is no DSL to compile with."""
    named = os.environ.get("MEGAMOE_TEST_PACK")
    if named:
        store_for(target_of(torch.device("cuda"))).use_pack(pathlib.Path(named), version=megamoe.__version__)
    yield


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 33, 100, 1000])
@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.float32], ids=str)
def test_agrees_with_fp64_and_repeats(pack: None, num_tokens: int, scale_dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    w = fp8.quantize_blocks(torch.randn(2064, 1024, generator=generator, device="cuda"), scale_dtype)
    x = quantize_fp8_rows(torch.randn(num_tokens, 1024, generator=generator, device="cuda").bfloat16())
    want = fp8.dequantize(x).double() @ fp8.dequantize(w).double().T
    got = fp8_linear.run(x, w, torch.bfloat16)
    assert_within("fp8_linear", got, want.bfloat16())
    for _ in range(20):
        assert torch.equal(fp8_linear.run(x, w, torch.bfloat16), got)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [4, 100])
@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.float32], ids=str)
def test_nan_is_never_a_number(pack: None, num_tokens: int, scale_dtype: torch.dtype) -> None:
    w = fp8.quantize_blocks(torch.randn(256, 1024, device="cuda"), scale_dtype)
    x = quantize_fp8_rows(torch.randn(num_tokens, 1024, device="cuda").bfloat16())
    for column, code in ((0, 0x7F), (801, 0xFF)):
        codes = w.codes.view(torch.uint8).clone()
        codes[37, column] = code
        y = fp8_linear.run(x, Fp8BlockTensor(codes.view(torch.float8_e4m3fn), w.scales), torch.bfloat16)
        assert y.isnan().any(0).nonzero().flatten().tolist() == [37] and bool(y[:, 37].isnan().all())
    codes = x.codes.view(torch.uint8).clone()
    codes[3, 500] = 0x7F
    y = fp8_linear.run(Fp8RowTensor(codes.view(torch.float8_e4m3fn), x.scales), w, torch.bfloat16)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [3] and bool(y[3].isnan().all())
    scales = x.scales.view(torch.uint8).clone()
    scales[2, 5] = 255
    y = fp8_linear.run(Fp8RowTensor(x.codes, scales.view(torch.float8_e8m0fnu)), w, torch.bfloat16)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [2]
