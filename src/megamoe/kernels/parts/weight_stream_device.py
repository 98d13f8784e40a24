# SPDX-License-Identifier: Apache-2.0
"""Device side of kernels that stream a weight past a few tokens; parts/weight_stream.py says how work is shared out."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from megamoe.formats.fragment_layout import TILE_CODE_BYTES, TILE_COLUMNS, TILE_SCALE_BYTES
from megamoe.kernels.parts.fragment_device import block_scales, mma, multiply_bf16x2, plain_pair, weight_fragment
from megamoe.kernels.parts.memory_device import (
    bulk_copy_if,
    expect_bytes_if,
    init_barrier,
    load_global_if,
    load_shared,
    load_shared_float,
    publish_barriers,
    store_shared,
    store_shared_float,
    wait_barrier,
)
from megamoe.kernels.parts.weight_stream import (
    MAX_SLOTS,
    PARTIAL_STRIDE,
    TOKENS_PER_TILE,
    StreamPlan,
)


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
        self.first_chunk = cutlass.min(self.warp * plan.slice_chunks, plan.chunks - plan.slice_chunks)
        self.shared = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint()
        self.barriers = self.shared + self.warp * (MAX_SLOTS * 8)
        self.ring = self.shared + plan.ring_offset + self.warp * (plan.num_slots * plan.slot_bytes)
        self.token_area = (
            self.shared
            + plan.token_offset
            + self.warp * (plan.shared_tiles * plan.slice_chunks * TILE_COLUMNS * TOKENS_PER_TILE * 2)
        )
        self.is_issuer = (self.lane == 0) & (self.warp < plan.used_warps)
        self.tokens = cute.make_rmem_tensor(
            cute.make_layout((8, plan.slice_chunks, plan.register_tiles)), Uint32
        )

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

    def load_tokens(self, load_pairs, num_tokens):
        """Load the warp's slice of every token.

        Args:
            load_pairs: (token, wanted, chunk) -> eight registers: for each 16 columns the pairs at 2t and 2t + 8.
            num_tokens: tokens of this pass; the others count as zero.
        """
        plan = self.plan
        for tile in range(plan.num_tiles):
            token = tile * TOKENS_PER_TILE + self.row
            for chunk in range(plan.slice_chunks):
                wanted = token < num_tokens
                if plan.chunks % plan.slice_chunks:  # the last slice starts inside its neighbour's
                    wanted = wanted & (self.first_chunk + chunk >= self.warp * plan.slice_chunks)
                pairs = load_pairs(token, Int32(wanted), self.first_chunk + chunk)
                if tile < plan.register_tiles:
                    for index in range(8):
                        self.tokens[index, chunk, tile] = pairs[index]
                else:
                    address = self._token_address(chunk, tile)
                    store_shared(address, *pairs[:4])
                    store_shared(address + 512, *pairs[4:])

    def _token_address(self, chunk: int, tile: int):
        position = (tile - self.plan.register_tiles) * self.plan.slice_chunks + chunk
        return self.token_area + position * 1024 + self.lane * 16

    def _token_pairs(self, chunk: int, tile: int):
        if tile < self.plan.register_tiles:
            return [self.tokens[index, chunk, tile] for index in range(8)]
        address = self._token_address(chunk, tile)
        return [*load_shared(address, 4), *load_shared(address + 512, 4)]

    def consume(self, ring: Ring, accumulators, stage: int):
        """Multiply a stage with the tokens.

        Args:
            ring: where the stage is.
            accumulators: per token tile, four floats.
            stage: index of the stage within the slice.

        Returns:
            The new accumulators.
        """
        plan = self.plan
        num_chunks, first = plan.stage_chunks[stage], sum(plan.stage_chunks[:stage])
        wait_barrier(self.barriers + ring.slot * 8, ring.parity)
        codes = self.ring + ring.slot * plan.slot_bytes
        code_address, scale_address = codes + self.lane * 16, codes + num_chunks * TILE_CODE_BYTES + self.row * 8
        for chunk in range(num_chunks):
            words = load_shared(code_address + chunk * TILE_CODE_BYTES, 4)
            scale_words = load_shared(scale_address + chunk * TILE_SCALE_BYTES, 2)
            upper, lower = block_scales(scale_words[0]), block_scales(scale_words[1])
            tokens = [self._token_pairs(first + chunk, tile) for tile in range(plan.num_tiles)]
            for step in range(4):
                fragment = weight_fragment(words[step], upper[step], lower[step])
                for tile in range(plan.num_tiles):
                    accumulators[tile] = mma(
                        accumulators[tile], fragment, tokens[tile][2 * step], tokens[tile][2 * step + 1]
                    )
        return accumulators

    def store_partials(self, weight: int, accumulators):
        """Store the warp's sums of a row tile of one of the weights."""
        plan = self.plan
        for tile in range(plan.num_tiles):
            base = self.shared + plan.partial_offset + self._partial(self.warp, weight, tile * TOKENS_PER_TILE)
            base = base + (self.column * (2 * PARTIAL_STRIDE) + self.row) * 4
            store_shared_float(base, accumulators[tile][0])
            store_shared_float(base + PARTIAL_STRIDE * 4, accumulators[tile][1])
            store_shared_float(base + 8 * 4, accumulators[tile][2])
            store_shared_float(base + (PARTIAL_STRIDE + 8) * 4, accumulators[tile][3])

    def _partial(self, warp, weight: int, token):
        plan = self.plan
        return ((warp * plan.num_weights + weight) * (plan.num_tiles * TOKENS_PER_TILE) + token) * (PARTIAL_STRIDE * 4)

    def sum_partials(self, weight: int, token, row):
        """Return the sum over the warps, in their order, for one token and row of the tile."""
        plan = self.plan
        total = Float32(0.0)
        address = self.shared + plan.partial_offset + self._partial(0, weight, token) + row * 4
        step = plan.num_weights * plan.num_tiles * TOKENS_PER_TILE * PARTIAL_STRIDE * 4
        for warp in range(plan.used_warps):
            total = total + load_shared_float(address + warp * step)
        return total


