# SPDX-License-Identifier: Apache-2.0
"""Device side of kernels that stream a weight past a few tokens; parts/weight_stream.py says how work is shared out."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from megamoe.formats.fragment_layout import TILE_CODE_BYTES, TILE_COLUMNS, TILE_SCALE_BYTES
from megamoe.kernels.parts.fragment import plain_pair
from megamoe.kernels.parts.fragment_device import (
    block_scales,
    mma,
    multiply_bf16x2,
    select,
    swap_lanes,
    weight_fragment,
    word_of_quad,
)
from megamoe.kernels.parts.memory_device import (
    bulk_copy_if,
    expect_bytes_if,
    init_barrier,
    load_global_if,
    load_global_vector_if,
    load_shared,
    load_shared_float,
    publish_barriers,
    store_shared,
    store_shared_float,
    wait_barrier,
)
from megamoe.kernels.parts.weight_stream import MAX_SLOTS, PARTIAL_STRIDE, THREADS, TOKENS_PER_TILE, StreamPlan


class Ring:
    """Where a warp is in its ring: the slot to read next, and the parity its mbarrier will have when it is full."""

    def __init__(self, plan: StreamPlan, slot, parity):
        self.plan, self.slot, self.parity = plan, slot, parity

    def advance(self):
        """Go to the next slot."""
        following = self.slot + 1
        wrapped = Int32(following == self.plan.num_slots)
        self.slot = following - wrapped * self.plan.num_slots
        self.parity = self.parity ^ wrapped


class StreamThread:
    """This thread's part in streaming: its warp's slice and ring, its lane's place in fragments.

    Attributes:
        warp, lane: position in the block.
        row_group, slice: which row tiles the warp streams, and which part of their columns.
        row, column: g and t of formats/fragment_layout.py.
        first_chunk: first chunk of the warp's slice.
    """

    def __init__(self, plan: StreamPlan):
        tidx, _, _ = cute.arch.thread_idx()
        self.plan = plan
        self.tid = tidx
        self.warp = cute.arch.make_warp_uniform(tidx // 32)
        self.lane = tidx % 32
        self.row, self.column = self.lane // 4, self.lane % 4
        self.row_group = 0 if plan.row_groups == 1 else self.warp // plan.slices
        self.slice = self.warp - self.row_group * plan.slices
        self.first_chunk = cutlass.min(self.slice * plan.slice_chunks, plan.chunks - plan.slice_chunks)
        self.shared = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint()
        self.barriers = self.shared + self.warp * (MAX_SLOTS * 8)
        self.ring = self.shared + plan.ring_offset + self.warp * (plan.num_slots * plan.slot_bytes)
        self.token_area = (
            self.shared
            + plan.token_offset
            + self.warp * (plan.shared_tiles * plan.slice_chunks * TILE_COLUMNS * TOKENS_PER_TILE * 2)
        )
        self.is_issuer = (self.lane == 0) & (self.warp < plan.used_warps)
        self.tokens = cute.make_rmem_tensor(cute.make_layout((8, plan.slice_chunks, plan.register_tiles)), Uint32)

    def init_ring(self):
        """Make the warp's mbarriers ready; the copies into a slot are the only arrival."""
        self._init_barriers()
        publish_barriers()
        cute.arch.sync_warp()

    @cute.jit
    def _init_barriers(self):
        if self.lane == 0:
            for slot in cutlass.range_constexpr(self.plan.num_slots):
                init_barrier(self.barriers + slot * 8, Int32(1))

    def issue(self, wanted, slot, code_address, scale_address, stage: int):
        """Fill a slot with a stage of the slice that starts at the addresses (of the warp's first chunk)."""
        plan = self.plan
        num_chunks, before = plan.stage_chunks[stage], sum(plan.stage_chunks[:stage])
        code_bytes, scale_bytes = num_chunks * TILE_CODE_BYTES, num_chunks * TILE_SCALE_BYTES
        wanted = wanted & self.is_issuer
        barrier, target = self.barriers + slot * 8, self.ring + slot * plan.slot_bytes
        expect_bytes_if(wanted, barrier, Int32(code_bytes + scale_bytes))
        bulk_copy_if(wanted, target, code_address + before * TILE_CODE_BYTES, Int32(code_bytes), barrier)
        bulk_copy_if(
            wanted, target + code_bytes, scale_address + before * TILE_SCALE_BYTES, Int32(scale_bytes), barrier
        )

    def slice_addresses(self, codes, scales, row_chunk):
        """Return where the warp's slice of the row tile that starts at a chunk lies in codes and scales."""
        chunk = row_chunk + self.first_chunk
        return codes + chunk * TILE_CODE_BYTES, scales + chunk * TILE_SCALE_BYTES

    def request_tokens(self, load_raw, num_tokens):
        """Start loading the warp's slice of the tokens that are kept in registers.

        Args:
            load_raw: (tile, wanted, chunk) -> eight registers, to be arranged later.
            num_tokens: tokens of this pass; the others count as zero.
        """
        for tile in range(self.plan.register_tiles):
            for chunk in range(self.plan.slice_chunks):
                raw = self._raw_tokens(load_raw, num_tokens, tile, chunk)
                for index in range(8):
                    self.tokens[index, chunk, tile] = raw[index]

    def arrange_tokens(self, load_raw, arrange, num_tokens):
        """Finish what request_tokens started, and load the tokens that are kept in shared memory.

        Args:
            load_raw, num_tokens: as before.
            arrange: eight raw registers -> for each 16 columns the pairs at 2t and 2t + 8.
        """
        plan = self.plan
        for tile in range(plan.register_tiles):
            for chunk in range(plan.slice_chunks):
                pairs = arrange([self.tokens[index, chunk, tile] for index in range(8)])
                for index in range(8):
                    self.tokens[index, chunk, tile] = pairs[index]
        for tile in range(plan.register_tiles, plan.num_tiles):
            raw = [self._raw_tokens(load_raw, num_tokens, tile, chunk) for chunk in range(plan.slice_chunks)]
            for chunk in range(plan.slice_chunks):
                address, pairs = self._token_address(chunk, tile), arrange(raw[chunk])
                store_shared(address, *pairs[:4])
                store_shared(address + 512, *pairs[4:])

    def _raw_tokens(self, load_raw, num_tokens, tile: int, chunk: int):
        plan = self.plan
        wanted = tile * TOKENS_PER_TILE + self.row < num_tokens
        if plan.chunks % plan.slice_chunks:  # the last slice starts inside its neighbour's
            wanted = wanted & (self.first_chunk + chunk >= self.slice * plan.slice_chunks)
        return load_raw(tile, Int32(wanted), self.first_chunk + chunk)

    def _token_address(self, chunk: int, tile: int):
        position = (tile - self.plan.register_tiles) * self.plan.slice_chunks + chunk
        return self.token_area + position * 1024 + self.lane * 16

    def _token_pairs(self, chunk: int, tile: int):
        if tile < self.plan.register_tiles:
            return [self.tokens[index, chunk, tile] for index in range(8)]
        address = self._token_address(chunk, tile)
        return [*load_shared(address, 4), *load_shared(address + 512, 4)]

    def arrived(self, ring: Ring, num_chunks: int):
        """Wait for the stage that is to be read next; return where its codes and its scales are."""
        wait_barrier(self.barriers + ring.slot * 8, ring.parity)
        codes = self.ring + ring.slot * self.plan.slot_bytes
        return codes, codes + num_chunks * TILE_CODE_BYTES

    def consume(self, ring: Ring, accumulators, stage: int):
        """Multiply a stage with the tokens.

        Args:
            ring: where the stage is.
            accumulators: per token tile, four floats of the even steps and four of the odd ones; tiles without
                accumulators are left out.
            stage: index of the stage within the slice.

        Returns:
            The new accumulators.
        """
        plan = self.plan
        num_chunks, first = plan.stage_chunks[stage], sum(plan.stage_chunks[:stage])
        codes, scales = self.arrived(ring, num_chunks)
        codes, scales = codes + self.lane * 16, scales + self.row * 8

        def load(chunk):
            return (
                load_shared(codes + chunk * TILE_CODE_BYTES, 4),
                load_shared(scales + chunk * TILE_SCALE_BYTES, 2),
                [self._token_pairs(first + chunk, tile) for tile in range(len(accumulators))],
            )

        following = load(0)
        for chunk in range(num_chunks):
            words, scale_words, tokens = following
            if chunk + 1 < num_chunks:
                following = load(chunk + 1)
            upper, lower = block_scales(scale_words[0]), block_scales(scale_words[1])
            for step in range(4):
                fragment = weight_fragment(words[step], upper[step], lower[step])
                for tile in range(len(accumulators)):
                    accumulators[tile][step % 2] = mma(
                        accumulators[tile][step % 2], fragment, tokens[tile][2 * step], tokens[tile][2 * step + 1]
                    )
        return accumulators

    def zero_accumulators(self, num_tiles: int):
        """Return accumulators for `consume`."""
        return [[[Float32(0.0)] * 4, [Float32(0.0)] * 4] for _ in range(num_tiles)]

    def store_partials(self, unit, stream: int, accumulators):
        """Store the warp's sums of one of the unit's slices."""
        for tile in range(len(accumulators)):
            column = stream * self.plan.row_groups + self.row_group
            base = self._partials(unit) + self._partial(self.slice, column, tile * TOKENS_PER_TILE)
            base = base + (self.column * (2 * PARTIAL_STRIDE) + self.row) * 4
            even, odd = accumulators[tile]
            for index, offset in enumerate((0, PARTIAL_STRIDE, 8, PARTIAL_STRIDE + 8)):
                store_shared_float(base + offset * 4, even[index] + odd[index])

    def _partials(self, unit):
        plan = self.plan
        base = self.shared + plan.partial_offset
        return base if plan.partial_buffers == 1 else base + (unit & 1) * plan.partial_bytes

    def _partial(self, index, stream, token):
        plan = self.plan
        streams, tokens = plan.row_groups * plan.streams, plan.num_tiles * TOKENS_PER_TILE
        return ((index * streams + stream) * tokens + token) * (PARTIAL_STRIDE * 4)

    def output(self, unit):
        """Return which of the unit's outputs this thread adds; past the last one, none. Warps take turns."""
        return (self.tid - unit * self.plan.outputs_per_unit) & (THREADS - 1)

    def sum_partials(self, unit, stream, token, row):
        """Return the sum over the slices, in their order, for one token and row of a stream."""
        plan = self.plan
        total = Float32(0.0)
        address = self._partials(unit) + self._partial(0, stream, token) + row * 4
        step = self._partial(1, 0, 0)
        for index in range(plan.slices):
            total = total + load_shared_float(address + index * step)
        return total

    def before_partials(self):
        """Wait until the partial sums of the unit before may be overwritten."""
        if self.plan.partial_buffers == 1:
            cute.arch.sync_threads()

    def after_partials(self):
        """Wait until all partial sums of the unit are there."""
        cute.arch.sync_threads()


