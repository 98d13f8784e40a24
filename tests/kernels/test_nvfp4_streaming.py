# SPDX-License-Identifier: Apache-2.0
"""Host side of the NVFP4 matrix kernels: the decoder's arithmetic, how work is shared out, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from megamoe.formats import nvfp4
from megamoe.formats.e2m1 import decode_packed
from megamoe.formats.e4m3 import lookup_e4m3
from megamoe.formats.fragment_layout import codes_to_fragments
from megamoe.kernels.experts import expert_stream, nvfp4_weight_only_experts, sort_pairs
from megamoe.kernels.experts.expert_stream_config import QUEUE_TURNS, fragment_column
from megamoe.kernels.linear import nvfp4_linear, nvfp4_weight_only_linear
from megamoe.kernels.linear.linear_stream import column_parts, num_clusters, stream_configs, stream_keys, stream_limit
from megamoe.kernels.linear.linear_stream_config import LinearPlan, is_long
from megamoe.kernels.parts.fragment import SCALE_BITS, TWO_TO_112, TWO_TO_127, UNDO, code_pairs, plain_pair
from megamoe.kernels.parts.weight_stream import SHARED_BYTES, WARPS, StreamPlan
from megamoe.kernels.parts.weight_stream_limits import MAX_COLUMNS, is_possible
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


def test_h_is_stored_in_the_order_of_fragments() -> None:
    """A lane's 16 bytes of a row are what arrange() would make of it: pairs at 2t and 2t + 8 of two steps of 16."""
    where = [fragment_column(column) for column in range(256)]
    assert sorted(where) == list(range(256))
    column_at = {place: column for column, place in enumerate(where)}
    for chunk in range(4):
        for lane in range(4):
            for load in range(2):
                place = chunk * 64 + load * 32 + lane * 8
                got = [column_at[place + value] for value in range(8)]
                steps = [chunk * 64 + 16 * (2 * load + index) for index in range(2)]
                assert got == [step + 8 * half + 2 * lane + i for step in steps for half in range(2) for i in range(2)]


# How work is shared out.


@pytest.mark.parametrize("num_columns", sorted({64, 448, 1088, *(k for k in LINEARS if k <= MAX_COLUMNS)}))
@pytest.mark.parametrize("num_tiles", [1, 2])
def test_plans_cover_every_column_once_and_fit(num_columns: int, num_tiles: int) -> None:
    plan = StreamPlan(num_columns, 1, num_tiles, 1)
    assert is_possible(plan) and plan.shared_bytes <= SHARED_BYTES and sum(plan.stage_chunks) == plan.slice_chunks
    added = []
    for warp in range(plan.slices):
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
            for plan in (StreamPlan(num_columns, 1, num_tiles, 1) for num_tiles in (1, 2, 3))
        }
        assert len(facts) == 1


def unit_range(block: int, num_blocks: int, num_units: int) -> tuple[int, int]:
    """Return the units of a block, as device halves deal them out."""
    return block * num_units // num_blocks, (block + 1) * num_units // num_blocks


@pytest.mark.parametrize(("num_blocks", "num_units"), [(1, 1), (132, 132), (132, 512), (132, 7), (132, 4096)])
def test_units_are_dealt_out_once(num_blocks: int, num_units: int) -> None:
    ranges = [unit_range(block, num_blocks, num_units) for block in range(num_blocks)]
    assert [unit for first, last in ranges for unit in range(first, last)] == list(range(num_units))
    sizes = {last - first for first, last in ranges}
    assert max(sizes) - min(sizes) <= 1