def plain_token_loader(x, num_columns: int, first_chunk: int, column, row_of):
    """Return load_pairs for bf16 tokens.

    Args:
        x: address of [rows, K] bf16.
        num_columns: K.
        first_chunk: where the columns that are multiplied start.
        column: t of the thread.
        row_of: token of the pass -> row of x.
    """

    def load_pairs(token, wanted, chunk):
        address = x + (Int64(row_of(token)) * num_columns + (first_chunk + chunk) * TILE_COLUMNS) * 2 + column * 4
        return [load_global_if(wanted, address + index * 16) for index in range(8)]

    return load_pairs


def nvfp4_token_loader(codes, scales, num_columns: int, first_chunk: int, column, row_of):
    """Return load_pairs for NVFP4 tokens: code * block scale * 2^-7, exact in bf16.

    Args:
        codes: address of [rows, K/2], row-major.
        scales: address of [rows, K/16], row-major.
        num_columns: K, a multiple of 64.
        first_chunk: where the columns that are multiplied start.
        column: t of the thread.
        row_of: token of the pass -> row.
    """

    def load_pairs(token, wanted, chunk):
        row, chunk = Int64(row_of(token)), first_chunk + chunk
        code_address = codes + row * (num_columns // 2) + chunk * (TILE_COLUMNS // 2) + column
        factors = block_scales(load_global_if(wanted, scales + row * (num_columns // 16) + chunk * 4))
        pairs = [plain_pair(load_global_if(wanted, code_address + index * 4, 8)) for index in range(8)]
        return [multiply_bf16x2(pair, factors[index // 2]) for index, pair in enumerate(pairs)]

    return load_pairs
