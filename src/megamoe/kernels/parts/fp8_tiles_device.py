# SPDX-License-Identifier: Apache-2.0
"""Device half of fp8_tiles."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers

from megamoe.kernels.parts.fp8_device import (
    arrive_in_cluster_if,
    e4m3_pairs,
    folded_pairs,
    folding_factor,
    load_scale_if,
    load_shared_floats,
    nan_of_row,
)
from megamoe.kernels.parts.fp8_expand import PADDED_TOKENS
from megamoe.kernels.parts.fp8_stream import BLOCK, CHUNK
from megamoe.kernels.parts.fp8_stream_device import symbolic_scales
from megamoe.kernels.parts.fp8_tiles import CONSUMERS, GROUP_ROWS, OUT_PADDING, THREADS, UNDO, Config
from megamoe.kernels.parts.memory_device import (
    bulk_copy_if,
    expect_bytes_if,
    init_barrier,
    load_global_if,
    load_global_vector,
    load_shared,
    pack_bf16,
    publish_barriers,
    store_global_vector_if,
    store_matrices_transposed,
    wait_barrier,
)
from megamoe.kernels.parts.ptx_device import fma

OUT_DTYPES = {"bf16": BFloat16, "f32": Float32}
HALVES = BLOCK // CHUNK
WARPS = CONSUMERS // 32
PART_STEPS = 4  # steps of 16 columns of folded weights that are expanded at once
PARTS = BLOCK // 16 // PART_STEPS


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, num_rows = cute.sym_int32(), cute.sym_int32(divisibility=16)
    columns, padded = cute.sym_int32(divisibility=BLOCK), cute.sym_int64(divisibility=PADDED_TOKENS)

    def rows_of(dtype, count, width):
        stride = cute.sym_int64(divisibility=16)
        return make_fake_tensor(dtype, (count, width), (stride, 1), assumed_align=16)

    factors = make_fake_tensor(Float32, (cute.sym_int32(), padded), (padded, 1), assumed_align=16)
    arguments = (
        rows_of(BFloat16 if config.folded else Float16, num_tokens, columns),
        rows_of(Uint8, num_rows, columns),
        *(() if config.folded else (factors,)),
        *symbolic_scales(cute.sym_int32()),
        rows_of(OUT_DTYPES[config.out], num_tokens, num_rows),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    tiles = Fp8Tiles(config)
    return (tiles.folded if config.folded else tiles.apart), arguments


class Fp8Tiles:
    """One block computes one tile of `block_rows` weight rows by `block_tokens` tokens."""

    def __init__(self, config: Config):
        self.config = config
        self.tokens, self.stages = config.block_tokens, config.stages
        self.groups = config.block_rows // GROUP_ROWS  # groups of 64 rows of a warpgroup
        self.values = BFloat16 if config.folded else Float16
        self.stage_bytes = self.tokens * BLOCK * 2 + (config.block_rows * BLOCK if config.folded else self.tokens * 4)
        self.out_stride = config.block_rows + OUT_PADDING

    @cute.jit
    def folded(self, x, w, w_scales, scale_size: Int32, out, stream):
        self.launch(x, w, None, w_scales, scale_size, out, stream)

    @cute.jit
    def apart(self, x, w, factors, w_scales, scale_size: Int32, out, stream):
        self.launch(x, w, factors, w_scales, scale_size, out, stream)

    def launch(self, x, w, factors, w_scales, scale_size, out, stream):
        """Describe the tokens to the copy engine and launch one block a tile."""
        config = self.config
        mma = hopper_helpers.make_trivial_tiled_mma(
            self.values,
            self.values,
            warpgroup.OperandMajorMode.K,
            warpgroup.OperandMajorMode.K,
            Float32,
            (1, 1, 1),
            (64, self.tokens),
            warpgroup.OperandSource.RMEM,
        )
        token_layout = hopper_helpers.make_smem_layout_b(
            LayoutEnum.ROW_MAJOR, (64, self.tokens, CHUNK), self.values, self.stages * HALVES
        )
        copy, tokens = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SMulticastOp() if config.cluster > 1 else cpasync.CopyBulkTensorTileG2SOp(),
            x,
            cute.slice_(token_layout, (None, None, 0)),
            (self.tokens, CHUNK),
            num_multicast=config.cluster,
        )
        weight_layout, weight_copy, weights = None, None, None
        if config.folded:
            weight_layout = hopper_helpers.make_smem_layout_b(
                LayoutEnum.ROW_MAJOR, (64, config.block_rows, BLOCK), Uint8, self.stages
            )
            weight_copy, weights = cpasync.make_tiled_tma_atom(
                cpasync.CopyBulkTensorTileG2SOp(),
                w,
                cute.slice_(weight_layout, (None, None, 0)),
                (config.block_rows, BLOCK),
            )
        num_tokens, num_rows = out.shape
        rows = config.block_rows * config.cluster
        self.kernel(
            mma, copy, tokens, token_layout, weight_copy, weights, weight_layout, factors, w, w_scales, scale_size, out
        ).launch(
            grid=(
                (num_rows + (rows - 1)) // rows * config.cluster,
                (num_tokens + (self.tokens - 1)) // self.tokens,
                1,
            ),
            block=(THREADS, 1, 1),
            cluster=(config.cluster, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        copy: cute.CopyAtom,
        tokens: cute.Tensor,
        token_layout: cute.ComposedLayout,
        weight_copy,
        weights,
        weight_layout,
        factors,
        w: cute.Tensor,
        w_scales: cute.Tensor,
        scale_size: Int32,
        out: cute.Tensor,
    ):
        tid, _, _ = cute.arch.thread_idx()
        row_block, token_block, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(tid // 32)
        stages, cluster, folded = self.stages, self.config.cluster, self.config.folded
        allocator = cutlass.memory.SmemAllocator()
        barriers = allocator.allocate_array(Int64, 2 * stages)  # full, then empty
        shared_tokens = allocator.allocate_tensor(
            self.values, token_layout.outer, byte_alignment=1024, swizzle=token_layout.inner
        )
        shared_out = shared_tokens.iterator.toint()  # outputs take the place of tokens
        shared_weights, factor_area = None, Int32(0)
        if cutlass.const_expr(folded):
            shared_weights = allocator.allocate_tensor(
                Uint8, weight_layout.outer, byte_alignment=1024, swizzle=weight_layout.inner
            )
        else:
            factor_area = allocator.allocate_array(Float32, stages * self.tokens).toint()
        full = barriers.toint()
        empty = full + stages * 8
        if tid == 0:
            for stage in cutlass.range_constexpr(stages):
                init_barrier(full + stage * 8, Int32(1))
                init_barrier(empty + stage * 8, Int32(WARPS * cluster))
            publish_barriers()
        if cutlass.const_expr(cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

        if warp >= WARPS:
            cute.arch.setmaxregister_decrease(40)
            if warp == WARPS:
                rank = cute.arch.block_idx_in_cluster() if cluster > 1 else 0
                tile = cute.local_tile(tokens, (self.tokens, CHUNK), (token_block, None))
                token_parts = cpasync.tma_partition(
                    copy,
                    rank,
                    cute.make_layout(cluster),
                    cute.group_modes(shared_tokens, 0, 2),
                    cute.group_modes(tile, 0, 2),
                )
                weight_parts = None
                if cutlass.const_expr(folded):
                    tile = cute.local_tile(weights, (self.config.block_rows, BLOCK), (row_block, None))
                    weight_parts = cpasync.tma_partition(
                        weight_copy,
                        0,
                        cute.make_layout(1),
                        cute.group_modes(shared_weights, 0, 2),
                        cute.group_modes(tile, 0, 2),
                    )
                for block in cutlass.range(w.shape[1] // BLOCK, unroll=1):
                    self.produce(
                        block, copy, token_parts, weight_copy, weight_parts, barriers, factors, factor_area, token_block
                    )
        else:
            cute.arch.setmaxregister_increase(232)
            thread = (tid, warp, full, empty)
            weight = (w, w_scales.iterator.toint(), scale_size)
            if cutlass.const_expr(folded):
                area = shared_weights.iterator.toint()
                self.consume_folded(mma, shared_tokens, shared_out, weight, out, thread, area)
            else:
                self.consume_apart(mma, shared_tokens, shared_out, weight, out, thread, factor_area)
        if cutlass.const_expr(cluster > 1):  # the other block may still arrive at this one's barriers
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    def produce(
        self, block, copy, token_parts, weight_copy, weight_parts, barriers, factors, factor_area, token_block
    ):
        """Fill a stage: this block's share of the tokens, to all of the cluster, and weights, or scales of tokens."""
        stages, cluster = self.stages, self.config.cluster
        stage = block % stages
        full = barriers.toint() + stage * 8
        is_first = cute.arch.lane_idx() == 0
        wait_barrier(full + stages * 8, (block // stages & 1) ^ 1)
        expect_bytes_if(is_first, full, Int32(self.stage_bytes))
        for half in range(HALVES):
            target = token_parts[0][(None, stage * HALVES + half)]
            source = token_parts[1][(None, block * HALVES + half)]
            if cluster > 1:
                mask = cutlass.Int16((1 << cluster) - 1)
                cute.copy(copy, source, target, tma_bar_ptr=barriers + stage, mcast_mask=mask)
            else:
                cute.copy(copy, source, target, tma_bar_ptr=barriers + stage)
        if weight_parts is not None:
            target, source = weight_parts[0][(None, stage)], weight_parts[1][(None, block)]
            cute.copy(weight_copy, source, target, tma_bar_ptr=barriers + stage)
        else:
            source = Int64(block) * factors.layout.stride[0] + token_block * self.tokens
            target = factor_area + stage * (self.tokens * 4)
            bulk_copy_if(is_first, target, factors.iterator.toint() + source * 4, Int32(self.tokens * 4), full)

    def first_scale(self, w, warp):
        """Return the index of the scale of a warpgroup's rows and the first block of columns."""
        row_block, _, _ = cute.arch.block_idx()
        num_rows, columns = w.shape
        row = row_block * self.config.block_rows + warp // 4 * (64 * self.groups)
        return Int64(cutlass.min(row, num_rows - 1) // BLOCK) * (columns // BLOCK)

    def operands(self, mma, shared_tokens, tid):
        """Return token fragments, accumulators by group, and two sets of weight registers by group."""
        fragments = mma.make_fragment_B(mma.get_slice(tid % 128).partition_B(shared_tokens))
        columns = PART_STEPS * 16 if self.config.folded else CHUNK
        shape_c, shape_a = mma.partition_shape_C((64, self.tokens)), mma.partition_shape_A((64, columns))
        sums = [cute.make_rmem_tensor(shape_c, Float32) for _ in range(self.groups)]
        weights = [[cute.make_rmem_tensor(shape_a, self.values) for _ in range(self.groups)] for _ in range(2)]
        return fragments, sums, weights

    @cute.jit
    def consume_folded(
        self, mma: cute.TiledMma, shared_tokens: cute.Tensor, shared_out: Int32, weight, out, thread, area: Int32
    ):
        """Multiply the tile and store it; the scales are in the operands."""
        tid, warp, full, empty = thread
        w, scales, scale_size = weight
        lane, blocks, stages = tid % 32, w.shape[1] // BLOCK, self.stages
        fragments, sums, weights = self.operands(mma, shared_tokens, tid)
        for group in cutlass.range_constexpr(self.groups):
            sums[group].fill(0.0)
        # Row g of this warp's first group, and the first of its pieces of 16 bytes: swizzled, so that banks differ.
        row = warp // 4 * (64 * self.groups) + warp % 4 * 16 + lane // 4
        area = area + row * BLOCK + (lane % 4 * 2 ^ lane // 4) * 16
        first_scale = self.first_scale(w, warp)
        raw = cute.make_rmem_tensor(cute.make_layout((8, self.groups)), Uint32)
        nan = cute.make_rmem_tensor(cute.make_layout((2, self.groups)), Uint32)
        nan.fill(0)
        byte = load_global_if(Int32(1), scales + first_scale, 8)
        wait_barrier(full, Int32(0))
        self.load_pieces(raw, area)
        for block in cutlass.range(blocks, unroll=1):
            stage = block % stages
            factor = folding_factor(byte)
            following = cutlass.min(block + 1, blocks - 1)  # past the last block, the last again
            byte = load_global_if(Int32(1), scales + first_scale + following, 8)
            for part in cutlass.range_constexpr(PARTS):
                half, first = part * PART_STEPS // 4, part * PART_STEPS % 4
                chosen = weights[part % 2]
                for group in cutlass.range_constexpr(self.groups):
                    self.fold(raw, chosen[group], factor, nan, group, first)
                if cutlass.const_expr(first + PART_STEPS == 4 and half == 0):
                    self.load_pieces(raw, (area + stage * (self.config.block_rows * BLOCK)) ^ 16)
                if cutlass.const_expr(part == PARTS - 1):
                    after = following % stages
                    wait_barrier(full + after * 8, following // stages & 1)
                    self.load_pieces(raw, area + after * (self.config.block_rows * BLOCK))
                self.multiply(mma, sums, chosen, fragments, stage * HALVES + half, first)
                warpgroup.wait_group(1)
                if cutlass.const_expr(part == 0):
                    self.release((lane == 0) & (block > 0), empty + (block + (stages - 1)) % stages * 8)
        warpgroup.wait_group(0)
        for group in cutlass.range_constexpr(self.groups):
            bias = [nan_of_row(nan[row, group]) for row in range(2)]
            flat = cute.make_tensor(sums[group].iterator, cute.make_layout(cute.size(sums[group])))
            for position in cutlass.range_constexpr(self.tokens // 2):
                flat[position] = fma(flat[position], Float32(UNDO), bias[position // 2 % 2])
        self.store(sums, shared_out, out, tid, warp)

    def load_pieces(self, raw, address):
        """Load half a block of columns of rows g and g + 8 of every group."""
        for group in range(self.groups):
            for row in range(2):
                for index, word in enumerate(load_shared(address + (group * 64 + row * 8) * BLOCK, 4)):
                    raw[row * 4 + index, group] = word

    def fold(self, raw, weights, factor, nan, group: int, first: int):
        """Expand some steps of half a block of columns to the A operand, scaled."""
        registers = cute.recast_tensor(weights, Uint32)
        flat = cute.make_tensor(registers.iterator, cute.make_layout(cute.size(registers)))
        for step in range(PART_STEPS):
            for row in range(2):
                word = raw[4 * row + first + step, group]
                pairs = folded_pairs(word, factor, nan[row, group])
                flat[step * 4 + row], flat[step * 4 + 2 + row], nan[row, group] = pairs

    @cute.jit
    def consume_apart(
        self, mma: cute.TiledMma, shared_tokens: cute.Tensor, shared_out: Int32, weight, out, thread, factor_area: Int32
    ):
        """Multiply the tile and store it; scales multiply sums of 128 products."""
        tid, warp, full, empty = thread
        w, scales, scale_size = weight
        lane, blocks, stages = tid % 32, w.shape[1] // BLOCK, self.stages
        fragments, (products,), weights = self.operands(mma, shared_tokens, tid)
        sums = cute.make_rmem_tensor(mma.partition_shape_C((64, self.tokens)), Float32)
        sums.fill(0.0)
        row_block, _, _ = cute.arch.block_idx()
        row_tile = cutlass.min(row_block * (GROUP_ROWS // 16) + warp, w.shape[0] // 16 - 1)  # past the end, the last
        source = w.iterator.toint() + Int64(row_tile * 16 + lane // 4) * w.shape[1] + lane % 4 * 16
        below = Int64(8 * w.shape[1])
        first_scale = self.first_scale(w, warp)
        raw = [cute.make_rmem_tensor(cute.make_layout(8), Uint32) for _ in range(HALVES)]

        self.load(raw[0], source, below)
        self.load(raw[1], source + CHUNK, below)
        scale = load_scale_if(Int32(1), scales, first_scale, scale_size)
        self.decode(raw[0], weights[0][0])
        self.load(raw[0], source + cutlass.min(1, blocks - 1) * BLOCK, below)
        flat_sums = cute.make_tensor(sums.iterator, cute.make_layout(cute.size(sums)))
        flat_products = cute.make_tensor(products.iterator, cute.make_layout(cute.size(products)))
        for block in cutlass.range(blocks, unroll=1):
            stage = block % stages
            wait_barrier(full + stage * 8, block // stages & 1)
            self.multiply(mma, [products], weights[0], fragments, stage * HALVES, 0, fresh=True)
            self.decode(raw[1], weights[1][0])
            following = cutlass.min(block + 1, blocks - 1)  # past the last block, the last again
            self.load(raw[1], source + following * BLOCK + CHUNK, below)
            self.multiply(mma, [products], weights[1], fragments, stage * HALVES + 1, 0)
            warpgroup.wait_group(1)  # the first half has read its registers
            self.decode(raw[0], weights[0][0])
            self.load(raw[0], source + cutlass.min(block + 2, blocks - 1) * BLOCK, below)
            factors = []
            for group in cutlass.range_constexpr(self.tokens // 8):
                address = factor_area + (stage * self.tokens + group * 8 + lane % 4 * 2) * 4
                factors.append([scale * factor for factor in load_shared_floats(address, 2)])
            scale = load_scale_if(Int32(1), scales, first_scale + following, scale_size)
            warpgroup.wait_group(0)
            self.release(lane == 0, empty + stage * 8)
            for position in cutlass.range_constexpr(self.tokens // 2):
                factor = factors[position // 4][position % 2]
                flat_sums[position] = flat_sums[position] + flat_products[position] * factor
        self.store([sums], shared_out, out, tid, warp)

    def load(self, raw, address, below):
        """Start loading this lane's 16 bytes of rows g and g + 8."""
        for index, word in enumerate([*load_global_vector(address, 4), *load_global_vector(address + below, 4)]):
            raw[index] = word

    def decode(self, raw, weights):
        """Expand half a block of columns to the A operand."""
        registers = cute.recast_tensor(weights, Uint32)
        flat = cute.make_tensor(registers.iterator, cute.make_layout(cute.size(registers)))
        for step in range(4):
            above, below = e4m3_pairs(raw[step]), e4m3_pairs(raw[4 + step])
            for index, pair in enumerate((above[0], below[0], above[1], below[1])):
                flat[step * 4 + index] = pair

    def release(self, wanted, barrier):
        """Tell all blocks of the cluster that this warp has read a stage."""
        for rank in range(self.config.cluster):
            arrive_in_cluster_if(wanted, barrier, Int32(rank), self.config.cluster)

    def multiply(self, mma, sums, weights, fragments, position, first: int, fresh: bool = False):
        """Issue products of 64 columns, from step `first` on, as one group; `fresh` ones start from zero."""
        warpgroup.fence()
        for step in range(cute.size(weights[0], mode=[2])):
            mma.set(warpgroup.Field.ACCUMULATE, not (fresh and step == 0))
            for group in range(self.groups):
                cute.gemm(
                    mma,
                    sums[group],
                    weights[group][None, None, step],
                    fragments[None, None, first + step, position],
                    sums[group],
                )
        warpgroup.commit_group()

    @cute.jit
    def store(self, sums, shared_out: Int32, out: cute.Tensor, tid: Int32, warp: Int32):
        """Turn token-major through shared memory, store whole rows."""
        row_block, token_block, _ = cute.arch.block_idx()
        num_tokens, num_rows = out.shape
        lane = tid % 32
        block_rows, stride = self.config.block_rows, self.out_stride
        first_row, first_token = warp // 4 * (64 * self.groups) + warp % 4 * 16, token_block * self.tokens
        if cutlass.const_expr(self.config.out == "bf16"):
            cute.arch.barrier(barrier_id=1, number_of_threads=CONSUMERS)  # nobody reads tokens any more
            for group in cutlass.range_constexpr(self.groups):
                flat = cute.make_tensor(sums[group].iterator, cute.make_layout(cute.size(sums[group])))
                for blocks in cutlass.range_constexpr(self.tokens // 16):  # two blocks of 8 tokens, two of 8 rows
                    words = [
                        pack_bf16(flat[blocks * 8 + index * 2], flat[blocks * 8 + index * 2 + 1]) for index in range(4)
                    ]
                    token = blocks * 16 + lane // 16 * 8 + lane % 8
                    row = first_row + group * 64 + lane // 8 % 2 * 8
                    store_matrices_transposed(shared_out + (token * stride + row) * 2, *words)
            cute.arch.barrier(barrier_id=1, number_of_threads=CONSUMERS)
            lanes = block_rows // 8  # of a token
            tokens = CONSUMERS // lanes  # at once
            row = row_block * block_rows + tid % lanes * 8
            for index in cutlass.range_constexpr(self.tokens // tokens):
                token = index * tokens + tid // lanes
                words = load_shared(shared_out + (token * stride + tid % lanes * 8) * 2, 4)
                wanted = (first_token + token < num_tokens) & (row < num_rows)
                address = out.iterator.toint() + (Int64(first_token + token) * num_rows + row) * 2
                store_global_vector_if(wanted, address, *words)
        else:
            for group in cutlass.range_constexpr(self.groups):
                flat = cute.make_tensor(sums[group].iterator, cute.make_layout(cute.size(sums[group])))
                for position in cutlass.range_constexpr(self.tokens // 2):
                    token = first_token + position // 4 * 8 + lane % 4 * 2 + position % 2
                    row = row_block * block_rows + first_row + group * 64 + lane // 4 + position // 2 % 2 * 8
                    if (token < num_tokens) & (row < num_rows):
                        out[token, row] = flat[position]
