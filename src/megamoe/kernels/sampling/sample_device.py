# SPDX-License-Identifier: Apache-2.0
"""Device half of sample.

Tokens stand in the order of their logits from high to low, equal ones by their number. `find` looks for the first token
in this order at which the running sum exceeds a target: of ones (top-k) or of masses (top-p, the draw). A histogram
over the distance to the best logit says in which bin it is; the bin's range of logits is then divided until one token
is left, or tokens of one logit, whose masses are equal. What was cut away by a search stands behind what it found, so
that the next one looks at the same sums with a smaller target.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32
from cutlass.cute.arch import inline_ptx

from megamoe.kernels.parts.cluster_device import address_in_block, shared_address_of
from megamoe.kernels.parts.held_row import CLUSTER, HELD, THREADS, WARPS
from megamoe.kernels.parts.held_row_device import (
    add_shared_word,
    best_of_block,
    best_of_warp,
    halves,
    hold,
    load_cluster_word,
    locate,
    meet,
    share_of,
    store_cluster_vector,
    tell,
    whole,
    word_below,
)
from megamoe.kernels.parts.logits_device import (
    LEAST,
    NO_INDEX,
    ceiling_of_product,
    floor_of_product,
    order_of,
    symbolic_column,
    symbolic_logits,
)
from megamoe.kernels.parts.memory_device import store_global_long_if
from megamoe.kernels.parts.ptx_device import add, divide, multiply, subtract
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches
from megamoe.kernels.sampling.sample_config import BINS, DIGIT_BITS, FAR_BIN, LIMB_BITS, OCTAVE_BINS, Config

MASS_BITS = 40
LOG2_E = 1.4426950
EXP2_SERIES = (1.0, 0.69314718, 0.24022651, 0.055504109, 0.0096181291, 0.0013333558, 0.00015403530, 0.000015252734)
LEAST_OCTAVE = -64.0
FLOAT32_MAX = 3.4028234663852886e38
LIMB = (1 << LIMB_BITS) - 1
MEETINGS = {"best": 0, "rank": 1, "share": 2, "draw": 3, "locate": 4}
"""Parts of the shared memory in which blocks tell each other words."""
PLACE, COUNT = range(2)
BEFORE, INSIDE, REST = range(3)


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_rows = cute.sym_int32()
    logits = symbolic_logits(num_rows)
    temperature, top_p, min_p, uniform = (symbolic_column(Float32, num_rows) for _ in range(4))
    top_k, ids = (symbolic_column(Int64, num_rows) for _ in range(2))
    if config.has_min_p:
        return Sample(config).with_min_p, (logits, temperature, top_k, top_p, min_p, uniform, ids, current_stream())
    return Sample(config).plain, (logits, temperature, top_k, top_p, uniform, ids, current_stream())


def octaves_below(logit, best, factor):
    """Return how many octaves a token's mass lies from the best one's, 0 to -64."""
    return cute.arch.fmax(multiply(subtract(logit, best), factor), Float32(LEAST_OCTAVE))


def bin_of(octaves):
    """Return the bin of the first histogram; a smaller logit is never in a bin before a larger one's."""
    return inline_ptx(
        "cvt.rzi.s32.f32 {$w0}, {$r0};",
        write_only_types=[Int32],
        read_only_args=[multiply(octaves, Float32(-OCTAVE_BINS))],
    )


