# SPDX-License-Identifier: Apache-2.0
"""Device half of index_select.

A cluster selects for one token; each block has a contiguous share of the entries. 32 neighbouring ones are a warp's,
its next 32 follow them, and a thread has registers for all its scores. The top_k-th of the largest scores of groups
of 8 is a bound that top_k scores reach: its upper 16 bits are found by two passes of 8 bits, each block counting its
own and reading the counts of all. Few scores reach the bound. They go to the first block in the order of entries,
which finds the last selected score by four passes of 8 bits, and writes what lies above it and at it. Where too many
reach the bound, many being equal, or where a block has more entries than registers, the four passes go over all
scores. No score is the integer 0: it stands for none.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32

from megamoe.kernels.indexer.index_select_config import (
    BINS,
    BOUND_PASSES,
    GROUP,
    HELD,
    MAX_CANDIDATES,
    PASSES,
    SPAN,
    THREADS,
    Config,
)
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
        self.counts = allocator.allocate_tensor(Int32, cute.make_layout((BINS, BOUND_PASSES + PASSES)))
        self.sums = allocator.allocate_tensor(Int32, cute.make_layout(2 * WARPS))
        self.shares = allocator.allocate_tensor(Int32, cute.make_layout(2 * config.cluster))
        self.found = allocator.allocate_tensor(Int32, cute.make_layout(2))
        self.best = allocator.allocate_tensor(Uint32, cute.make_layout(MAX_CANDIDATES))
        self.best_entries = allocator.allocate_tensor(Int32, cute.make_layout(MAX_CANDIDATES))
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
            self.select(scores, entries, token, rank, visible, thread)

    @cute.jit
    def select(
        self, scores: cute.Tensor, entries: cute.Tensor, token: Int32, rank: Int32, visible: Int32, thread: Int32
    ):
        """Select for a token that sees more than top_k entries."""
        blocks = self.config.cluster
        counts = self.counts
        warp, lane = cute.arch.make_warp_uniform(thread // 32), thread % 32
        span = (visible + (blocks * SPAN - 1)) // (blocks * SPAN) * SPAN
        first = rank * span
        count = cutlass.max(cutlass.min(visible - first, span), 0)
        share = (count + (THREADS - 1)) // THREADS * 32
        begin = cutlass.min(warp * share, count)
        end = cutlass.min(begin + share, count)
        source = scores[(token, None)].iterator.toint() + Int64(first + lane) * 4
        row = entries[(token, None)].iterator.toint()
        for start in cutlass.range_constexpr(0, BINS * (BOUND_PASSES + PASSES), THREADS):
            place = start + thread
            if place < BINS * (BOUND_PASSES + PASSES):
                counts[place % BINS, place // BINS] = Int32(0)
        total = Int32(MAX_CANDIDATES + 1)
        if span <= HELD * THREADS:  # the same for the whole cluster
            total = self.gather(source, share, begin, end, first, rank, thread, warp, lane)
        if total <= MAX_CANDIDATES:
            if rank == 0:
                self.select_best(row, total, thread, warp, lane)
        else:
            self.select_of_all(source, row, begin, end, first, rank, thread, warp, lane)

    @cute.jit
    def gather(
        self,
        source: Int64,
        share: Int32,
        begin: Int32,
        end: Int32,
        first: Int32,
        rank: Int32,
        thread: Int32,
        warp: Int32,
        lane: Int32,
    ) -> Int32:
        """Bring scores that may be selected to the first block and return how many they are, or would be."""
        config = self.config
        words = cute.make_rmem_tensor(cute.make_layout(HELD), Uint32)
        words.fill(0)
        for group in cutlass.range_constexpr(0, HELD, GROUP):
            if group * 32 < share:
                self.load(words, group, source, begin + group * 32, end - lane)
        cute.arch.sync_threads()  # counters are zero
        highest = cute.make_rmem_tensor(cute.make_layout(HELD // GROUP), Uint32)
        for group in cutlass.range_constexpr(HELD // GROUP):
            largest = words[group * GROUP]
            for index in cutlass.range_constexpr(1, GROUP):
                largest = cutlass.max(largest, words[group * GROUP + index])
            highest[group] = largest
        last, wanted = Uint32(0), Int32(config.top_k)
        for number in cutlass.range(BOUND_PASSES, unroll=1):
            area = shared_address_of(self.counts) + number * (BINS * 4)
            for group in cutlass.range_constexpr(HELD // GROUP):
                counted = Int32(group == 0) | Int32(group * (GROUP * 32) < share)
                self.count(highest[group], counted != 0, area, 24 - 8 * number, last)
            last, wanted = self.descend(area, last, wanted, True, thread, warp, lane)
        bound = cutlass.max(last << (32 - 8 * BOUND_PASSES), Uint32(1))

        reach = Int32(0)
        for index in cutlass.range_constexpr(HELD):
            reach = reach + Int32(words[index] >= bound)
        before, total = self.share_out([reach], True, rank, thread, warp, lane)
        place, num_candidates = before[0], total[0]
        if num_candidates <= MAX_CANDIDATES:
            best, best_entries = shared_address_of(self.best), shared_address_of(self.best_entries)
            if cutlass.const_expr(config.cluster > 1):
                best, best_entries = address_in_block(Int32(0), best), address_in_block(Int32(0), best_entries)
            below = Uint32(cute.arch.lanemask_lt())
            for index in cutlass.range_constexpr(HELD):
                lanes = lanes_where(words[index] >= bound)
                if lanes != 0:
                    own = (place + bits_set(lanes & below)) * 4
                    entry = first + begin + index * 32 + lane
                    if words[index] >= bound:
                        store_cluster_word(best + own, words[index])
                        store_cluster_word(best_entries + own, entry)
                    place = place + bits_set(lanes)
            self.meet(True)
        return num_candidates

    @cute.jit
    def select_best(self, row: Int64, total: Int32, thread: Int32, warp: Int32, lane: Int32):
        """Select among the candidates of the first block."""
        held = MAX_CANDIDATES // THREADS
        best, best_entries = self.best, self.best_entries
        share = (total + (THREADS - 1)) // THREADS * 32
        begin = warp * share
        end = cutlass.min(begin + share, total)
        words = cute.make_rmem_tensor(cute.make_layout(held), Uint32)
        words.fill(0)
        for index in cutlass.range_constexpr(held):
            place = begin + index * 32 + lane
            if place < end:
                words[index] = best[place]
        last, wanted = Uint32(0), Int32(self.config.top_k)
        for number in cutlass.range(PASSES, unroll=1):  # rolled up: code that is met once comes from memory
            area = shared_address_of(self.counts) + (BOUND_PASSES + number) * (BINS * 4)
            for index in cutlass.range_constexpr(held):
                if index * 32 < share:
                    self.count(words[index], words[index] != 0, area, 24 - 8 * number, last)
            last, wanted = self.descend(area, last, wanted, False, thread, warp, lane)
        num_above, num_equal = Int32(0), Int32(0)
        for index in cutlass.range_constexpr(held):
            num_above = num_above + Int32(words[index] > last)
            num_equal = num_equal + Int32(words[index] == last)
        before, _ = self.share_out([num_above, num_equal], False, Int32(0), thread, warp, lane)
        above, equal = before
        for start in cutlass.range(begin, end, 32, unroll=1):
            place = cutlass.min(start + lane, MAX_CANDIDATES - 1)
            word = best[place] if start + lane < end else Uint32(0)
            above, equal = self.write(word, row, best_entries[place], last, wanted, above, equal)

    @cute.jit
    def select_of_all(
        self,
        source: Int64,
        row: Int64,
        begin: Int32,
        end: Int32,
        first: Int32,
        rank: Int32,
        thread: Int32,
        warp: Int32,
        lane: Int32,
    ):
        """Select among all scores, which are read in every pass."""
        words = cute.make_rmem_tensor(cute.make_layout(GROUP), Uint32)
        cute.arch.sync_threads()
        last, wanted = Uint32(0), Int32(self.config.top_k)
        for number in cutlass.range(PASSES, unroll=1):  # rolled up: code that is met once comes from memory
            area = shared_address_of(self.counts) + (BOUND_PASSES + number) * (BINS * 4)
            for start in cutlass.range(begin, end, GROUP * 32, unroll=1):
                self.load(words, 0, source, start, end - lane)
                for index in cutlass.range_constexpr(GROUP):
                    self.count(words[index], words[index] != 0, area, 24 - 8 * number, last)
            last, wanted = self.descend(area, last, wanted, True, thread, warp, lane)
        num_above, num_equal = Int32(0), Int32(0)
        for start in cutlass.range(begin, end, GROUP * 32, unroll=1):
            self.load(words, 0, source, start, end - lane)
            for index in cutlass.range_constexpr(GROUP):
                num_above = num_above + Int32(words[index] > last)
                num_equal = num_equal + Int32(words[index] == last)
        before, _ = self.share_out([num_above, num_equal], True, rank, thread, warp, lane)
        above, equal = before
        for start in cutlass.range(begin, end, GROUP * 32, unroll=1):
            self.load(words, 0, source, start, end - lane)
            for index in cutlass.range_constexpr(GROUP):
                entry = first + start + index * 32 + lane
                above, equal = self.write(words[index], row, entry, last, wanted, above, equal)

    @cute.jit
    def load(self, words: cute.Tensor, group: cutlass.Constexpr, source: Int64, start: Int32, end: Int32):
        """Read a group of scores of each lane, 0 past the end."""
        for index in cutlass.range_constexpr(GROUP):
            place = start + index * 32
            words[group + index] = load_global_if(Int32(place < end), source + Int64(place) * 4)

    def count(self, word, counted, area, shift, last):
        """Count a score that begins with the bits found so far by the 8 bits from `shift` on."""
        alike = counted & ((word >> shift) >> 8 == last)
        count_if(alike, area + Int32((word >> shift) & Uint32(BINS - 1)) * 4)

    @cute.jit
    def descend(
        self,
        area: Int32,
        last: Uint32,
        wanted: Int32,
        spread: cutlass.Constexpr,
        thread: Int32,
        warp: Int32,
        lane: Int32,
    ):
        """Return the bits of the last selected score, 8 more than before, and which one of those alike it is."""
        found = self.found
        self.meet(spread)
        own = Int32(0)
        if thread < BINS:
            for other in cutlass.range_constexpr(self.config.cluster if spread else 1):
                own = own + self.word_of(other, area + thread * 4, spread)
        above = self.sum_above(own, self.sums, thread, warp, lane)
        if (thread < BINS) & (above < wanted) & (wanted <= above + own):
            found[0] = thread
            found[1] = wanted - above
        cute.arch.sync_threads()
        return (last << 8) | Uint32(found[0]), found[1]

    def share_out(self, own, spread: bool, rank, thread, warp, lane):
        """Return the sums of counts over the warps before this one, and over all."""
        sums = self.sums
        reduced = [cute.arch.warp_reduction(one, lambda a, b: a + b) for one in own]
        self.store_counts(reduced, warp, lane)
        cute.arch.sync_threads()
        of_warp = [sums[index * WARPS + lane] for index in range(len(own))]
        before = [cute.arch.warp_reduction(one * Int32(lane < warp), lambda a, b: a + b) for one in of_warp]
        total = [cute.arch.warp_reduction(one, lambda a, b: a + b) for one in of_warp]
        if spread and self.config.cluster > 1:
            self.send_counts(total, rank, thread)
            self.meet(True)
            blocks = range(self.config.cluster)
            for index in range(len(own)):
                shares = [self.shares[2 * other + index] for other in blocks]
                for other in blocks:
                    before[index] = before[index] + shares[other] * Int32(other < rank)
                total[index] = shares[0]
                for other in blocks[1:]:
                    total[index] = total[index] + shares[other]
        return before, total

    @cute.jit
    def store_counts(self, counts: list, warp: Int32, lane: Int32):
        """Let one lane store the counts of its warp."""
        sums = self.sums
        if lane == 0:
            for index in cutlass.range_constexpr(len(counts)):
                sums[index * WARPS + warp] = counts[index]

    @cute.jit
    def send_counts(self, counts: list, rank: Int32, thread: Int32):
        """Store the counts of this block to every block of the cluster."""
        shares = shared_address_of(self.shares)
        if thread < self.config.cluster:
            target = address_in_block(thread, shares + rank * 8)
            for index in cutlass.range_constexpr(len(counts)):
                store_cluster_word(target + 4 * index, counts[index])

    @cute.jit
    def write(self, word: Uint32, row: Int64, entry: Int32, last: Uint32, wanted: Int32, above: Int32, equal: Int32):
        """Write an entry if it is selected; returns how many above the last score and at it come before the next."""
        below = Uint32(cute.arch.lanemask_lt())
        lanes_above, lanes_equal = lanes_where(word > last), lanes_where(word == last)
        own_above = above + bits_set(lanes_above & below)
        own_equal = equal + bits_set(lanes_equal & below)
        chosen = (word > last) | ((word == last) & (own_equal < wanted))
        place = own_above + cutlass.min(own_equal, wanted)
        store_word_if(chosen, row + Int64(place) * 4, entry)
        return above + bits_set(lanes_above), equal + bits_set(lanes_equal)

    def meet(self, spread: bool):
        """Wait for all threads of the cluster, or of the block."""
        if spread and self.config.cluster > 1:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    def word_of(self, rank: int, address, spread: bool):
        """Return a word of a block of the cluster, by this block's own address of it."""
        is_far = spread and self.config.cluster > 1
        return load_cluster_word(address_in_block(Int32(rank), address) if is_far else address)

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
