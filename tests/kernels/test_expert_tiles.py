# SPDX-License-Identifier: Apache-2.0
"""Experts in tiles: how work is shared out, and, on a GPU, routings that stand at an edge."""

from __future__ import annotations

import os
import pathlib

import pytest
import torch

import megamoe
from megamoe.kernels.experts import (
    expert_stream,
    expert_tiles_sm90,
    nvfp4_experts,
    nvfp4_weight_only_experts,
    sort_pairs,
)
from megamoe.kernels.experts.expert_tiles_sm90 import PASS_TOKENS
from megamoe.kernels.experts.expert_tiles_sm90_config import BOX_TOKENS, HALF_TILES, STEP_BYTES
from megamoe.kernels.store import store_for, target_of
from megamoe.models.deepseek_v4.shapes import MODELS, op_calls
from megamoe.ops.nvfp4_experts import nvfp4_experts as nvfp4_experts_door
from megamoe.ops.nvfp4_weight_only_experts import nvfp4_weight_only_experts as weight_only_door
from megamoe.verify.comparisons import within
from megamoe.verify.inputs import INPUTS
from megamoe.verify.values import moved

EXPERTS = [call.dims for model in MODELS for call in op_calls(model) if call.op == "nvfp4_weight_only_experts"]
SHARED_LIMIT = 227 * 1024


@pytest.mark.parametrize("dims", EXPERTS, ids=[f"E{dims['E']}" for dims in EXPERTS])
@pytest.mark.parametrize("module", [nvfp4_weight_only_experts, nvfp4_experts], ids=["w4a16", "w4a4"])
def test_a_model_has_every_key_it_may_ask_for(module: object, dims: dict[str, int]) -> None:
    keys = list(module.configs(dims))  # type: ignore[attr-defined]
    tiles = [key for key in keys if isinstance(key, expert_tiles_sm90.Config)]
    sorted_by = {key.tokens_per_pass for key in keys if isinstance(key, sort_pairs.Config)}
    limit = expert_stream.stream_limit(dims["A"], dims["E"])
    for num_tokens in (limit + 1, 4 * limit, 100 * limit):
        size = expert_tiles_sm90.pass_tokens_for(num_tokens * dims["A"], dims["E"])
        assert {key.step for key in tiles if key.pass_tokens == size} == {"gate_up", "down"}
        assert size in sorted_by


@pytest.mark.parametrize("step", ["gate_up", "down"])
@pytest.mark.parametrize("size", PASS_TOKENS)
def test_shared_memory_holds_several_steps(step: str, size: int) -> None:
    config = expert_tiles_sm90.Config(step, 2048, 4096, size, False, "bf16")
    stage = STEP_BYTES + size * 128
    used = config.stages * stage + size * config.out_stride * 2 + 16 * config.stages
    assert config.stages >= 4
    assert used + 1024 <= SHARED_LIMIT
    assert size % BOX_TOKENS == 0
    assert config.row_blocks * config.block_rows >= config.num_rows


def test_rows_of_a_tile_are_each_stored_once() -> None:
    """The rows that lanes hold in fragments of both halves, warp by warp, are the rows of the block."""
    rows = []
    for half in range(2):
        for warp in range(8):  # row tile `warp` of a half lies at place half * HALF_TILES + warp in shared memory
            place = half * HALF_TILES + warp
            rows += [place * 16 + group + eight * 8 for eight in range(2) for group in range(8)]
    assert sorted(rows) == list(range(256))


def test_the_path_and_the_pass_follow_from_counts_alone() -> None:
    assert expert_stream.stream_limit(6, 256) == expert_stream.STREAMED_PAIRS * 256 // 6
    assert expert_stream.stream_limit(6, 8) == expert_stream.FEW_TOKENS
    sizes = [expert_tiles_sm90.pass_tokens_for(num_pairs, 256) for num_pairs in range(0, 256 * 300, 64)]
    assert sizes == sorted(sizes) and sizes[0] == PASS_TOKENS[0] and sizes[-1] == PASS_TOKENS[-1]


def routing(kind: str, num_tokens: int, num_experts: int, num_slots: int) -> torch.Tensor:
    """Return expert ids [T, A] that leave most experts empty, or fill one to the edge of a pass."""
    if kind == "six experts":
        return (torch.arange(num_slots) + num_experts - num_slots).expand(num_tokens, -1).contiguous()
    if kind == "one expert":  # no router does this; the operation allows it
        return torch.full((num_tokens, num_slots), num_experts - 1)
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(-1)[:, :num_slots].contiguous()


@pytest.fixture(scope="module")
def pack() -> None:
    """Open the pack that MEGAMOE_TEST_PACK names, where there is no DSL to compile with."""
    named = os.environ.get("MEGAMOE_TEST_PACK")
    if named:
        store_for(target_of(torch.device("cuda"))).use_pack(pathlib.Path(named), version=megamoe.__version__)


@pytest.mark.gpu
@pytest.mark.parametrize("door", [weight_only_door, nvfp4_experts_door], ids=["w4a16", "w4a4"])
@pytest.mark.parametrize("kind", ["six experts", "one expert", "random"])
@pytest.mark.parametrize("num_tokens", [28, 56, 57, 113, 300])
def test_edge_routings(pack: None, door: object, kind: str, num_tokens: int) -> None:
    """Empty experts, one that has everything, and passes that are full, one short and one over."""
    op = door.__name__  # type: ignore[attr-defined]
    dims = EXPERTS[0]
    arguments = INPUTS[op][0].make(dims, num_tokens, torch.Generator().manual_seed(num_tokens))
    arguments["expert_ids"] = routing(kind, num_tokens, 8, dims["A"])
    want = door(**arguments)  # type: ignore[operator]
    on_device = {name: moved(value, "cuda") for name, value in arguments.items()}
    got = door(**on_device)  # type: ignore[operator]
    within(op, got, want, arguments)
    assert torch.equal(got, door(**on_device))  # type: ignore[operator]
