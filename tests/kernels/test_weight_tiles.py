# SPDX-License-Identifier: Apache-2.0
"""Host side of the tile kernels and of the grouped stream: which tile, where it lies, what fits, what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from megamoe.formats import nvfp4
from megamoe.kernels.linear import (
    grouped_linear_sm90,
    grouped_stream,
    linear_sm90,
    nvfp4_grouped_linear,
    nvfp4_weight_only_grouped_linear,
    weight_tiles_sm90,
)
from megamoe.kernels.linear.weight_tiles_sm90 import BF16_TILES, NVFP4_TILES, best_tile, tile_keys
from megamoe.kernels.linear.weight_tiles_sm90_config import GROUP_ROWS, RESERVED_BYTES, Config, place
from megamoe.kernels.parts import launch
from megamoe.kernels.parts.weight_stream import TOKENS_PER_TILE
from megamoe.kernels.parts.weight_stream_limits import is_possible
from megamoe.kernels.rows import expand_nvfp4
from megamoe.models.deepseek_v4.shapes import MODELS, op_calls

ALL = [
    Config("nvfp4", scaled, out, *tile) for tile in NVFP4_TILES for scaled in (False, True) for out in ("bf16", "f32")
]
ALL += [Config("bf16", False, out, *tile) for tile in BF16_TILES for out in ("bf16", "f32")]


@pytest.mark.parametrize("config", ALL, ids=str)
def test_a_block_has_what_it_needs(config: Config) -> None:
    assert config.shared_bytes <= 227 * 1024 - 1024
    assert config.stages >= 3, "one being read, one released, one on its way"
    assert (2 * config.stages + 2) * 8 <= RESERVED_BYTES - 128, "barriers, and an alignment of 128 after them"
    assert config.rows == config.warpgroups * config.row_groups * GROUP_ROWS
    assert config.tokens % config.staged_tokens == 0
    assert config.staged_tokens % 16 == 0, "stmatrix takes 16 tokens at a time"
    registers = config.row_groups * (config.tokens // 2 + (32 if config.weight == "nvfp4" else 0))
    assert registers <= 200, "sums, and two sets of decoded weights, in 232 registers"


@pytest.mark.parametrize(
    ("num_groups", "group_blocks", "token_blocks"), list(itertools.product((1, 2, 8), (1, 3, 16), (1, 2, 8, 9, 33)))
)
def test_every_tile_is_visited_once(num_groups: int, group_blocks: int, token_blocks: int) -> None:
    row_blocks = num_groups * group_blocks
    tiles = [place(tile, group_blocks, row_blocks, token_blocks) for tile in range(row_blocks * token_blocks)]
    assert sorted(tiles) == sorted(itertools.product(range(num_groups), range(group_blocks), range(token_blocks)))


def test_a_weight_comes_from_memory_once_a_band() -> None:
    """Tiles of one row block follow each other for all token blocks of a band."""
    tiles = [place(tile, 4, 4, 16) for tile in range(64)]
    changes = sum(before[:2] != after[:2] for before, after in itertools.pairwise(tiles))
    assert changes == 4 * 2 - 1


@pytest.mark.parametrize("num_tokens", [1, 17, 64, 128, 256, 512, 1024, 4096])
@pytest.mark.parametrize(
    ("num_groups", "num_rows", "num_columns"), [(1, 4096, 7168), (1, 65536, 1536), (8, 1024, 4096)]
)
def test_the_tile_is_one_that_is_compiled(num_groups: int, num_rows: int, num_columns: int, num_tokens: int) -> None:
    for weight, tiles in (("nvfp4", NVFP4_TILES), ("bf16", BF16_TILES)):
        tile = best_tile(tiles, num_groups, num_rows, num_columns, num_tokens, 132)
        assert any((key.rows, key.tokens) == tile for key in tile_keys(weight, False, "bf16"))


def test_many_tokens_take_the_largest_tile() -> None:
    assert best_tile(NVFP4_TILES, 1, 65536, 1536, 4096, 132) in ((128, 256), (256, 128))
    assert best_tile(BF16_TILES, 8, 1024, 4096, 4096, 132) == (128, 256)


def test_few_tokens_take_a_tile_that_occupies_the_device() -> None:
    assert best_tile(NVFP4_TILES, 1, 4096, 7168, 64, 132) == (64, 64)
    assert best_tile(BF16_TILES, 8, 1024, 4096, 1, 132) == (64, 16)


@pytest.mark.parametrize("model", MODELS)
def test_grouped_streams_fit(model: str) -> None:
    for call in op_calls(model):
        if call.op == "nvfp4_grouped_linear":
            for x in ("bf16", "nvfp4"):
                for key in grouped_stream.stream_keys(call.dims["K"], x, "bf16"):
                    assert is_possible(key.plan), call
                    assert key.num_tiles * TOKENS_PER_TILE <= grouped_stream.STREAM_LIMIT


def test_refusals_say_what_to_do() -> None:
    x, w = torch.zeros(2, 3, 192, dtype=torch.bfloat16), nvfp4.quantize(torch.randn(3, 16, 192))
    for op, tokens in (
        (nvfp4_weight_only_grouped_linear, x),
        (nvfp4_grouped_linear, nvfp4.quantize(x.float(), scale_per="row")),
    ):
        with pytest.raises(ValueError, match=r"w\.fragments\(\)"):
            op.run(tokens, w, torch.bfloat16)
        with pytest.raises(NotImplementedError, match="K a multiple of 128"):
            op.run(tokens, w.fragments(), torch.bfloat16)
    with pytest.raises(NotImplementedError, match="bf16 activations"):
        nvfp4_weight_only_grouped_linear.run(
            torch.zeros(2, 1, 128), nvfp4.quantize(torch.randn(1, 16, 128)).fragments(), torch.bfloat16
        )
    with pytest.raises(NotImplementedError, match=r"bf16 weights; got torch.bfloat16 and torch.float32"):
        linear_sm90.run(torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(16, 64), torch.bfloat16)
    with pytest.raises(NotImplementedError, match="K a multiple of 8; got 12"):
        linear_sm90.run(
            torch.zeros(2, 12, dtype=torch.bfloat16), torch.zeros(16, 12, dtype=torch.bfloat16), torch.bfloat16
        )
    with pytest.raises(NotImplementedError, match="K a multiple of 64; got 72"):
        grouped_linear_sm90.run(x[..., :72], torch.zeros(3, 16, 72, dtype=torch.bfloat16), torch.bfloat16)


Launch = tuple[Config | grouped_stream.Config, tuple[torch.Tensor | int, ...]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Record what would be launched on a device of 132 multiprocessors."""
    recorded: list[Launch] = []
    for module in (weight_tiles_sm90, grouped_stream, expand_nvfp4):
        monkeypatch.setattr(module, "kernel", lambda config, _: lambda *arguments: recorded.append((config, arguments)))
    for module in (weight_tiles_sm90, grouped_stream):
        monkeypatch.setattr(module, "num_multiprocessors", lambda _: 132)
    monkeypatch.setattr(launch, "architecture_of", lambda _: "sm90")
    return recorded


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 300])
def test_every_door_launches_its_kernels(launches: list[Launch], num_tokens: int) -> None:
    x = torch.randn(num_tokens, 3, 256, dtype=torch.bfloat16)
    plain, w = torch.randn(3, 48, 256, dtype=torch.bfloat16), nvfp4.quantize(torch.randn(3, 48, 256)).fragments()
    quantized = nvfp4.quantize(x.float(), scale_per="row")
    outs = [
        grouped_linear_sm90.run(x, plain, torch.bfloat16),
        linear_sm90.run(x[:, 0], plain[0], torch.float32),
        linear_sm90.run(x[:, 0], plain[0, :1], torch.bfloat16),
        nvfp4_weight_only_grouped_linear.run(x, w, torch.bfloat16),
        nvfp4_grouped_linear.run(quantized, w, torch.bfloat16),
    ]
    assert [tuple(out.shape) for out in outs] == [
        (num_tokens, 3, 48),
        (num_tokens, 48),
        (num_tokens, 1),
        (num_tokens, 3, 48),
        (num_tokens, 3, 48),
    ]
    assert [out.dtype for out in outs] == [torch.bfloat16, torch.float32, *[torch.bfloat16] * 3]
    few = num_tokens <= grouped_stream.STREAM_LIMIT
    streams = [config for config, _ in launches if isinstance(config, grouped_stream.Config)]
    assert [config.x for config in streams] == (["bf16", "nvfp4"] if few else [])
    for config, arguments in launches:
        if isinstance(config, Config):
            tensors = [one for one in arguments if isinstance(one, torch.Tensor)]
            assert all(one.is_contiguous() for one in tensors)
            assert tensors[0].shape[0] == num_tokens
            assert arguments[-2] in (1, 3), "groups"
            assert 1 <= int(arguments[-1]) <= 132, "blocks"


def test_no_tokens_no_launch(launches: list[Launch]) -> None:
    x, w = torch.zeros(0, 3, 256, dtype=torch.bfloat16), nvfp4.quantize(torch.randn(3, 48, 256)).fragments()
    assert nvfp4_weight_only_grouped_linear.run(x, w, torch.bfloat16).shape == (0, 3, 48)
    assert launches == []
