# SPDX-License-Identifier: Apache-2.0
"""Device half of index_select.

A block selects for a token of few entries; of more, each block of a cluster has a contiguous share. A thread keeps its
scores in registers: 32 neighbouring ones are a warp's, and its next 32 follow them. Four passes of 8 bits find the
integer of the last score that is selected: each block counts its own, all read the counts of all. Then each warp counts
what lies above and at that score in its share, and writes its part of the result, which is in the order of entries as
the shares are. No score is the integer 0: it stands for none.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32

from megamoe.kernels.indexer.index_select_config import BINS, GROUP, HELD, HELD_BY_ONE, PASSES, SPAN, THREADS, Config
from megamoe.kernels.indexer.indexer_device import (
    bits_set,
    count_if,
    lanes_where,
    load_cluster_word,
    store_cluster_word,
    store_word_if,
)
from megamoe.kernels.parts.cluster_device import address_in_block, shared_address_of
from megamoe.kernels.parts.memory_device import load_global_if
from megamoe.kernels.parts.pool_device import symbolic_integers
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches, symbolic_rows

WARPS = THREADS // 32


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
        self.counts = allocator.allocate_tensor(Int32, cute.make_layout((BINS, PASSES)))
        self.sums = allocator.allocate_tensor(Int32, cute.make_layout(2 * WARPS))
        self.shares = allocator.allocate_tensor(Int32, cute.make_layout(2 * config.cluster))
        self.found = allocator.allocate_tensor(Int32, cute.make_layout(2))
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
        elif visible <= HELD_BY_ONE:
            if rank == 0:
                self.select(scores, entries, token, Int32(0), visible, thread, False, True)
        elif visible <= config.cluster * HELD * THREADS:
            self.select(scores, entries, token, rank, visible, thread, config.cluster > 1, True)
        else:
            self.select(scores, entries, token, rank, visible, thread, config.cluster > 1, False)

    @cute.jit
    def select(
        self,
        scores: cute.Tensor,
        entries: cute.Tensor,
        token: Int32,
        rank: Int32,
        visible: Int32,
        thread: Int32,
        spread: cutlass.Constexpr,
        held: cutlass.Constexpr,
    ):
        """Select for a token that sees more than top_k entries.

        Args:
            spread: all blocks of the cluster share the entries.
            held: a thread has registers for all its scores.
        """
        config = self.config
        counts, sums, shares, found = self.counts, self.sums, self.shares, self.found
        warp, lane = cute.arch.make_warp_uniform(thread // 32), thread % 32
        blocks = config.cluster if spread else 1
        span = (visible + (blocks * SPAN - 1)) // (blocks * SPAN) * SPAN
        first = rank * span
        count = cutlass.max(cutlass.min(visible - first, span), 0)
        share = (count + (THREADS - 1)) // THREADS * 32
        begin = cutlass.min(warp * share, count)
        end = cutlass.min(begin + share, count)
        source = scores[(token, None)].iterator.toint() + Int64(first + lane) * 4
        counters = shared_address_of(counts)

        words = cute.make_rmem_tensor(cute.make_layout(HELD if held else GROUP), Uint32)
        words.fill(0)
        if cutlass.const_expr(held):
            for group in cutlass.range_constexpr(0, HELD, GROUP):
                if group * 32 < share:
                    self.load(words, group, source, begin + group * 32, end - lane)
        for place in cutlass.range_constexpr(0, BINS * PASSES, THREADS):
            counts[(place + thread) % BINS, (place + thread) // BINS] = Int32(0)
        cute.arch.sync_threads()

        last, wanted = Uint32(0), Int32(config.top_k)
        for number in cutlass.range_constexpr(PASSES):
            area = counters + number * (BINS * 4)
            if cutlass.const_expr(held):
                for group in cutlass.range_constexpr(0, HELD, GROUP):
                    if group * 32 < share:
                        self.count(words, group, area, number, last)
            else:
                for start in cutlass.range(begin, end, GROUP * 32, unroll=1):
                    self.load(words, 0, source, start, end - lane)
                    self.count(words, 0, area, number, last)
            self.meet(spread)
            own = Int32(0)
            if thread < BINS:
                for other in cutlass.range_constexpr(blocks):
                    own = own + self.word_of(other, area + thread * 4, spread)
            above = self.sum_above(own, sums, thread, warp, lane)
            if (thread < BINS) & (above < wanted) & (wanted <= above + own):
                found[0] = thread
                found[1] = wanted - above
            cute.arch.sync_threads()
            last, wanted = (last << 8) | Uint32(found[0]), found[1]

        # What each warp has above the last score, and at it.
        num_above, num_equal = Int32(0), Int32(0)
        if cutlass.const_expr(held):
            for index in cutlass.range_constexpr(HELD):
                num_above = num_above + Int32(words[index] > last)
                num_equal = num_equal + Int32(words[index] == last)
        else:
            for start in cutlass.range(begin, end, GROUP * 32, unroll=1):
                self.load(words, 0, source, start, end - lane)
                for index in cutlass.range_constexpr(GROUP):
                    num_above = num_above + Int32(words[index] > last)
                    num_equal = num_equal + Int32(words[index] == last)
        num_above = cute.arch.warp_reduction(num_above, lambda a, b: a + b)
        num_equal = cute.arch.warp_reduction(num_equal, lambda a, b: a + b)
        if lane == 0:
            sums[warp] = num_above
            sums[WARPS + warp] = num_equal
        cute.arch.sync_threads()
        of_warp = [sums[lane], sums[WARPS + lane]]
        before = [cute.arch.warp_reduction(one if lane < warp else Int32(0), lambda a, b: a + b) for one in of_warp]
        if cutlass.const_expr(spread):
            of_block = [cute.arch.warp_reduction(one, lambda a, b: a + b) for one in of_warp]
            if thread < config.cluster:
                target = address_in_block(thread, shared_address_of(shares) + rank * 8)
                store_cluster_word(target, of_block[0])
                store_cluster_word(target + 4, of_block[1])
            self.meet(spread)
            for other in cutlass.range_constexpr(config.cluster):
                for one in cutlass.range_constexpr(2):
                    before[one] = before[one] + shares[2 * other + one] * Int32(other < rank)
        above, equal = before
        row = entries[(token, None)].iterator.toint()
        if cutlass.const_expr(held):
            for group in cutlass.range_constexpr(0, HELD, GROUP):
                if group * 32 < share:
                    start = first + begin + group * 32 + lane
                    above, equal = self.write(words, group, row, start, last, wanted, above, equal)
        else:
            for start in cutlass.range(begin, end, GROUP * 32, unroll=1):
                self.load(words, 0, source, start, end - lane)
                above, equal = self.write(words, 0, row, first + start + lane, last, wanted, above, equal)

    @cute.jit
    def load(self, words: cute.Tensor, group: cutlass.Constexpr, source: Int64, start: Int32, end: Int32):
        """Read a group of scores of each lane, 0 past the end."""
        for index in cutlass.range_constexpr(GROUP):
            place = start + index * 32
            words[group + index] = load_global_if(Int32(place < end), source + Int64(place) * 4)

    @cute.jit
    def count(
        self,
        words: cute.Tensor,
        group: cutlass.Constexpr,
        area: Int32,
        number: cutlass.Constexpr,
        last: Uint32,
    ):
        """Count a group's scores that begin with the bits found so far by their next 8 bits."""
        shift = 24 - 8 * number
        for index in cutlass.range_constexpr(GROUP):
            word = words[group + index]
            address = area + Int32((word >> shift) & Uint32(BINS - 1)) * 4
            count_if(word != 0 if number == 0 else word >> (shift + 8) == last, address)

    @cute.jit
    def write(
        self,
        words: cute.Tensor,
        group: cutlass.Constexpr,
        row: Int64,
        start: Int32,
        last: Uint32,
        wanted: Int32,
        above: Int32,
        equal: Int32,
    ):
        """Write a group's selected entries; returns how many above the last score and at it lie before the next one."""
        below = Uint32(cute.arch.lanemask_lt())
        highest = cutlass.max(words[group], words[group + 1])
        for index in cutlass.range_constexpr(2, GROUP):
            highest = cutlass.max(highest, words[group + index])
        if lanes_where(highest >= last) != 0:
            for index in cutlass.range_constexpr(GROUP):
                word = words[group + index]
                lanes_above, lanes_equal = lanes_where(word > last), lanes_where(word == last)
                own_above = above + bits_set(lanes_above & below)
                own_equal = equal + bits_set(lanes_equal & below)
                chosen = (word > last) | ((word == last) & (own_equal < wanted))
                place = own_above + cutlass.min(own_equal, wanted)
                store_word_if(chosen, row + Int64(place) * 4, start + index * 32)
                above = above + bits_set(lanes_above)
                equal = equal + bits_set(lanes_equal)
        return above, equal

    def meet(self, spread: bool):
        """Wait for all threads of the cluster, or of the block."""
        if spread:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    def word_of(self, rank: int, address, spread: bool):
        """Return a word of a block of the cluster, by this block's own address of it."""
        return load_cluster_word(address_in_block(Int32(rank), address) if spread else address)

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