def mass_of(octaves):
    """Return floor(2^40 * 2^octaves) as ops/sample.py defines it, every step rounded on its own."""
    whole_octaves = inline_ptx("cvt.rni.f32.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[octaves])
    part = subtract(octaves, whole_octaves)
    value = Float32(EXP2_SERIES[-1])
    for coefficient in reversed(EXP2_SERIES[:-1]):
        value = add(multiply(value, part), Float32(coefficient))
    return inline_ptx(
        "{ .reg .s32 k; .reg .f32 power, x; cvt.rni.s32.f32 k, {$r1}; add.s32 k, k, 167; shl.b32 k, k, 23; "
        "mov.b32 power, k; mul.rn.f32 x, {$r0}, power; cvt.rzi.s64.f32 {$w0}, x; }",
        write_only_types=[Int64],
        read_only_args=[value, whole_octaves],
    )


def quotient(a, b):
    """Return a / b of int64 that are not negative, rounded down."""
    return inline_ptx("div.u64 {$w0}, {$r0}, {$r1};", write_only_types=[Int64], read_only_args=[a, b])


class Sample:
    """See ops/sample.py."""

    def __init__(self, config: Config):
        self.config = config

    @cute.jit
    def plain(self, logits, temperature, top_k, top_p, uniform, ids, stream):
        self.launch(logits, temperature, top_k, top_p, None, uniform, ids, stream)

    @cute.jit
    def with_min_p(self, logits, temperature, top_k, top_p, min_p, uniform, ids, stream):
        self.launch(logits, temperature, top_k, top_p, min_p, uniform, ids, stream)

    def launch(self, logits, temperature, top_k, top_p, min_p, uniform, ids, stream):
        self.kernel(logits, temperature, top_k, top_p, min_p, uniform, ids).launch(
            grid=(ids.shape[0] * CLUSTER, 1, 1),
            block=(THREADS, 1, 1),
            cluster=(CLUSTER, 1, 1),
            min_blocks_per_mp=2,
            preferred_smem_carveout=100,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, logits, temperature, top_k, top_p, min_p, uniform, ids):
        allocator = cutlass.memory.SmemAllocator()
        held = allocator.allocate_tensor(Float32, cute.make_layout(HELD), 16)
        merged = allocator.allocate_tensor(Int32, cute.make_layout(4 * BINS), 16)
        masses = allocator.allocate_tensor(Int64, cute.make_layout(WARPS))
        found_masses = allocator.allocate_tensor(Int64, cute.make_layout(3))
        counters = allocator.allocate_tensor(Int32, cute.make_layout(4 * BINS))
        sums = allocator.allocate_tensor(Int32, cute.make_layout(2 * WARPS))
        shares = allocator.allocate_tensor(Int32, cute.make_layout(2 * CLUSTER * len(MEETINGS)), 16)
        found = allocator.allocate_tensor(Int32, cute.make_layout(2))
        block, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        row, rank = block // CLUSTER, block % CLUSTER
        overlap_launches()
        num_columns = logits.shape[1]
        kept = Int32(cutlass.min(top_k[row], Int64(num_columns)))
        out = ids.iterator.toint() + Int64(row) * 8
        is_writer = (rank == 0) & (thread == 0)
        if kept < 0:
            store_global_long_if(is_writer, out, Int64(-1))
        else:
            cute.arch.cluster_arrive()
            first, count = share_of(num_columns, rank)
            row_address = logits[(row, None)].iterator.toint()
            order, index = hold(row_address + Int64(first) * 4, held, first, count, thread)
            order, index = best_of_block(order, index, sums)
            cute.arch.cluster_wait()  # all blocks run: from here on they may be written to
            order, index = best_of_warp(*tell(order, index, shares, MEETINGS["best"], rank, thread))
            heat = temperature[row]
            if heat > 0.0:
                least = Int64(0)
                if cutlass.const_expr(min_p is not None):
                    least = ceiling_of_product(min_p[row], Int64(2**MASS_BITS))
                factor = cute.arch.fmin(divide(Float32(LOG2_E), heat), Float32(FLOAT32_MAX))
                best = logits[row, index]
                parts = (held, counters, merged, sums, masses, shares, found, found_masses)
                who = (rank, thread, first, count)
                numbers = (best, factor, least, kept, top_p[row], uniform[row], index)
                self.draw(numbers, who, parts, num_columns, out)
            else:
                store_global_long_if(is_writer, out, Int64(index))

    @cute.jit
    def draw(self, numbers, who, parts, num_columns: Int32, out: Int64):
        """Store the token drawn from a row at an address."""
        best, factor, least, kept, top_p, uniform, index = numbers
        rank, thread, first, count = who
        held, counters, merged, sums, masses, shares, found, found_masses = parts
        address = shared_address_of(counters)
        clear(counters, thread)
        for place in cutlass.range(thread, count, THREADS, unroll=4):
            octaves = octaves_below(held[place], best, factor)
            number = bin_of(octaves)
            if number < FAR_BIN:
                count_token(address, number, octaves, least)
        bins = self.merge(who, parts)
        total = bins[4]
        of_thread = bins[:4]
        if (kept > 0) & (kept < num_columns):
            through, _, _, _, in_reach = self.find("rank", Int64(kept - 1), of_thread, numbers, who, parts)
            if in_reach > 0:
                total = through
        if top_p < 1.0:
            target = within(ceiling_of_product(top_p, total) - 1, total)
            through, _, _, _, in_reach = self.find("share", target, of_thread, numbers, who, parts)
            if in_reach > 0:
                total = through
        target = within(floor_of_product(uniform, total), total)
        _, low, high, wanted, in_reach = self.find("draw", target, of_thread, numbers, who, parts)
        if in_reach > 0:
            locate(low, high, wanted, held, first, count, sums, shares, MEETINGS["locate"], rank, thread, out)
        else:  # nothing has a mass: a row that the reference refuses
            store_global_long_if((rank == 0) & (thread == 0), out, Int64(index))

    @cute.jit
    def find(self, kind: cutlass.Constexpr, target: Int64, of_thread, numbers, who, parts):
        """Find the first token at which the running sum exceeds a target.

        Args:
            kind: "rank": the sum is of ones. "share", "draw": of masses.
            target: not negative.
            of_thread: what the first histogram has in this thread's bin and before it.
            numbers, who, parts: the row.

        Returns:
            The mass up to the token and with it; a range of orders that holds it (only for "draw"); which one of the
            tokens in this range it is; how many they are, 0 where the sum does not exceed the target.
        """
        best, factor, least = numbers[0], numbers[1], numbers[2]
        rank, thread, _, count = who
        held, counters, _, sums, _, shares, found, found_masses = parts
        address = shared_address_of(counters)
        pick(kind == "rank", target, *of_thread, thread, found, found_masses)
        place, inside = found[PLACE], found[COUNT]
        before, mass, rest = found_masses[BEFORE], found_masses[INSIDE], found_masses[REST]
        low, high, wanted, through = Int32(0), Int32(0), Int32(0), Int64(0)
        if place >= 0:
            low, high = Int32(NO_INDEX), Int32(LEAST)
            for one in cutlass.range(thread, count, THREADS, unroll=4):
                if bin_of(octaves_below(held[one], best, factor)) == place:
                    order = order_of(held[one])
                    low = cutlass.min(low, order)
                    high = cutlass.max(high, order)
            low, high = ends(low, high, sums, shares, MEETINGS[kind], rank, thread)
            while (inside > 1) & (low < high):
                span = Uint32(high) - Uint32(low)
                shift = cutlass.max(Int32(32 - DIGIT_BITS) - Int32(cute.arch.clz(span)), 0)
                clear(counters, thread)
                for one in cutlass.range(thread, count, THREADS, unroll=4):
                    order = order_of(held[one])
                    if (order >= low) & (order <= high):
                        digit = Int32((Uint32(high) - Uint32(order)) >> Uint32(shift))
                        count_token(address, digit, octaves_below(held[one], best, factor), least)
                bins = self.merge(who, parts)
                pick(kind == "rank", rest, *bins[:4], thread, found, found_masses)
                high = Int32(Uint32(high) - (Uint32(found[PLACE]) << Uint32(shift)))
                width = (Uint32(1) << Uint32(shift)) - Uint32(1)
                if Uint32(high) - Uint32(low) > width:
                    low = Int32(Uint32(high) - width)
                inside = found[COUNT]
                before = before + found_masses[BEFORE]
                mass, rest = found_masses[INSIDE], found_masses[REST]
            each = mass
            if inside > 1:
                each = quotient(mass, Int64(inside))
                if cutlass.const_expr(kind == "rank"):
                    wanted = Int32(rest)
                else:
                    wanted = Int32(quotient(rest, each))
            through = before + each * Int64(wanted + 1)
        else:
            inside = Int32(0)
        return through, low, high, wanted, inside

    @cute.jit
    def merge(self, who, parts):
        """Add the histograms of all blocks.

        Returns:
            Tokens and mass of this thread's bin, tokens and mass of the bins before it, and the mass of all.
        """
        rank, thread, _, _ = who
        _, counters, merged, sums, masses, _, _, _ = parts
        meet()
        # A block adds a share of the bins: lane % CLUSTER reads one block's, and then writes the sum to that block.
        number, other = rank * (BINS // CLUSTER) + thread // CLUSTER, thread % CLUSTER
        source = address_in_block(other, shared_address_of(counters) + number * 4)
        words = [load_cluster_word(source + limb * (BINS * 4)) for limb in range(4)]
        for power in cutlass.range_constexpr(3):
            words = [word + cute.arch.shuffle_sync_bfly(word, offset=1 << power) for word in words]
        tokens = words[0]
        mass = unsigned(words[1]) + (unsigned(words[2]) << LIMB_BITS) + (unsigned(words[3]) << (2 * LIMB_BITS))
        low, high = halves(mass)
        target = address_in_block(other, shared_address_of(merged) + number * 16)
        store_cluster_vector(target, tokens, low, high, Int32(0))
        meet()
        lane, warp = thread % 32, thread // 32
        tokens, mass = merged[4 * thread], whole(merged[4 * thread + 1], merged[4 * thread + 2])
        tokens_through, mass_through = tokens, mass
        for power in cutlass.range_constexpr(5):
            distance = 1 << power
            low, high = halves(mass_through)
            low, high, fewer = (
                word_below(low, distance),
                word_below(high, distance),
                word_below(tokens_through, distance),
            )
            if lane >= distance:
                tokens_through = tokens_through + fewer
                mass_through = mass_through + whole(low, high)
        if lane == 31:
            sums[warp] = tokens_through
            masses[warp] = mass_through
        cute.arch.sync_threads()
        tokens_before, mass_before, total = tokens_through - tokens, mass_through - mass, Int64(0)
        for one in cutlass.range_constexpr(WARPS):
            of_warp = masses[one]
            total = total + of_warp
            if one < warp:
                tokens_before = tokens_before + sums[one]
                mass_before = mass_before + of_warp
        cute.arch.sync_threads()  # the sums may be written again
        return tokens, mass, tokens_before, mass_before, total


def unsigned(word):
    """Return a word's 32 bits as an int64 that is not negative."""
    return whole(word, Int32(0))


def within(target, total):
    """Return a target that a running sum up to `total` exceeds, if that is not 0."""
    return cutlass.max(cutlass.min(target, total - 1), Int64(0))


@cute.jit
def clear(counters: cute.Tensor, thread: Int32):
    """Empty the bins of this block."""
    for start in cutlass.range_constexpr(0, 4 * BINS, THREADS):
        counters[start + thread] = Int32(0)
    cute.arch.sync_threads()


@cute.jit
def count_token(address: Int32, number: Int32, octaves: Float32, least: Int64):
    """Add a token and its mass, 0 below `least`, to a bin."""
    place = address + number * 4
    add_shared_word(place, Int32(1))
    mass = mass_of(octaves)
    if mass >= least:
        low, high = halves(mass)
        add_shared_word(place + BINS * 4, low & Int32(LIMB))
        add_shared_word(place + 2 * BINS * 4, Int32(Uint32(low) >> LIMB_BITS) & Int32(LIMB))
        add_shared_word(place + 3 * BINS * 4, Int32(Uint32(low) >> (2 * LIMB_BITS)) | (high << (32 - 2 * LIMB_BITS)))


@cute.jit
def pick(
    is_rank: cutlass.Constexpr,
    target: Int64,
    tokens: Int32,
    mass: Int64,
    tokens_before: Int32,
    mass_before: Int64,
    thread: Int32,
    found: cute.Tensor,
    found_masses: cute.Tensor,
):
    """Let the thread whose bin the target lies in say so; -1 is said where there is none."""
    cute.arch.sync_threads()  # what was found before may still be being read
    if thread == 0:
        found[PLACE] = Int32(-1)
    cute.arch.sync_threads()
    sum_before, own = mass_before, mass
    if cutlass.const_expr(is_rank):
        sum_before, own = Int64(tokens_before), Int64(tokens)
    is_here = Boolean((sum_before <= target) & (target < sum_before + own))
    if is_here:
        found[PLACE] = thread
        found[COUNT] = tokens
        found_masses[BEFORE] = mass_before
        found_masses[INSIDE] = mass
        found_masses[REST] = target - sum_before
    cute.arch.sync_threads()


@cute.jit
def ends(
    low: Int32,
    high: Int32,
    sums: cute.Tensor,
    shares: cute.Tensor,
    number: cutlass.Constexpr,
    rank: Int32,
    thread: Int32,
):
    """Return the least and the largest of the cluster."""
    lane, warp = thread % 32, thread // 32
    low, high = cute.arch.warp_redux_sync(low, "min"), cute.arch.warp_redux_sync(high, "max")
    if lane == 0:
        sums[warp] = low
        sums[WARPS + warp] = high
    cute.arch.sync_threads()
    low, high = sums[lane % WARPS], sums[WARPS + lane % WARPS]
    low, high = cute.arch.warp_redux_sync(low, "min"), cute.arch.warp_redux_sync(high, "max")
    low, high = tell(low, high, shares, number, rank, thread)
    return cute.arch.warp_redux_sync(low, "min"), cute.arch.warp_redux_sync(high, "max")
