# SPDX-License-Identifier: Apache-2.0
"""Device half of index_select.

A cluster selects for one token; each block has a contiguous share of the entries and keeps their scores in shared
memory. Four passes of 8 bits find the integer of the last score that is selected: each block counts its own, all read
the counts of all. Then each warp counts what lies above and at that score in its share, and writes its part of the
result, which is in the order of entries as the shares are.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32

from megamoe.kernels.indexer.index_select_config import BINS, PASSES, SPAN, THREADS, Config
from megamoe.kernels.indexer.indexer_device import (
    bits_set,
    count_at,
    lanes_where,
    load_cluster_word,
    store_cluster_word,
    store_word_if,
)
from megamoe.kernels.parts.cluster_device import address_in_block, shared_address_of
from megamoe.kernels.parts.memory_device import load_global_vector_if
from megamoe.kernels.parts.pool_device import symbolic_integers
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches, symbolic_rows

WARPS = THREADS // 32
VECTOR = 4


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens = cute.sym_int32()
    arguments = (
        symbolic_rows(Uint32, num_tokens, cute.sym_int32()),
        symbolic_integers(Int32, num_tokens),
        symbolic_integers(Int32, num_tokens),
        symbolic_integers(Int32, num_tokens, config.top_k),
        Int32(0),
        current_stream(),
    )
    return IndexSelect(config), arguments


class IndexSelect:
    """entries[t] = the top_k visible ones with the largest scores, equal ones by the lowest number, ascending."""

    def __init__(self, config: Config):
        self.config = config

    @cute.jit
    def __call__(
        self,
        scores: cute.Tensor,
        requests: cute.Tensor,
        num_visible: cute.Tensor,
        entries: cute.Tensor,
        room: Int32,
        stream,
    ):
        cluster = self.config.cluster
        self.kernel(scores, requests, num_visible, entries, room).launch(
            grid=(entries.shape[0] * cluster, 1, 1),
            block=(THREADS, 1, 1),
            cluster=(cluster, 1, 1),
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        scores: cute.Tensor,
        requests: cute.Tensor,
        num_visible: cute.Tensor,
        entries: cute.Tensor,
        room: Int32,
    ):
        config = self.config
        allocator = cutlass.memory.SmemAllocator()
        held = allocator.allocate_tensor(Uint32, cute.make_layout(config.held), 16)
        counts = allocator.allocate_tensor(Int32, cute.make_layout((BINS, PASSES)))
        sums = allocator.allocate_tensor(Int32, cute.make_layout(2 * WARPS))
        shares = allocator.allocate_tensor(Int32, cute.make_layout(2 * config.cluster))
        found = allocator.allocate_tensor(Int32, cute.make_layout(2))
        block, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        token, rank = block // config.cluster, block % config.cluster
        overlap_launches()
        visible = cutlass.min(num_visible[token], room)
        if requests[token] < 0:
            visible = Int32(0)
        if visible <= config.top_k:  # the same for the whole cluster
            for start in cutlass.range_constexpr(0, config.top_k, config.cluster * THREADS):
                place = start + rank * THREADS + thread
                entry = place if place < visible else Int32(-1)
                store_word_if(place < config.top_k, entries[(token, None)].iterator.toint() + Int64(place) * 4, entry)
        else:
            self.select(scores, entries, token, rank, visible, thread, held, counts, sums, shares, found)

    @cute.jit
    def select(
        self,
        scores: cute.Tensor,
        entries: cute.Tensor,
        token: Int32,
        rank: Int32,
        visible: Int32,
        thread: Int32,
        held: cute.Tensor,
        counts: cute.Tensor,
        sums: cute.Tensor,
        shares: cute.Tensor,
        found: cute.Tensor,
    ):
        """Select for a token that sees more than top_k entries."""
        config = self.config
        warp, lane = cute.arch.make_warp_uniform(thread // 32), thread % 32
        span = (visible + (config.cluster * SPAN - 1)) // (config.cluster * SPAN) * SPAN
        first = rank * span
        count = cutlass.max(cutlass.min(visible - first, span), 0)
        row = scores[(token, None)]
        source = row.iterator.toint() + Int64(first) * 4
        counters = shared_address_of(counts)

        for place in cutlass.range_constexpr(0, BINS * PASSES, THREADS):
            counts[(place + thread) % BINS, (place + thread) // BINS] = Int32(0)
        cute.arch.sync_threads()
        for place in cutlass.range(thread * VECTOR, count, THREADS * VECTOR, unroll=2):
            words = load_global_vector_if(Int32(1), source + Int64(place) * 4, VECTOR)
            for element in cutlass.range_constexpr(VECTOR):
                if place < config.held:
                    held[place + element] = words[element]
                if place + element < count:
                    count_at(counters + Int32(words[element] >> 24) * 4)

        last, wanted = Uint32(0), Int32(config.top_k)
        for number in cutlass.range_constexpr(PASSES):
            shift = 24 - 8 * number
            area = counters + number * (BINS * 4)
            if cutlass.const_expr(number > 0):
                for place in cutlass.range(thread, count, THREADS, unroll=4):
                    word = self.score_at(held, row, first, place)
                    if word >> (shift + 8) == last:
                        count_at(area + Int32((word >> shift) & Uint32(BINS - 1)) * 4)
            self.meet()
            own = Int32(0)
            if thread < BINS:
                for other in cutlass.range_constexpr(config.cluster):
                    own = own + self.word_of(other, area + thread * 4)
            above = self.sum_above(own, sums, thread, warp, lane)
            if (thread < BINS) & (above < wanted) & (wanted <= above + own):
                found[0] = thread
                found[1] = wanted - above
            cute.arch.sync_threads()
            last, wanted = (last << 8) | Uint32(found[0]), found[1]

        # What each warp has above the last score, and at it.
        share = (count + (THREADS - 1)) // THREADS * 32
        begin = cutlass.min(warp * share, count)
        end = cutlass.min(begin + share, count)
        num_above, num_equal = Int32(0), Int32(0)
        for place in cutlass.range(begin + lane, end, 32, unroll=4):
            word = self.score_at(held, row, first, place)
            num_above = num_above + Int32(word > last)
            num_equal = num_equal + Int32(word == last)
        num_above = cute.arch.warp_reduction(num_above, lambda a, b: a + b)
        num_equal = cute.arch.warp_reduction(num_equal, lambda a, b: a + b)
        if lane == 0:
            sums[warp] = num_above
            sums[WARPS + warp] = num_equal
        cute.arch.sync_threads()
        of_warp = [sums[lane], sums[WARPS + lane]]
        before = [cute.arch.warp_reduction(one if lane < warp else Int32(0), lambda a, b: a + b) for one in of_warp]
        if cutlass.const_expr(config.cluster > 1):
            of_block = [cute.arch.warp_reduction(one, lambda a, b: a + b) for one in of_warp]
            if thread < config.cluster:
                place = shared_address_of(shares) + rank * 8
                target = address_in_block(thread, place)
                store_cluster_word(target, of_block[0])
                store_cluster_word(target + 4, of_block[1])
            self.meet()
            for other in cutlass.range_constexpr(config.cluster):
                for one in cutlass.range_constexpr(2):
                    before[one] = before[one] + shares[2 * other + one] * Int32(other < rank)
        above, equal = before
        below = Uint32(cute.arch.lanemask_lt())
        for start in cutlass.range(begin, end, 32, unroll=1):
            place = start + lane
            inside = place < end
            word = self.score_at(held, row, first, cutlass.min(place, end - 1))
            is_above, is_equal = inside & (word > last), inside & (word == last)
            lanes_above, lanes_equal = lanes_where(is_above), lanes_where(is_equal)
            own_above = above + bits_set(lanes_above & below)
            own_equal = equal + bits_set(lanes_equal & below)
            if is_above | (is_equal & (own_equal < wanted)):
                entries[token, own_above + cutlass.min(own_equal, wanted)] = first + place
            above = above + bits_set(lanes_above)
            equal = equal + bits_set(lanes_equal)

    @cute.jit
    def score_at(self, held: cute.Tensor, row: cute.Tensor, first: Int32, place: Int32) -> Uint32:
        """Return a score of this block's share, from shared memory as far as it is there."""
        word = Uint32(0)
        if place < self.config.held:
            word = held[place]
        else:
            word = row[first + place]
        return word

    def meet(self):
        """Wait for all threads of the cluster."""
        if self.config.cluster > 1:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    def word_of(self, rank: int, address):
        """Return a word of a block of the cluster, by this block's own address of it."""
        return load_cluster_word(address_in_block(Int32(rank), address) if self.config.cluster > 1 else address)

    @cute.jit
    def sum_above(self, own: Int32, sums: cute.Tensor, thread: Int32, warp: Int32, lane: Int32) -> Int32:
        """Return, in each of the first BINS threads, the sum over the threads of them that follow it."""
        total = own
        for power in cutlass.range_constexpr(5):
            other = cute.arch.shuffle_sync_down(total, offset=1 << power)
            total = total + (other if lane + (1 << power) < 32 else Int32(0))
        if lane == 0:
            sums[warp] = total
        cute.arch.sync_threads()
        above = total - own
        for other in cutlass.range_constexpr(BINS // 32):
            above = above + sums[other] * Int32(other > warp)
        return above
