# SPDX-License-Identifier: Apache-2.0
"""Device half of index_scores.

mma.m16n8k16 with keys on M and heads on N. Lane l = 4 g + t has the 32 channels from 32 t on (one group of FP4) of keys
g and g + 8 of a warp's tile and of heads g, g + 8, …: which k an operand calls its third is nobody's business but the
other operand's. The query stays in registers; every warp brings its keys through a ring of its own, each lane what it
reads itself, so that no thread waits for another one.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.fp8.fp8_device import commit_copies, wait_copies
from megamoe.kernels.indexer.index_scores_config import (
    STAGE_BYTES,
    STAGES,
    TILE,
    WARP_KEYS,
    WARPS,
    WIDTH,
    Config,
)
from megamoe.kernels.indexer.indexer_device import (
    copy_vector,
    copy_word,
    e2m1_pairs,
    load_global_byte,
    load_shared_byte,
    ordered_bits,
    relative_factor,
    scale_value,
    top_of_row,
)
from megamoe.kernels.parts.cluster_device import shared_address_of
from megamoe.kernels.parts.memory_device import load_global_vector_if, load_shared
from megamoe.kernels.parts.mma_device import mma, zeros
from megamoe.kernels.parts.pool_device import row_bytes, symbolic_integers, symbolic_pool
from megamoe.kernels.parts.ptx_device import add, fma, max_keeping_nan, multiply
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches, symbolic_heads, symbolic_rows

LANE_BYTES = 16
DATA_BYTES, SCALE_BYTES = row_bytes("index_fp4", WIDTH)
WORDS = 4


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
        *(Int32(0) for _ in range(3)),
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
        top_k: Int32,
        splits: Int32,
        stream,
    ):
        self.kernel(
            codes, scales, weights, keys, tables, requests, num_visible, scores, rows_per_block, top_k, splits
        ).launch(
            grid=(scores.shape[0] * splits, 1, 1),
            block=(32 * WARPS, 1, 1),
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
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
        top_k: Int32,
        splits: Int32,
    ):
        shared = cutlass.memory.SmemAllocator()
        ring = shared_address_of(
            shared.allocate_tensor(Uint32, cute.make_layout(WARPS * STAGES * STAGE_BYTES // 4), 16)
        )
        block, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(thread // 32), thread % 32
        token = block // splits
        first_tile = block - token * splits
        overlap_launches()
        request = requests[token]
        visible = cutlass.min(num_visible[token], tables.shape[1] * rows_per_block)
        first = first_tile * TILE + warp * WARP_KEYS
        if (request >= 0) & (visible > top_k) & (first < visible):  # the same for the whole warp
            self.score(
                codes,
                scales,
                weights,
                keys,
                tables,
                scores,
                rows_per_block,
                token,
                request,
                visible,
                first,
                splits * TILE,
                ring + warp * (STAGES * STAGE_BYTES),
                lane,
            )

    @cute.jit
    def score(
        self,
        codes: cute.Tensor,
        scales: cute.Tensor,
        weights: cute.Tensor,
        keys: cute.Tensor,
        tables: cute.Tensor,
        scores: cute.Tensor,
        rows_per_block: Int32,
        token: Int32,
        request: Int32,
        visible: Int32,
        first: Int32,
        step: Int32,
        ring: Int32,
        lane: Int32,
    ):
        """Score the keys first, first + 1, … + 15 and those `step` further on, as far as they are visible."""
        tiles = self.config.head_tiles
        group, quarter = lane // 4, lane % 4
        table = tables[(request, None)]
        blocks = cute.make_rmem_tensor(cute.make_layout(2), Int32)
        self.find(blocks, table, rows_per_block, first, visible, group)
        for stage in cutlass.range_constexpr(STAGES - 1):  # the query's way and the keys' overlap
            self.fetch(blocks, keys, rows_per_block, first + stage * step, visible, ring + stage * STAGE_BYTES, lane)
            self.find(blocks, table, rows_per_block, first + (stage + 1) * step, visible, group)
        query = cute.make_rmem_tensor(cute.make_layout((4 * WORDS, tiles)), Uint32)
        factors = cute.make_rmem_tensor(cute.make_layout((2, tiles)), Float32)
        self.load_query(codes, scales, weights, query, factors, token, group, quarter)

        stage = Int32(0)
        for start in cutlass.range(first, visible, step, unroll=1):
            ahead = start + (STAGES - 1) * step
            ahead_stage = stage + (STAGES - 1)
            ahead_stage = ahead_stage - Int32(ahead_stage >= STAGES) * STAGES
            self.fetch(blocks, keys, rows_per_block, ahead, visible, ring + ahead_stage * STAGE_BYTES, lane)
            self.find(blocks, table, rows_per_block, ahead + step, visible, group)
            wait_copies(STAGES - 1)
            place = ring + stage * STAGE_BYTES
            upper, lower = load_shared(place + lane * 16, 4), load_shared(place + 512 + lane * 16, 4)
            upper_byte = load_shared_byte(place + 1024 + lane * 8 + quarter)
            lower_byte = load_shared_byte(place + 1028 + lane * 8 + quarter)
            upper_top, lower_top = top_of_row(upper_byte), top_of_row(lower_byte)
            upper_factor = relative_factor(upper_byte, upper_top)
            lower_factor = relative_factor(lower_byte, lower_top)
            sums = zeros(4, tiles)
            for word in cutlass.range_constexpr(WORDS):
                above, below = e2m1_pairs(upper[word], upper_factor), e2m1_pairs(lower[word], lower_factor)
                for half in cutlass.range_constexpr(2):
                    fragment = [above[2 * half], below[2 * half], above[2 * half + 1], below[2 * half + 1]]
                    for tile in cutlass.range_constexpr(tiles):
                        values = [query[4 * word + 2 * half + one, tile] for one in range(2)]
                        new = mma([sums[index, tile] for index in range(4)], fragment, values)
                        for index in cutlass.range_constexpr(4):
                            sums[index, tile] = new[index]
            totals = [Float32(0.0), Float32(0.0)]
            for row in cutlass.range_constexpr(2):
                total = Float32(0.0)
                for tile in cutlass.range_constexpr(tiles):
                    for head in cutlass.range_constexpr(2):
                        logit = max_keeping_nan(sums[2 * row + head, tile], Float32(0.0))
                        total = fma(logit, factors[head, tile], total)
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
    def find(self, blocks: cute.Tensor, table: cute.Tensor, rows_per_block: Int32, start: Int32, visible: Int32, group):
        """Read the blocks of this lane's two keys of a tile; a key that is not visible is the last one that is."""
        for row in cutlass.range_constexpr(2):
            key = cutlass.min(start + group + 8 * row, visible - 1)
            blocks[row] = table[key // rows_per_block]

    @cute.jit
    def fetch(
        self,
        blocks: cute.Tensor,
        keys: cute.Tensor,
        rows_per_block: Int32,
        start: Int32,
        visible: Int32,
        place: Int32,
        lane: Int32,
    ):
        """Start copying this lane's parts of the two keys whose blocks are known, as one group."""
        if start < visible:
            for row in cutlass.range_constexpr(2):
                key = cutlass.min(start + lane // 4 + 8 * row, visible - 1)
                inside = key % rows_per_block
                page = keys[(blocks[row], None)].iterator.toint()
                copy_vector(place + 512 * row + lane * 16, page + Int64(inside * DATA_BYTES + lane % 4 * LANE_BYTES))
                copy_word(
                    place + 1024 + lane * 8 + 4 * row,
                    page + Int64(rows_per_block) * DATA_BYTES + Int64(inside) * SCALE_BYTES,
                )
        commit_copies()

    @cute.jit
    def load_query(
        self,
        codes: cute.Tensor,
        scales: cute.Tensor,
        weights: cute.Tensor,
        query: cute.Tensor,
        factors: cute.Tensor,
        token: Int32,
        group: Int32,
        quarter: Int32,
    ):
        """Bring the query's fragments to registers, its heads' largest scales folded into the head weights."""
        for tile in cutlass.range_constexpr(self.config.head_tiles):
            head = 8 * tile + group
            words = load_global_vector_if(
                Int32(1), codes[(token, head, None)].iterator.toint() + Int64(quarter * LANE_BYTES), 4
            )
            byte = load_global_byte(scales[(token, head, None)].iterator.toint() + Int64(quarter))
            top = top_of_row(byte)
            factor = relative_factor(byte, top)
            for word in cutlass.range_constexpr(WORDS):
                pairs = e2m1_pairs(words[word], factor)
                for one in cutlass.range_constexpr(4):
                    query[4 * word + one, tile] = pairs[one]
            for one in cutlass.range_constexpr(2):  # lanes 4 h to 4 h + 3 know the scale of head h of the tile
                scale = scale_value(cute.arch.shuffle_sync(top, 8 * quarter + 4 * one))
                factors[one, tile] = multiply(weights[token, 8 * tile + 2 * quarter + one], scale)
