# SPDX-License-Identifier: Apache-2.0
"""Host side of the NVFP4 matrix kernels: the decoder's arithmetic, how work is shared out, and what is refused."""

from __future__ import annotations

import pytest
import torch

from megamoe.formats import nvfp4
from megamoe.formats.e2m1 import decode_packed
from megamoe.formats.e4m3 import lookup_e4m3
from megamoe.formats.fragment_layout import codes_to_fragments
from megamoe.kernels.parts import expert_stream, sort_pairs
from megamoe.kernels.parts.fragment import SCALE_BITS, TWO_TO_112, TWO_TO_127, UNDO, code_pairs, plain_pair
from megamoe.kernels.parts.linear_stream import column_parts, stream_configs, stream_keys, stream_limit
from megamoe.kernels.parts.weight_stream import MAX_COLUMNS, SHARED_BYTES, WARPS, StreamPlan, unit_range
from megamoe.kernels.sm90 import nvfp4_linear, nvfp4_weight_only_experts, nvfp4_weight_only_linear
from megamoe.models.deepseek_v4.shapes import MODELS, op_calls

LINEARS = sorted({call.dims["K"] for model in MODELS for call in op_calls(model) if call.op == "nvfp4_linear"})
EXPERTS = [call.dims for model in MODELS for call in op_calls(model) if call.op == "nvfp4_weight_only_experts"]


def bf16_halves(word: torch.Tensor) -> torch.Tensor:
    """Return the two bf16 numbers of 32-bit words: [..., 2]."""
    halves = torch.stack((word & 0xFFFF, word >> 16 & 0xFFFF), -1)
    return torch.where(halves >= 0x8000, halves - 0x10000, halves).to(torch.int16).view(torch.bfloat16)


def scale_times_2_to_119(scale_bytes: torch.Tensor) -> torch.Tensor:
    """Do what block_scales does with the low byte of each half word."""
    raw = bf16_halves((scale_bytes << 4) & SCALE_BITS)[..., 0]
    first, second = (bf16_halves(torch.tensor(constant))[0] for constant in (TWO_TO_127, TWO_TO_112))
    return raw * first * second


# The decoder, for everything it can meet.


def test_every_code_times_every_scale_is_exact() -> None:
    scale_bytes = torch.arange(127)
    factors = scale_times_2_to_119(scale_bytes)
    want_scales = lookup_e4m3(scale_bytes.to(torch.uint8).view(torch.float8_e4m3fn))
    assert torch.equal(factors.double() * 2.0**-119, want_scales.double()), "scales, subnormal ones and zero included"
    for byte in range(256):  # two codes at a time
        values = bf16_halves(torch.tensor(plain_pair(byte)))
        got = (values[:, None] * factors).double() * UNDO
        want = decode_packed(torch.tensor([[byte]], dtype=torch.uint8)).view(2, 1).double() * want_scales.double()
        assert torch.equal(got, want), byte
        assert torch.equal(got.signbit() | (got == 0), want.signbit() | (want == 0))