def own_chunks(plan: LinearPlan, rank: int, warp: int) -> range:
    """Return the chunks that a segment adds, as linear_stream_device.py has them."""
    if not plan.uneven:
        first = (rank * plan.rank_warps + warp) * plan.segment_chunks
        return range(first, first + plan.segment_chunks)
    first = rank * (plan.chunks // plan.ranks) + warp * (plan.segment_chunks - 1)
    first += sum(is_long(rank, before) for before in range(warp))
    return range(first, first + plan.segment_chunks - 1 + is_long(rank, warp))


LINEAR_SIZES = sorted({64, 448, 1088, 4160, 6144, *(k for k in LINEARS if k <= MAX_COLUMNS)})


@pytest.mark.parametrize("num_columns", LINEAR_SIZES)
@pytest.mark.parametrize(("num_tiles", "wide"), [(1, False), (2, False), (2, True)])
def test_linear_plans_cover_every_column_once_and_fit(num_columns: int, num_tiles: int, wide: bool) -> None:
    plan = LinearPlan(num_columns, num_tiles, wide)
    added = [
        chunk for rank in range(plan.ranks) for warp in range(plan.rank_warps) for chunk in own_chunks(plan, rank, warp)
    ]
    assert [chunk for chunk in added if chunk < plan.chunks] == list(range(plan.chunks))
    assert plan.cluster * plan.groups * plan.segments == plan.ranks and len(plan.stage_chunks) == plan.segments
    if plan.uneven and plan.segments == 2:  # the device's order: the long segment first
        for rank in range(0, plan.ranks, 2):
            for warp in range(plan.rank_warps):
                later = (warp + warp // 4) % 2
                sizes = [len(own_chunks(plan, rank + one, warp)) for one in (later, 1 - later)]
                assert tuple(sizes) == plan.stage_chunks
    assert 8 * plan.slice_chunks * num_tiles <= 64, "registers of a thread for tokens"
    assert plan.blocks_per_multiprocessor * (plan.shared_bytes + 1024) <= 228 * 1024 and plan.num_slots >= 3
    assert plan.blocks_per_multiprocessor * plan.threads <= 512, "128 registers a thread"
    assert plan.ring_offset % 128 == plan.exchange_offset % 16 == plan.slot_bytes % 64 == 0, "copies need alignment"


@pytest.mark.parametrize("num_columns", LINEAR_SIZES)
def test_the_order_of_sums_of_a_linear_does_not_depend_on_the_number_of_tokens(num_columns: int) -> None:
    plans = [LinearPlan(num_columns, *kind) for kind in ((1, False), (2, False), (2, True))]
    assert len({(plan.ranks, plan.rank_warps, plan.segment_chunks) for plan in plans}) == 1


def test_places_of_sums_hit_every_bank_once() -> None:
    """`store_sums` and `rank_sum` of linear_stream_device: a lane writes 16 bytes and reads 4."""
    written = {}
    for lane in range(32):
        row, column = divmod(lane, 4)
        for index in range(4):
            place = (column * 8 + (row + column * 2 & 7)) * 16 + index * 4
            written[row + index // 2 * 8, column * 2 + index % 2] = place
    assert sorted(written.values()) == list(range(0, 512, 4))
    for first in range(0, 32, 8):  # a quarter of a warp stores at once
        groups = {written[lane // 4, lane % 4 * 2] // 16 % 8 for lane in range(first, first + 8)}
        assert len(groups) == 8
    for token in range(0, 8, 2):
        read = {written[row, one] for row in range(16) for one in (token, token + 1)}
        assert len({place // 4 % 32 for place in read}) == 32
    for token in range(8):
        for row in range(16):
            column = token % 8 // 2
            place = (column * 8 + (row + column * 2 & 7)) * 16 + (row // 8 * 2 + token % 2) * 4
            assert place == written[row, token]


def test_blocks_fill_the_multiprocessors() -> None:
    assert num_clusters(LinearPlan(8192, 1), 512, 132, 1) == 66
    assert num_clusters(LinearPlan(8192, 2), 512, 132, 1) == 30, "clusters of 4 leave some"
    assert num_clusters(LinearPlan(8192, 2, True), 512, 132, 4) == 16
    assert num_clusters(LinearPlan(1536, 2), 2048, 132, 2) == 132, "two of a launch on each"
    assert num_clusters(LinearPlan(1536, 1), 3, 132, 1) == 3 and num_clusters(LinearPlan(8192, 2), 512, 8, 1) == 1


class ClusterSums:
    """`exchange` and `finish_turn` of linear_stream_device: where the sums of a cluster's blocks go, and when."""

    def __init__(self, cluster: int, count: int) -> None:
        self.cluster, self.count = cluster, count
        self.slots: dict[tuple[int, int, int], int] = {}  # (block, turn & 1, sender) → turn
        self.arrived = {(block, turn): 0 for block in range(cluster) for turn in range(count)}
        self.finished: list[int] = []

    def finish(self, rank: int, turn: int) -> Iterator[None]:
        unit = turn * self.cluster + rank
        if unit < self.count:
            while self.arrived[rank, turn] < self.cluster:
                yield
            assert {self.slots.pop((rank, turn & 1, sender)) for sender in range(self.cluster)} == {turn}
            self.finished.append(unit)

    def block(self, rank: int) -> Iterator[None]:
        for step in range(self.count):
            turn, target = divmod(step, self.cluster)
            yield
            if target == 0 and step > 0:
                yield from self.finish(rank, turn - 1)
            assert (target, turn & 1, rank) not in self.slots, "not read yet"
            self.slots[target, turn & 1, rank] = turn
            self.arrived[target, turn] += 1
        yield from self.finish(rank, (self.count - 1) // self.cluster)


class BlockSums:
    """The loop of linear_stream_device: warps store the sums of a unit after adding those of the one before."""

    def __init__(self, warps: int, count: int) -> None:
        self.warps, self.count = warps, count
        self.rooms: dict[tuple[int, int], int] = {}  # (step & 1, warp) → step
        self.published = dict.fromkeys(range(count), 0)
        self.added: list[int] = []

    def add(self, step: int) -> Iterator[None]:
        while self.published[step] < self.warps:
            yield
        for warp in range(self.warps):  # one after the other: another warp may be faster
            assert self.rooms[step & 1, warp] == step
            yield
        self.added.append(step)

    def warp(self, warp: int) -> Iterator[None]:
        for step in range(self.count):
            yield
            if step > 0:
                yield from self.add(step - 1)
            self.rooms[step & 1, warp] = step
            self.published[step] += 1
        yield from self.add(self.count - 1)


def run_at_random(running: list[Iterator[None]], seed: int) -> None:
    order = random.Random(seed)
    while running:
        one = order.choice(running)
        if next(one, "ended") == "ended":
            running.remove(one)


@pytest.mark.parametrize("cluster", [2, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 11, 16])
def test_sums_of_a_cluster_are_read_before_they_are_overwritten(cluster: int, count: int) -> None:
    for seed in range(40):
        sums = ClusterSums(cluster, count)
        run_at_random([sums.block(rank) for rank in range(cluster)], seed)
        assert sorted(sums.finished) == list(range(count))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_sums_of_a_block_are_read_before_they_are_overwritten(count: int) -> None:
    for seed in range(40):
        sums = BlockSums(4, count)
        run_at_random([sums.warp(warp) for warp in range(4)], seed)
        assert sorted(sums.added) == sorted(4 * list(range(count)))


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


@pytest.mark.parametrize("x_name", ["bf16", "nvfp4"])
@pytest.mark.parametrize("dims", EXPERTS, ids=lambda dims: f"E{dims['E']} D{dims['D']}")
def test_expert_keys_cover_every_number_of_tokens(dims: dict[str, int], x_name: str) -> None:
    num_experts, width, inner_size, num_slots = dims["E"], dims["D"], dims["F"], dims["A"]
    keys = expert_stream.expert_keys(num_experts, width, inner_size, num_slots, x_name, "bf16")
    sorted_by = {key.tokens_per_pass for key in keys if isinstance(key, sort_pairs.Config)}
    for num_tokens in (1, 8, 64, 512, 4096):
        assert expert_stream.tiles_for(width, inner_size, num_tokens * num_slots, num_experts, x_name) * 8 in sorted_by
    for key in keys:
        if isinstance(key, expert_stream.Config):
            assert is_possible(key.plan) and key.shared_bytes <= SHARED_BYTES
            assert key.queue_offset % 16 == 0 and key.ahead + 2 <= QUEUE_TURNS


def test_groups_of_warps_share_out_row_tiles_and_columns() -> None:
    plan = StreamPlan(2048, 1, 2, row_groups=2)
    streamed = [
        (stream * plan.row_groups + warp // plan.slices, plan.first_chunk(warp % plan.slices) + chunk)
        for warp in range(plan.used_warps)
        for stream in range(plan.streams)
        for chunk in range(plan.slice_chunks)
    ]
    assert sorted(streamed) == [(tile, chunk) for tile in range(plan.tiles_per_unit) for chunk in range(plan.chunks)]


@pytest.mark.parametrize("num_units", [1, 7, 131, 132, 4352, 9216])
@pytest.mark.parametrize("num_blocks", [1, 132])
def test_every_unit_is_taken_once(num_blocks: int, num_units: int) -> None:
    """The queue of expert_stream_device.py in plain Python, blocks taking turns in an odd order."""
    pool = num_units * (100 - expert_stream.POOL_PERCENT) // 100
    runs = [list(unit_range(block, num_blocks, pool)) for block in range(num_blocks)]
    counter, taken, busy = 0, [], list(range(num_blocks))
    while busy:
        block = busy.pop(len(taken) * 7 % len(busy))
        unit, end = runs[block]
        if unit == end and end < num_units:
            index, counter = counter, counter + 1
            size, large = expert_stream.POOL_CHUNK, (num_units - pool) // (2 * expert_stream.POOL_CHUNK)
            unit = pool + index * size if index < large else min(pool + large * (size - 1) + index, num_units)
            end = unit + size if index < large else min(unit + 1, num_units)
        if unit < end:
            taken.append(unit)
            busy.append(block)
        runs[block] = [unit + (unit < end), end]
    assert sorted(taken) == list(range(num_units))


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
            None,
            torch.bfloat16,
        )


def test_sizes_that_no_plan_fits() -> None:
    assert not is_possible(StreamPlan(MAX_COLUMNS + 64, 1, 1, 1))
    with pytest.raises(NotImplementedError, match="multiples of 64 up to 8192; got 16384 and 2048"):
        expert_stream.tiles_for(16384, 2048, 6, 8, "bf16")
    with pytest.raises(NotImplementedError, match="at most 512 experts on a GPU; got 513"):
        sort_pairs.sort_pairs("nvfp4_weight_only_experts", torch.zeros(1, 1, dtype=torch.int64), 513, 8)


# Nothing to do.


def test_no_tokens_need_no_kernel() -> None:
    w = nvfp4.quantize(torch.ones(16, 64)).fragments()
    y = nvfp4_weight_only_linear.run(torch.ones(0, 64, dtype=torch.bfloat16), w, torch.float32)
    assert y.shape == (0, 16) and y.dtype == torch.float32
