# SPDX-License-Identifier: Apache-2.0
"""Device half of sample.

Tokens stand in the order of their logits from high to low, equal ones by their number. `select` finds the first token
in this order at which the running sum of weights exceeds a target. Weights are ones (top-k) or masses (top-p, a draw).
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass.cute.arch import inline_ptx

from megamoe.kernels.parts.logits_device import (
    ceiling_of_product,
    floor_of_product,
    order_of,
    row_best,
    symbolic_column,
    symbolic_logits,
)
from megamoe.kernels.parts.ptx_device import add, divide, multiply, subtract
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches
from megamoe.kernels.sampling.sample_config import BINS, DIGITS, INDEX_DIGITS, THREADS, Config

MASS_BITS = 40
LOG2_E = 1.4426950
EXP2_SERIES = (1.0, 0.69314718, 0.24022651, 0.055504109, 0.0096181291, 0.0013333558, 0.00015403530, 0.000015252734)
LEAST_OCTAVE = -64.0
FLOAT32_MAX = 3.4028234663852886e38
TARGET, BEFORE, PLACE, NUMBER = range(4)
"""Where shared memory keeps the target of a search, the sum before its bin, the bin, and the sum of all bins."""


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_rows = cute.sym_int32()
    logits = symbolic_logits(num_rows)
    temperature, top_p, min_p, uniform = (symbolic_column(Float32, num_rows) for _ in range(4))
    top_k, ids = (symbolic_column(Int64, num_rows) for _ in range(2))
    if config.has_min_p:
        return Sample(config).with_min_p, (logits, temperature, top_k, top_p, min_p, uniform, ids, current_stream())
    return Sample(config).plain, (logits, temperature, top_k, top_p, uniform, ids, current_stream())


def mass_of(logit, best, factor):
    """Return floor(2^40 * 2^((logit - best) * factor)) as ops/sample.py defines it, every step rounded on its own."""
    octaves = cute.arch.fmax(multiply(subtract(logit, best), factor), Float32(LEAST_OCTAVE))
    whole = inline_ptx("cvt.rni.f32.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[octaves])
    part = subtract(octaves, whole)
    value = Float32(EXP2_SERIES[-1])
    for coefficient in reversed(EXP2_SERIES[:-1]):
        value = add(multiply(value, part), Float32(coefficient))
    return inline_ptx(
        "{ .reg .s32 k; .reg .f32 power, x; cvt.rni.s32.f32 k, {$r1}; add.s32 k, k, 167; shl.b32 k, k, 23; "
        "mov.b32 power, k; mul.rn.f32 x, {$r0}, power; cvt.rzi.s64.f32 {$w0}, x; }",
        write_only_types=[Int64],
        read_only_args=[value, whole],
    )


def add_shared(address, value):
    """Add an int64 to shared memory."""
    inline_ptx("red.shared.add.u64 [{$r0}], {$r1};", read_only_args=[address, value])


class Sample:
    """See ops/sample.py."""

    def __init__(self, config: Config):
        self.config = config

    @cute.jit
    def plain(self, logits, temperature, top_k, top_p, uniform, ids, stream):
        self.kernel(logits, temperature, top_k, top_p, None, uniform, ids).launch(
            grid=(ids.shape[0], 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.jit
    def with_min_p(self, logits, temperature, top_k, top_p, min_p, uniform, ids, stream):
        self.kernel(logits, temperature, top_k, top_p, min_p, uniform, ids).launch(
            grid=(ids.shape[0], 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, logits, temperature, top_k, top_p, min_p, uniform, ids):
        row, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        shared = cutlass.memory.SmemAllocator()
        bins = shared.allocate_tensor(Int64, cute.make_layout(BINS), byte_alignment=16)
        found = shared.allocate_tensor(Int64, cute.make_layout(4))
        scratch = shared.allocate_tensor(Int32, cute.make_layout((2, THREADS // 32)))
        overlap_launches()
        kept = Int32(top_k[row])
        if kept < 0:
            if thread == 0:
                ids[row] = Int64(-1)
        else:
            order, index = row_best(logits, row, thread, THREADS, scratch)
            heat = temperature[row]
            if heat > 0.0:
                least = Int64(1)
                if cutlass.const_expr(min_p is not None):
                    least = ceiling_of_product(min_p[row], Int64(2**MASS_BITS))
                best = logits[row, index]
                factor = cute.arch.fmin(divide(Float32(LOG2_E), heat), Float32(FLOAT32_MAX))
                index = self.draw(logits, row, thread, best, factor, kept, top_p[row], least, uniform[row], bins, found)
            if thread == 0:
                ids[row] = Int64(index)

    @cute.jit
    def draw(
        self,
        logits,
        row: Int32,
        thread: Int32,
        best: Float32,
        factor: Float32,
        kept: Int32,
        share: Float32,
        least: Int64,
        number: Float32,
        bins,
        found,
    ) -> Int32:
        """Return the token drawn from a row."""
        last_key, last_index = Int32(-1), Int32(2**31 - 1)  # keys are compared as unsigned: -1 is the last of all
        some = (logits, row, thread, best, factor, least, bins, found)
        if (kept > 0) & (kept < logits.shape[1]):
            last_key, last_index = self.select("rank", Float32(0.0), Int64(kept - 1), last_key, last_index, some)
        if share < 1.0:
            last_key, last_index = self.select("share", share, Int64(0), last_key, last_index, some)
        _, index = self.select("draw", number, Int64(0), last_key, last_index, some)
        return index

    @cute.jit
    def select(
        self,
        kind: cutlass.Constexpr,
        fraction: Float32,
        rank: Int64,
        last_key: Int32,
        last_index: Int32,
        some,
    ):
        """Return key and number of the first token at which the running sum exceeds a target.

        Args:
            kind: "rank": ones, the target is `rank`. "share": masses, the target is one less than their share
                `fraction`. "draw": masses, the target is their share.
            fraction, rank: see kind.
            last_key, last_index: of the last token that is kept.
            some: the row and what its masses are made of.
        """
        logits, row, thread, best, factor, least, bins, found = some
        key, index, target = Int32(0), Int32(0), Int64(0)
        digits = [(True, *one) for one in DIGITS] + [(False, *one) for one in INDEX_DIGITS]
        for step in cutlass.range_constexpr(len(digits)):
            of_key, low, bits = digits[step]
            for first in cutlass.range_constexpr(0, BINS, THREADS):
                bins[first + thread] = Int64(0)
            cute.arch.sync_threads()
            for token in cutlass.range(thread, logits.shape[1], THREADS, unroll=2):
                logit = logits[row, token]
                own = ~order_of(logit) ^ Int32(-(2**31))  # as unsigned: the largest logit first
                is_kept = is_before(own, token, last_key, last_index)
                if cutlass.const_expr(of_key):
                    if cutlass.const_expr(step > 0):
                        is_kept = is_kept & (shifted(own, low + bits) == shifted(key, low + bits))
                else:
                    is_kept = is_kept & (own == key)
                    if cutlass.const_expr(step > len(DIGITS)):
                        is_kept = is_kept & (token >> (low + bits) == index >> (low + bits))
                if is_kept:
                    weight = Int64(1)
                    if cutlass.const_expr(kind != "rank"):
                        weight = mass_of(logit, best, factor)
                        if weight < least:
                            weight = Int64(0)
                    if weight > 0:
                        place = own if cutlass.const_expr(of_key) else token
                        number = shifted(place, low) & Int32((1 << bits) - 1)
                        add_shared((bins.iterator + number).toint(), weight)
            cute.arch.sync_threads()
            if thread < 32:
                self.find_bin(kind, fraction, rank, target, cutlass.const_expr(step == 0), thread, bins, found)
            cute.arch.sync_threads()
            target = found[TARGET] - found[BEFORE]
            digit = Int32(found[PLACE]) << low
            if cutlass.const_expr(of_key):
                key = key | digit
            else:
                index = index | digit
            cute.arch.sync_threads()
        return key, index

    @cute.jit
    def find_bin(
        self,
        kind: cutlass.Constexpr,
        fraction: Float32,
        rank: Int64,
        target: Int64,
        is_first: cutlass.Constexpr,
        lane: Int32,
        bins,
        found,
    ):
        """Let a warp find the first bin at which the running sum exceeds the target, which is below the whole sum."""
        per_lane = BINS // 32
        own = Int64(0)
        for number in cutlass.range(per_lane, unroll=4):
            own = own + bins[lane * per_lane + number]
        before, total = Int64(0), Int64(0)
        for other in cutlass.range_constexpr(32):
            theirs = shuffled(own, other)
            if other < lane:
                before = before + theirs
            total = total + theirs
        if cutlass.const_expr(is_first):
            if cutlass.const_expr(kind == "rank"):
                target = rank
            elif cutlass.const_expr(kind == "share"):
                target = ceiling_of_product(fraction, total) - 1
            else:
                target = floor_of_product(fraction, total)
        target = cutlass.max(cutlass.min(target, total - 1), Int64(0))
        if (before <= target) & (target < before + own):
            running, place, sum_before = before, Int32(-1), before
            for number in cutlass.range(per_lane, unroll=4):
                value = bins[lane * per_lane + number]
                if (place < 0) & (running + value > target):
                    place = lane * per_lane + number
                    sum_before = running
                running = running + value
            found[TARGET] = target
            found[BEFORE] = sum_before
            found[PLACE] = Int64(place)
        if (total == 0) & (lane == 0):  # nothing has a mass: a row that the reference refuses
            found[TARGET] = Int64(0)
            found[BEFORE] = Int64(0)
            found[PLACE] = Int64(0)


def shifted(word, bits: int):
    """Return an int32 shifted right, as unsigned."""
    if bits >= 32:
        return Int32(0)
    return Int32(Uint32(word) >> bits)


def is_before(key, index, last_key, last_index):
    """Return whether a token does not stand behind another one; keys are unsigned."""
    own, last = Uint32(key), Uint32(last_key)
    return (own < last) | ((own == last) & (index <= last_index))


def shuffled(value, lane: int):
    """Return a lane's int64."""
    return inline_ptx(
        "{ .reg .b32 low, high; mov.b64 {low, high}, {$r0}; "
        f"shfl.sync.idx.b32 low, low, {lane}, 31, -1; shfl.sync.idx.b32 high, high, {lane}, 31, -1; "
        "mov.b64 {$w0}, {low, high}; }",
        write_only_types=[Int64],
        read_only_args=[value],
    )
