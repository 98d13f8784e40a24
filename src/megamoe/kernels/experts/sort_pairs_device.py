# SPDX-License-Identifier: Apache-2.0
"""Device half of sort_pairs."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32
from cutlass.cute.arch import inline_ptx
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from megamoe.kernels.experts.sort_pairs_config import NO_PAIR, NUM_COUNTERS, PASS_FIELDS, SHARED_EXPERT, THREADS, Config

WARPS = THREADS // 32


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_pairs, num_sorted, bound = cute.sym_int32(), cute.sym_int32(), cute.sym_int32()
    arguments = (
        make_fake_tensor(Int64, (num_pairs,), (1,)),
        make_fake_tensor(Int32, (num_sorted,), (1,)),
        make_fake_tensor(Int32, (bound, PASS_FIELDS), (PASS_FIELDS, 1), assumed_align=16),
        make_fake_tensor(Int32, (NUM_COUNTERS,), (1,)),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return SortPairs(config).sort, arguments


def equal_lanes(value):
    """Return the mask of the warp's lanes that hold the same value."""
    return inline_ptx("match.any.sync.b32 {$w0}, {$r0}, 0xffffffff;", write_only_types=[Uint32], read_only_args=[value])


def bits_set(mask):
    """Return the number of bits set."""
    return inline_ptx("popc.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[mask])


def lanes_with(flag, equal):
    """Return how many lanes of the warp have flag 1; `equal` is the mask of those with this lane's flag."""
    return bits_set(equal) * flag + (32 - bits_set(equal)) * (1 - flag)


def sum_to_lane(value):
    """Return the sum of a value over the warp's lanes up to this one."""
    for power in range(5):
        value = inline_ptx(
            f"{{ .reg .pred has; .reg .b32 other; shfl.sync.up.b32 other|has, {{$r0}}, {1 << power}, 0, 0xffffffff; "
            "selp.b32 other, other, 0, has; add.s32 {$w0}, {$r0}, other; }",
            write_only_types=[Int32],
            read_only_args=[value],
        )
    return value


class SortPairs:
    """Each warp counts, then places, a contiguous share of the pairs, so that the order is that of the input.

    The shared expert's pairs are placed in the same way, a contiguous share of the tokens for each warp. Lanes whose
    pair has no expert here, or whose token is nobody, take part in all instructions of the warp and place nothing.
    """

    def __init__(self, config: Config):
        self.config = config

    @cute.jit
    def sort(self, ids: cute.Tensor, order: cute.Tensor, passes: cute.Tensor, num_passes: cute.Tensor, stream):
        self.kernel(ids, order, passes, num_passes).launch(
            grid=(1, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, ids: cute.Tensor, order: cute.Tensor, passes: cute.Tensor, num_passes: cute.Tensor):
        num_experts, per_pass = self.config.num_experts, self.config.tokens_per_pass
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(tid // 32), tid % 32
        allocator = cutlass.memory.SmemAllocator()
        counts = allocator.allocate_tensor(Int32, cute.make_layout((num_experts, WARPS)))
        warp_sums = allocator.allocate_tensor(Int32, cute.make_layout((3, WARPS)))
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()

        num_pairs = ids.shape[0]
        share = (num_pairs + (THREADS - 1)) // THREADS * 32  # pairs of a warp, whole groups of 32
        begin = warp * share
        end = cutlass.min(begin + share, num_pairs)
        num_shared = order.shape[0] - num_pairs
        num_slots = num_pairs // cutlass.max(num_shared, 1)
        token_share = (num_shared + (THREADS - 1)) // THREADS * 32
        first_token = warp * token_share
        last_token = cutlass.min(first_token + token_share, num_shared)
        for expert in cutlass.range(tid, num_experts, THREADS):
            for owner in cutlass.range_constexpr(WARPS):
                counts[expert, owner] = Int32(0)
        cute.arch.sync_threads()

        # 1. How many pairs of each expert has each warp?
        for start in cutlass.range(begin, end, 32, unroll=1):
            expert = self.expert_at(ids, start + lane, end)
            equal = equal_lanes(expert)
            if (expert >= 0) & ((equal & Uint32(cute.arch.lanemask_lt())) == 0):
                counts[expert, warp] = counts[expert, warp] + bits_set(equal)
            cute.arch.sync_warp()
        own_tokens = Int32(0)
        for start in cutlass.range(first_token, last_token, 32, unroll=1):
            somebody = self.is_somebody(ids, start + lane, last_token, num_slots)
            own_tokens = own_tokens + lanes_with(somebody, equal_lanes(somebody))
        if lane == 0:
            warp_sums[2, warp] = own_tokens
        cute.arch.sync_threads()

        # 2. Where does each expert start, in pairs and in passes? Thread e has expert e.
        own_pairs = Int32(0)
        if tid < num_experts:
            for owner in cutlass.range_constexpr(WARPS):
                own_pairs = own_pairs + counts[tid, owner]
        own_passes = (own_pairs + (per_pass - 1)) // per_pass
        pairs_before, passes_before = sum_to_lane(own_pairs), sum_to_lane(own_passes)
        if lane == 31:
            warp_sums[0, warp] = pairs_before
            warp_sums[1, warp] = passes_before
        cute.arch.sync_threads()
        routed_pairs, routed_passes = Int32(0), Int32(0)
        token_position, shared_pairs = Int32(0), Int32(0)
        for other in cutlass.range_constexpr(WARPS):
            pairs, passes_of_other, tokens = warp_sums[0, other], warp_sums[1, other], warp_sums[2, other]
            routed_pairs = routed_pairs + pairs
            token_position = token_position + tokens * Int32(other < warp)
            shared_pairs = shared_pairs + tokens
            pairs_before = pairs_before + pairs * Int32(other < warp)
            passes_before = passes_before + passes_of_other * Int32(other < warp)
            routed_passes = routed_passes + passes_of_other
        shared_passes = (shared_pairs + (per_pass - 1)) // per_pass
        if tid == 0:
            num_passes[0] = routed_passes + shared_passes
            if routed_passes + shared_passes == 0:  # blocks without work look at the first pass all the same
                passes[0, 0] = Int32(0)
                passes[0, 1] = Int32(0)
                passes[0, 2] = Int32(1)
                passes[0, 3] = Int32(0)
            num_passes[1] = Int32(0)
            num_passes[2] = Int32(0)
        for index in cutlass.range(tid, shared_passes, THREADS, unroll=1):
            passes[routed_passes + index, 0] = Int32(SHARED_EXPERT)
            passes[routed_passes + index, 1] = num_pairs + index * per_pass
            passes[routed_passes + index, 2] = cutlass.min(shared_pairs - index * per_pass, Int32(per_pass))
            passes[routed_passes + index, 3] = Int32(0)
        for index in cutlass.range(routed_pairs + tid, num_pairs, THREADS, unroll=1):
            order[index] = Int32(NO_PAIR)
        for index in cutlass.range(shared_pairs + tid, num_shared, THREADS, unroll=1):
            order[num_pairs + index] = Int32(NO_PAIR)
        pairs_before, passes_before = pairs_before - own_pairs, passes_before - own_passes
        if tid < num_experts:
            position = pairs_before
            for owner in cutlass.range_constexpr(WARPS):
                count = counts[tid, owner]
                counts[tid, owner] = position  # from now on: where the warp's next pair of this expert goes
                position = position + count
            for index in cutlass.range(own_passes, unroll=1):
                passes[passes_before + index, 0] = tid
                passes[passes_before + index, 1] = pairs_before + index * per_pass
                passes[passes_before + index, 2] = cutlass.min(own_pairs - index * per_pass, Int32(per_pass))
                passes[passes_before + index, 3] = Int32(0)
        cute.arch.sync_threads()

        # 3. Place the pairs.
        for start in cutlass.range(begin, end, 32, unroll=1):
            expert = self.expert_at(ids, start + lane, end)
            equal = equal_lanes(expert)
            below = bits_set(equal & Uint32(cute.arch.lanemask_lt()))
            position = Int32(0)
            if expert >= 0:
                position = counts[expert, warp]
            cute.arch.sync_warp()
            if expert >= 0:
                order[position + below] = start + lane
                if below == 0:
                    counts[expert, warp] = position + bits_set(equal)
            cute.arch.sync_warp()
        for start in cutlass.range(first_token, last_token, 32, unroll=1):
            somebody = self.is_somebody(ids, start + lane, last_token, num_slots)
            equal = equal_lanes(somebody)
            if somebody == 1:
                below = bits_set(equal & Uint32(cute.arch.lanemask_lt()))
                order[num_pairs + token_position + below] = num_pairs + start + lane
            token_position = token_position + lanes_with(somebody, equal)

    @cute.jit
    def expert_at(self, ids: cute.Tensor, index: Int32, end: Int32) -> Int32:
        """Return the expert of a pair; past the end, or if it is none of ours, a negative number of the lane's own."""
        expert = Int32(-1) - cute.arch.lane_idx()
        if index < end:
            named = ids[index]
            if (named >= Int64(0)) & (named < Int64(self.config.num_experts)):
                expert = Int32(named)
        return expert

    @cute.jit
    def is_somebody(self, ids: cute.Tensor, token: Int32, end: Int32, num_slots: Int32) -> Int32:
        """Return 1 for a token with an expert, here or elsewhere, else 0, and past the end."""
        somebody = Int32(0)
        if token < end:
            for slot in cutlass.range(num_slots, unroll=4):
                somebody = somebody | Int32(ids[token * num_slots + slot] != Int64(-1))
        return somebody
