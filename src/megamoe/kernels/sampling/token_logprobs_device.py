# SPDX-License-Identifier: Apache-2.0
"""Device half of token_logprobs.

A cluster holds a row. Each block finds the best tokens of its share one after another: every thread knows the best of
its own, and the one whose token was taken looks for its next. Then all blocks have all lists and merge them.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.parts.cluster_device import address_in_block, shared_address_of
from megamoe.kernels.parts.held_row import CLUSTER, HELD, THREADS, WARPS
from megamoe.kernels.parts.held_row_device import (
    best_of_block,
    best_of_warp,
    hold,
    meet,
    share_of,
    store_cluster_pair,
    tell,
)
from megamoe.kernels.parts.logits_device import LEAST, NO_INDEX, order_of, symbolic_column, symbolic_logits
from megamoe.kernels.parts.memory_device import store_global_float_if, store_global_long_if
from megamoe.kernels.parts.ptx_device import add, bits_of, from_bits, subtract
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches
from megamoe.kernels.sampling.token_logprobs_config import LIST, Config


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_rows, num_top = cute.sym_int32(), cute.sym_int32()
    top_ids, top = (make_fake_tensor(dtype, (num_rows, num_top), (cute.sym_int64(), 1)) for dtype in (Int64, Float32))
    token_ids, chosen = symbolic_column(Int64, num_rows), symbolic_column(Float32, num_rows)
    return TokenLogprobs(), (symbolic_logits(num_rows), token_ids, chosen, top_ids, top, current_stream())


class TokenLogprobs:
    """See ops/token_logprobs.py."""

    @cute.jit
    def __call__(self, logits, token_ids, chosen, top_ids, top, stream):
        self.kernel(logits, token_ids, chosen, top_ids, top).launch(
            grid=(chosen.shape[0] * CLUSTER, 1, 1),
            block=(THREADS, 1, 1),
            cluster=(CLUSTER, 1, 1),
            min_blocks_per_mp=2,
            preferred_smem_carveout=100,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, logits, token_ids, chosen, top_ids, top):
        allocator = cutlass.memory.SmemAllocator()
        held = allocator.allocate_tensor(Float32, cute.make_layout(HELD), 16)
        lists = allocator.allocate_tensor(Int32, cute.make_layout(2 * CLUSTER * LIST), 16)
        sums = allocator.allocate_tensor(Int32, cute.make_layout((2 * WARPS, 2)), 16)
        shares = allocator.allocate_tensor(Int32, cute.make_layout(4 * CLUSTER), 16)
        last = allocator.allocate_tensor(Int32, cute.make_layout(2))
        block, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        row, rank = block // CLUSTER, block % CLUSTER
        overlap_launches()
        token, num_columns, num_top = Int32(token_ids[row]), logits.shape[1], top_ids.shape[1]
        chosen_out = chosen.iterator.toint() + Int64(row) * 4
        ids_out, top_out = top_ids[(row, None)].iterator.toint(), top[(row, None)].iterator.toint()
        is_writer = (rank == 0) & (thread == 0)
        if token < 0:
            store_global_float_if(is_writer, chosen_out, Float32(0.0))
            for start in cutlass.range(0, num_top, THREADS, unroll=1):
                place = start + thread
                wanted = (rank == 0) & (place < num_top)
                store_global_long_if(wanted, ids_out + Int64(place) * 8, Int64(-1))
                store_global_float_if(wanted, top_out + Int64(place) * 4, Float32(0.0))
        else:
            cute.arch.cluster_arrive()
            first, count = share_of(num_columns, rank)
            row_address = logits[(row, None)].iterator.toint()
            own_order, own_index = hold(row_address + Int64(first) * 4, held, first, count, thread)
            order, index = best_of_block(own_order, own_index, sums[None, 0])
            cute.arch.cluster_wait()  # all blocks run: from here on they may be written to
            order, index = best_of_warp(*tell(order, index, shares, 0, rank, thread))
            best = logits[row, index]
            total = Float32(0.0)
            for place in cutlass.range(thread, count, THREADS, unroll=4):
                total = total + cute.math.exp(subtract(held[place], best))
            total = self.sum_of_row(total, sums[None, 1], shares, rank, thread)
            shift = add(best, cute.math.log(total))
            logprob = subtract(logits[row, cutlass.min(token, num_columns - 1)], shift)
            store_global_float_if(is_writer, chosen_out, logprob)
            own = (own_order, own_index)
            self.find_top(
                own, logits, row, held, lists, sums, last, first, count, shift, num_top, ids_out, top_out, rank
            )

    @cute.jit
    def sum_of_row(self, total: Float32, sums: cute.Tensor, shares: cute.Tensor, rank: Int32, thread: Int32) -> Float32:
        """Return the sum over all threads of the cluster, in an order that is always the same."""
        lane, warp = thread % 32, thread // 32
        total = cute.arch.warp_reduction(total, add, threads_in_group=32)
        if lane == 0:
            sums[warp] = Int32(bits_of(total))
        cute.arch.sync_threads()
        total = from_bits(sums[0])
        for other in cutlass.range_constexpr(1, WARPS):
            total = add(total, from_bits(sums[other]))
        tell(Int32(bits_of(total)), Int32(0), shares, 1, rank, thread)
        total = from_bits(shares[2 * CLUSTER])
        for other in cutlass.range_constexpr(1, CLUSTER):
            total = add(total, from_bits(shares[2 * (CLUSTER + other)]))
        return total

    @cute.jit
    def find_top(
        self,
        own,
        logits,
        row: Int32,
        held: cute.Tensor,
        lists: cute.Tensor,
        sums: cute.Tensor,
        last: cute.Tensor,
        first: Int32,
        count: Int32,
        shift: Float32,
        num_top: Int32,
        ids_out: Int64,
        top_out: Int64,
        rank: Int32,
    ):
        """Store the most probable tokens of a row, LIST at a time.

        Args:
            own: order and column of this thread's best token.
            logits, row, held, first, count: the row and this block's share.
            lists, sums, last: shared memory.
            shift: what is subtracted from logits.
            num_top: how many.
            ids_out, top_out: where they go.
            rank: of this block.
        """
        thread, _, _ = cute.arch.thread_idx()
        lane, warp = thread % 32, thread // 32
        own_order, own_index = own
        for done in cutlass.range(0, num_top, LIST, unroll=1):
            wanted = cutlass.min(num_top - done, LIST)
            if done > 0:  # some of what this block found was not among the best of all
                own_order, own_index = next_of(held, first, count, thread, last[0], last[1])
            target = address_in_block(cutlass.min(lane, CLUSTER - 1), shared_address_of(lists) + rank * (LIST * 8))
            for place in cutlass.range(0, wanted, 1, unroll=1):
                parity = place % 2  # a warp may still read what the round before wrote
                order, index = best_of_warp(own_order, own_index)
                if lane == 0:
                    sums[warp, parity] = order
                    sums[WARPS + warp, parity] = index
                cute.arch.sync_threads()
                order, index = best_of_warp(sums[lane % WARPS, parity], sums[WARPS + lane % WARPS, parity])
                if thread < CLUSTER:
                    store_cluster_pair(target + place * 8, order, index)
                if (own_order == order) & (own_index == index):
                    own_order, own_index = next_of(held, first, count, thread, order, index)
            meet()
            # A token's place is the number of better ones in all lists.
            mine = cutlass.min(thread, CLUSTER * LIST - 1)
            order, index, better = lists[2 * mine], lists[2 * mine + 1], Int32(0)
            for of_block in cutlass.range_constexpr(CLUSTER):
                for place in cutlass.range(0, wanted, 1, unroll=4):
                    other_order = lists[2 * (of_block * LIST + place)]
                    other_index = lists[2 * (of_block * LIST + place) + 1]
                    is_better = (other_order > order) | ((other_order == order) & (other_index < index))
                    better = better + Int32(is_better)
            is_found = (thread < CLUSTER * LIST) & (mine % LIST < wanted) & (index != NO_INDEX) & (better < wanted)
            is_stored = is_found & (rank == 0)
            value = logits[row, index if is_stored else 0]  # places that no block filled hold anything
            store_global_long_if(is_stored, ids_out + Int64(done + better) * 8, Int64(index))
            store_global_float_if(is_stored, top_out + Int64(done + better) * 4, subtract(value, shift))
            if is_found & (better == wanted - 1):
                last[0] = order
                last[1] = index
            meet()  # the lists may be written again


@cute.jit
def next_of(held: cute.Tensor, first: Int32, count: Int32, thread: Int32, last_order: Int32, last_index: Int32):
    """Return the best of a thread's tokens behind another token."""
    order, index = Int32(LEAST), Int32(NO_INDEX)
    for place in cutlass.range(thread, count, THREADS, unroll=8):
        own = order_of(held[place])
        is_behind = (own < last_order) | ((own == last_order) & (first + place > last_index))
        if is_behind & ((own > order) | (index == NO_INDEX)):
            order, index = own, first + place
    return order, index