def test_a_word_in_fragment_order_gives_its_four_pairs(seed: int) -> None:
    codes = torch.randint(0, 256, (16, 32), dtype=torch.uint8)
    values = decode_packed(codes).view(16, 64)
    words = codes_to_fragments(codes).view(torch.int32).view(32, 4).long() & 0xFFFFFFFF
    for lane in range(32):
        g, t = divmod(lane, 4)
        for step in range(4):
            for pair, word in enumerate(code_pairs(int(words[lane, step]))):
                got = bf16_halves(torch.tensor(word & 0xFFFFFFFF)).double() * 2.0**126
                row, column = g + 8 * (pair % 2), 16 * step + 2 * t + 8 * (pair // 2)
                assert torch.equal(got, values[row, column : column + 2].double()), (lane, step, pair)


# How work is shared out.


@pytest.mark.parametrize("num_columns", sorted({64, 448, 1088, *(k for k in LINEARS if k <= MAX_COLUMNS)}))
@pytest.mark.parametrize("num_tiles", [1, 2])
def test_plans_cover_every_column_once_and_fit(num_columns: int, num_tiles: int) -> None:
    plan = StreamPlan(num_columns, 1, num_tiles)
    assert plan.is_possible() and plan.shared_bytes <= SHARED_BYTES and sum(plan.stage_chunks) == plan.slice_chunks
    added = []
    for warp in range(plan.used_warps):
        first = plan.first_chunk(warp)
        assert 0 <= first and first + plan.slice_chunks <= plan.chunks
        added += [chunk for chunk in range(first, first + plan.slice_chunks) if chunk >= plan.first_own_chunk(warp)]
    assert added == list(range(plan.chunks)) and plan.used_warps <= WARPS
    assert plan.ring_offset % 128 == plan.token_offset % 16 == plan.slot_bytes % 64 == 0, "copies need aligned targets"


def test_the_order_of_sums_does_not_depend_on_the_number_of_tokens() -> None:
    """What decides the order: slices and their stages. Token tiles and tiles a unit only decide who adds."""
    for num_columns in (64, 1536, 4096, 7168, 8192):
        facts = {
            (plan.slice_chunks, plan.used_warps, plan.stage_chunks)
            for plan in (StreamPlan(num_columns, 1, num_tiles) for num_tiles in (1, 2, 3))
        }
        assert len(facts) == 1


@pytest.mark.parametrize(("num_blocks", "num_units"), [(1, 1), (132, 132), (132, 512), (132, 7), (132, 4096)])
def test_units_are_dealt_out_once(num_blocks: int, num_units: int) -> None:
    ranges = [unit_range(block, num_blocks, num_units) for block in range(num_blocks)]
    assert [unit for first, last in ranges for unit in range(first, last)] == list(range(num_units))
    sizes = {last - first for first, last in ranges}
    assert max(sizes) - min(sizes) <= 1


def test_wide_matrices_are_cut_into_parts() -> None:
    assert column_parts(8192) == [(0, 8192)] and column_parts(64) == [(0, 64)]
    assert column_parts(16384) == [(0, 8192), (8192, 16384)]
    assert column_parts(8256) == [(0, 4096), (4096, 8256)]
    first, second = stream_configs(16384, 1, "bf16", "bf16")
    assert (first.out, first.adds, second.out, second.adds) == ("f32", False, "bf16", True)


def test_compile_keys_cover_every_number_of_tokens() -> None:
    for num_rows in (512, 8192, 65536):
        keys = set(stream_keys(num_rows, 1536, "bf16", "bf16"))
        for num_tokens in range(1, stream_limit(num_rows) + 1):
            assert set(stream_configs(1536, num_tokens, "bf16", "bf16")) <= keys


@pytest.mark.parametrize("dims", EXPERTS, ids=lambda dims: f"E{dims['E']} D{dims['D']}")
def test_expert_keys_cover_every_number_of_tokens(dims: dict[str, int]) -> None:
    num_experts, width, inner_size, num_slots = dims["E"], dims["D"], dims["F"], dims["A"]
    keys = expert_stream.expert_keys(num_experts, width, inner_size, num_slots, "bf16", "bf16")
    sorted_by = {key.tokens_per_pass for key in keys if isinstance(key, sort_pairs.Config)}
    for num_tokens in (1, 8, 64, 512, 4096):
        assert expert_stream.tiles_for(width, inner_size, num_tokens * num_slots, num_experts) * 8 in sorted_by
    for key in keys:
        if isinstance(key, expert_stream.Config):
            assert key.plan.is_possible() and key.plan.shared_bytes <= SHARED_BYTES


def test_passes_are_bounded() -> None:
    generator = torch.Generator().manual_seed(0)
    for num_pairs in (1, 6, 384, 5000):
        counts = torch.randint(48, (num_pairs,), generator=generator).bincount(minlength=48)
        for tokens_per_pass in (8, 16, 24):
            passes = int((-(-counts // tokens_per_pass)).sum())
            assert passes <= sort_pairs.max_passes(num_pairs, 48, tokens_per_pass)


# Refusals.


def test_weights_that_are_not_in_fragment_order() -> None:
    w = nvfp4.quantize(torch.ones(16, 64))
    with pytest.raises(ValueError, match=r"weight_only_linear: .*fragment order; got row_major .*w.fragments\(\)"):
        nvfp4_weight_only_linear.run(torch.ones(1, 64, dtype=torch.bfloat16), w, torch.bfloat16)
    with pytest.raises(ValueError, match="nvfp4_linear: the kernel takes weights in fragment order"):
        nvfp4_linear.run(nvfp4.quantize(torch.ones(1, 64), scale_per="row"), w, torch.bfloat16)


def test_activations_that_are_not_taken() -> None:
    w = nvfp4.quantize(torch.ones(16, 64)).fragments()
    with pytest.raises(NotImplementedError, match=r"bf16 activations; got torch.float32.*use\(.reference.\)"):
        nvfp4_weight_only_linear.run(torch.ones(1, 64), w, torch.bfloat16)
    tiled = nvfp4.quantize(torch.ones(1, 64), scale_per="row").tiled()
    with pytest.raises(NotImplementedError, match="row-major scales; got tiled_128x4"):
        nvfp4_linear.run(tiled, w, torch.bfloat16)
    experts = nvfp4.quantize(torch.ones(2, 64, 64)).fragments()
    with pytest.raises(NotImplementedError, match="nvfp4_weight_only_experts: the kernel takes bf16 activations"):
        nvfp4_weight_only_experts.run(
            torch.ones(1, 64),
            torch.ones(1, 1),
            torch.zeros(1, 1, dtype=torch.int64),
            experts,
            experts,
            experts,
            None,
            None,
            torch.bfloat16,
        )


def test_sizes_that_no_plan_fits() -> None:
    assert not StreamPlan(MAX_COLUMNS + 64, 1, 1).is_possible()
    with pytest.raises(NotImplementedError, match="multiples of 64 up to 8192; got 16384 and 2048"):
        expert_stream.tiles_for(16384, 2048, 6, 8)
    with pytest.raises(NotImplementedError, match="at most 512 experts on a GPU; got 513"):
        sort_pairs.sort_pairs("nvfp4_weight_only_experts", torch.zeros(1, 1, dtype=torch.int64), 513, 8)


# Nothing to do.


def test_no_tokens_need_no_kernel() -> None:
    w = nvfp4.quantize(torch.ones(16, 64)).fragments()
    y = nvfp4_weight_only_linear.run(torch.ones(0, 64, dtype=torch.bfloat16), w, torch.float32)
    assert y.shape == (0, 16) and y.dtype == torch.float32
