# SPDX-License-Identifier: Apache-2.0
"""Device half of index_scores on Hopper.

wgmma with keys on M, decoded into registers, and heads on N, decoded into shared memory once a block. Lane l = 4 g + t
has the 32 channels from 32 t on (one group of FP4) of keys g and g + 8 of its warp's 16; the query's channels stand in
shared memory in the order in which the instruction meets those. Every warp brings its keys through a ring of its own,
each lane what it reads itself, so that no thread waits for another one but for the instruction.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.nvgpu import warpgroup
from cutlass.cute.runtime import make_fake_tensor
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers

from megamoe.kernels.fp8.fp8_device import commit_copies, load_two_floats, wait_copies
from megamoe.kernels.indexer.index_scores_sm90_config import (
    GROUP_WARPS,
    GROUPS,
    STAGE_BYTES,
    STAGES,
    TILE,
    WARP_KEYS,
    Config,
)
from megamoe.kernels.indexer.indexer_device import (
    copy_vector,
    copy_word,
    e2m1_pairs,
    load_global_byte,
    load_shared_byte,
    ordered_bits,
    publish_to_products,
    quotient,
    relative_factor,
    scale_value,
    top_of_row,
)
from megamoe.kernels.parts.cluster_device import shared_address_of
from megamoe.kernels.parts.memory_device import load_global_vector_if, load_shared, store_shared, store_shared_float
from megamoe.kernels.parts.pool_device import row_bytes, symbolic_integers, symbolic_pool
from megamoe.kernels.parts.ptx_device import add, fma, magnitude, multiply
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches, symbolic_heads, symbolic_rows

WIDTH = 128
HALF = 64
"""Channels of a row of the swizzled layout."""
LANE_BYTES = 16
DATA_BYTES, SCALE_BYTES = row_bytes("index_fp4", WIDTH)
WORDS = 4
WARPS = GROUPS * GROUP_WARPS
THREADS = 32 * WARPS


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens = cute.sym_int32()
    arguments = (
        symbolic_heads(Uint8, num_tokens, config.heads, DATA_BYTES),
        make_fake_tensor(Uint8, (num_tokens, config.heads, SCALE_BYTES), (cute.sym_int64(), cute.sym_int64(), 1)),
        symbolic_rows(Float32, num_tokens, config.heads),
        symbolic_pool(),
        symbolic_integers(Int32, cute.sym_int32(), cute.sym_int32()),
        symbolic_integers(Int32, num_tokens),
        symbolic_integers(Int32, num_tokens),
        symbolic_rows(Uint32, num_tokens, cute.sym_int32()),
        *(Int32(0) for _ in range(4)),
        current_stream(),
    )
    return IndexScores(config), arguments


class IndexScores:
    """scores[t, w] = ordered_bits(sum_h head_weights[t, h] * max(q[t, h] . key[w], 0)) where they decide anything."""

    def __init__(self, config: Config):
        self.config = config

    @cute.jit
    def __call__(
        self,
        codes: cute.Tensor,
        scales: cute.Tensor,
        weights: cute.Tensor,
        keys: cute.Tensor,
        tables: cute.Tensor,
        requests: cute.Tensor,
        num_visible: cute.Tensor,
        scores: cute.Tensor,
        rows_per_block: Int32,
        inverse: Int32,
        top_k: Int32,
        splits: Int32,
        stream,
    ):
        config = self.config
        mma = hopper_helpers.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            warpgroup.OperandMajorMode.K,
            warpgroup.OperandMajorMode.K,
            Float32,
            (1, 1, 1),
            (TILE, config.heads),
            warpgroup.OperandSource.RMEM,
        )
        layout = hopper_helpers.make_smem_layout_b(
            LayoutEnum.ROW_MAJOR, (TILE, config.heads, HALF), BFloat16, WIDTH // HALF
        )
        self.kernel(
            mma,
            layout,
            codes,
            scales,
            weights,
            keys,
            tables,
            requests,
            num_visible,
            scores,
            rows_per_block,
            inverse,
            top_k,
            splits,
        ).launch(
            grid=(scores.shape[0] * splits, 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        layout: cute.ComposedLayout,
        codes: cute.Tensor,
        scales: cute.Tensor,
        weights: cute.Tensor,
        keys: cute.Tensor,
        tables: cute.Tensor,
        requests: cute.Tensor,
        num_visible: cute.Tensor,
        scores: cute.Tensor,
        rows_per_block: Int32,
        inverse: Int32,
        top_k: Int32,
        splits: Int32,
    ):
        config = self.config
        allocator = cutlass.memory.SmemAllocator()
        query = allocator.allocate_tensor(BFloat16, layout.outer, byte_alignment=1024, swizzle=layout.inner)
        ring = shared_address_of(
            allocator.allocate_tensor(Uint32, cute.make_layout(WARPS * STAGES * STAGE_BYTES // 4), 16)
        )
        factors = shared_address_of(allocator.allocate_tensor(Float32, cute.make_layout(config.heads), 16))
        block, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(thread // 32), thread % 32
        token = block // splits
        overlap_launches()
        request = requests[token]
        visible = cutlass.min(num_visible[token], tables.shape[1] * rows_per_block)
        if (request >= 0) & (visible > top_k):  # the same for the whole block
            tile = block - token * splits + warp // GROUP_WARPS * splits
            first = tile * TILE + warp % GROUP_WARPS * WARP_KEYS
            step = splits * (GROUPS * TILE)
            self.score(
                mma,
                query,
                factors,
                codes,
                scales,
                weights,
                keys,
                tables[(request, None)],
                scores,
                rows_per_block,
                inverse,
                token,
                visible,
                first,
                step,
                ring + warp * (STAGES * STAGE_BYTES),
                thread,
                warp,
                lane,
            )

    @cute.jit
    def score(
        self,
        mma: cute.TiledMma,
        query: cute.Tensor,
        factors: Int32,
        codes: cute.Tensor,
        scales: cute.Tensor,
        weights: cute.Tensor,
        keys: cute.Tensor,
        table: cute.Tensor,
        scores: cute.Tensor,
        rows_per_block: Int32,
        inverse: Int32,
        token: Int32,
        visible: Int32,
        first: Int32,
        step: Int32,
        ring: Int32,
        thread: Int32,
        warp: Int32,
        lane: Int32,
    ):
        """Score the warp's keys first, first + 1, … + 15 and those `step` further on, as far as they are visible."""
        tiles = self.config.head_tiles
        group, quarter = lane // 4, lane % 4
        last = visible - 1
        blocks = cute.make_rmem_tensor(cute.make_layout(2), Int32)
        rows = cute.make_rmem_tensor(cute.make_layout(2), Int32)
        self.find(blocks, rows, table, rows_per_block, inverse, first + group, last)
        for stage in cutlass.range_constexpr(STAGES - 1):  # the query's way and the keys' overlap
            self.fetch(
                blocks, rows, keys, rows_per_block, first + stage * step <= last, ring + stage * STAGE_BYTES, lane
            )
            self.find(blocks, rows, table, rows_per_block, inverse, first + (stage + 1) * step + group, last)
        self.place_query(codes, scales, weights, shared_address_of(query), factors, token, thread)
        publish_to_products()
        cute.arch.sync_threads()

        thread_mma = mma.get_slice(thread % 128)
        heads = mma.make_fragment_B(thread_mma.partition_B(query))
        sums = cute.make_rmem_tensor(mma.partition_shape_C((TILE, self.config.heads)), Float32)
        operands = [cute.make_rmem_tensor(mma.partition_shape_A((TILE, HALF)), BFloat16) for _ in range(WIDTH // HALF)]
        flat = []
        for operand in operands:
            registers = cute.recast_tensor(operand, Uint32)
            flat.append(cute.make_tensor(registers.iterator, cute.make_layout(cute.size(registers))))
        values = cute.make_tensor(sums.iterator, cute.make_layout(cute.size(sums)))
        own = []
        for tile in cutlass.range_constexpr(tiles):
            own.append(load_two_floats("shared", factors + 32 * tile + 8 * quarter))

        stage = Int32(0)
        first_of_group = first - warp % GROUP_WARPS * WARP_KEYS
        for tile_start in cutlass.range(first_of_group, visible, step, unroll=1):  # the same for the warpgroup
            start = tile_start + (first - first_of_group)
            ahead = start + (STAGES - 1) * step
            ahead_stage = stage + (STAGES - 1)
            ahead_stage = ahead_stage - Int32(ahead_stage >= STAGES) * STAGES
            self.fetch(blocks, rows, keys, rows_per_block, ahead <= last, ring + ahead_stage * STAGE_BYTES, lane)
            self.find(blocks, rows, table, rows_per_block, inverse, ahead + step + group, last)
            wait_copies(STAGES - 1)
            place = ring + stage * STAGE_BYTES
            upper, lower = load_shared(place + lane * 16, 4), load_shared(place + 512 + lane * 16, 4)
            upper_byte = load_shared_byte(place + 1024 + lane * 8 + quarter)
            lower_byte = load_shared_byte(place + 1028 + lane * 8 + quarter)
            upper_top, lower_top = top_of_row(upper_byte), top_of_row(lower_byte)
            upper_factor = relative_factor(upper_byte, upper_top)
            lower_factor = relative_factor(lower_byte, lower_top)
            for word in cutlass.range_constexpr(WORDS):
                above, below = e2m1_pairs(upper[word], upper_factor), e2m1_pairs(lower[word], lower_factor)
                for half in cutlass.range_constexpr(2):
                    fragment = [above[2 * half], below[2 * half], above[2 * half + 1], below[2 * half + 1]]
                    for index in cutlass.range_constexpr(4):
                        flat[word // 2][4 * (2 * (word % 2) + half) + index] = fragment[index]
            warpgroup.fence()
            for half in cutlass.range_constexpr(WIDTH // HALF):
                for block in cutlass.range_constexpr(HALF // 16):
                    mma.set(warpgroup.Field.ACCUMULATE, half + block > 0)
                    cute.gemm(mma, sums, operands[half][None, None, block], heads[None, None, block, half], sums)
            warpgroup.commit_group()
            warpgroup.wait_group(0)
            totals = [Float32(0.0), Float32(0.0)]
            for row in cutlass.range_constexpr(2):
                total = Float32(0.0)
                for tile in cutlass.range_constexpr(tiles):
                    for head in cutlass.range_constexpr(2):
                        logit = values[4 * tile + 2 * row + head]
                        twice = add(logit, magnitude(logit))  # 2 max(logit, 0), exact; NaN stays
                        total = fma(twice, own[tile][head], total)
                total = add(total, cute.arch.shuffle_sync_bfly(total, offset=1))
                totals[row] = add(total, cute.arch.shuffle_sync_bfly(total, offset=2))
            upper_score = multiply(totals[0], scale_value(upper_top))
            lower_score = multiply(totals[1], scale_value(lower_top))
            bits = ordered_bits(upper_score if quarter == 0 else lower_score)
            key = start + group + 8 * quarter
            if (quarter < 2) & (key < visible):
                scores[token, key] = bits
            stage = stage + 1
            stage = stage - Int32(stage == STAGES) * STAGES
        wait_copies(0)

    @cute.jit
    def find(
        self,
        blocks: cute.Tensor,
        rows: cute.Tensor,
        table: cute.Tensor,
        rows_per_block: Int32,
        inverse: Int32,
        key: Int32,
        last: Int32,
    ):
        """Read the blocks of this lane's two keys of a tile; a key that is not visible is the last one that is."""
        for row in cutlass.range_constexpr(2):
            entry = cutlass.min(key + 8 * row, last)
            column = quotient(entry, inverse)
            rows[row] = entry - column * rows_per_block
            blocks[row] = table[column]

    @cute.jit
    def fetch(
        self,
        blocks: cute.Tensor,
        rows: cute.Tensor,
        keys: cute.Tensor,
        rows_per_block: Int32,
        wanted: Boolean,
        place: Int32,
        lane: Int32,
    ):
        """Start copying this lane's parts of the two keys whose blocks are known, as one group."""
        if wanted:
            for row in cutlass.range_constexpr(2):
                page = keys[(blocks[row], None)].iterator.toint()
                data = page + Int64(rows[row] * DATA_BYTES + lane % 4 * LANE_BYTES)
                copy_vector(place + 512 * row + lane * 16, data)
                scale = page + Int64(rows_per_block * DATA_BYTES + rows[row] * SCALE_BYTES)
                copy_word(place + 1024 + lane * 8 + 4 * row, scale)
        commit_copies()

    @cute.jit
    def place_query(
        self,
        codes: cute.Tensor,
        scales: cute.Tensor,
        weights: cute.Tensor,
        query: Int32,
        factors: Int32,
        token: Int32,
        thread: Int32,
    ):
        """Decode the query into shared memory; half of the head weights take up their heads' largest scales."""
        heads = self.config.heads
        for start in cutlass.range_constexpr(0, 4 * heads, THREADS):
            head = cutlass.min(
                (start + thread) // 4, heads - 1
            )  # whole warps; those that repeat the last head store it
            quarter = thread % 4
            source = codes[(token, head, None)].iterator.toint() + Int64(quarter * LANE_BYTES)
            words = load_global_vector_if(Int32(1), source, 4)
            byte = load_global_byte(scales[(token, head, None)].iterator.toint() + Int64(quarter))
            top = top_of_row(byte)
            factor = relative_factor(byte, top)
            for word in cutlass.range_constexpr(WORDS):
                pairs = e2m1_pairs(words[word], factor)
                for one in cutlass.range_constexpr(4):
                    chunk = 4 * word + one  # of 8 channels: those that the instruction meets together
                    row = query + chunk // 8 * (heads * 128) + head * 128
                    store_shared(row + ((chunk % 8) ^ (head % 8)) * 16 + quarter * 4, pairs[one])
            store_shared_float(
                factors + head * 4, multiply(multiply(weights[token, head], Float32(0.5)), scale_value(top))
            )