def transpose_quad(words, column):
    """Return word t of lane 0, 1, 2, 3 of the four lanes that share a row, given each lane's four words."""
    odd, high = column & 1, column & 2
    a, b, c, d = words
    kept0, kept1 = select(odd, b, a), select(odd, d, c)
    got0, got1 = swap_lanes(select(odd, a, b), 1), swap_lanes(select(odd, c, d), 1)
    a, b, c, d = select(odd, got0, kept0), select(odd, kept0, got0), select(odd, got1, kept1), select(odd, kept1, got1)
    kept0, kept1 = select(high, c, a), select(high, d, b)
    got0, got1 = swap_lanes(select(high, a, c), 2), swap_lanes(select(high, b, d), 2)
    return select(high, got0, kept0), select(high, got1, kept1), select(high, kept0, got0), select(high, kept1, got1)


def plain_tokens(x, num_columns: int, first_chunk: int, column, rows):
    """Return load_raw and arrange for bf16 tokens.

    Args:
        x: address of [rows, K] bf16.
        num_columns: K.
        first_chunk: where the columns that are multiplied start.
        column: t of the thread.
        rows: per token tile, the row of x that this thread loads (of any token where there is none).
    """

    def load_raw(tile, wanted, chunk):
        address = x + (Int64(rows[tile]) * num_columns + (first_chunk + chunk) * TILE_COLUMNS) * 2 + column * 16
        return [*load_global_vector_if(wanted, address, 4), *load_global_vector_if(wanted, address + 64, 4)]

    def arrange(raw):
        return [*transpose_quad(raw[:4], column), *transpose_quad(raw[4:], column)]

    return load_raw, arrange


def nvfp4_tokens(codes, scales, num_columns: int, first_chunk: int, column, rows):
    """Return load_raw and arrange for NVFP4 tokens: code * block scale * 2^-7, exact in bf16.

    Args:
        codes: address of [rows, K/2], row-major.
        scales: address of [rows, K/16], row-major.
        num_columns: K, a multiple of 64.
        first_chunk: where the columns that are multiplied start.
        column: t of the thread.
        rows: per token tile, the row that this thread loads.
    """

    def load_raw(tile, wanted, chunk):
        row, chunk = Int64(rows[tile]), first_chunk + chunk
        address = codes + row * (num_columns // 2) + chunk * (TILE_COLUMNS // 2) + column * 8
        words = load_global_vector_if(wanted, address, 2)  # lane t holds block t
        scale_word = load_global_if(wanted, scales + row * (num_columns // 16) + chunk * 4)
        return [*words, scale_word, *[scale_word] * 5]

    def arrange(raw):
        factors = block_scales(raw[2])
        pairs = []
        for block in range(4):
            for word in raw[:2]:
                byte = word_of_quad(word, block) >> (column * 8)
                pairs.append(multiply_bf16x2(plain_pair(byte, Uint32), factors[block]))
        return pairs

    return load_raw, arrange
