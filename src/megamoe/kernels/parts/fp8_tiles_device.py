# SPDX-License-Identifier: Apache-2.0
"""Device half of fp8_tiles."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers

from megamoe.kernels.parts.fp8_device import arrive_in_cluster_if, e4m3_pairs, load_scale_if, load_shared_floats
from megamoe.kernels.parts.fp8_expand import PADDED_TOKENS
from megamoe.kernels.parts.fp8_stream import BLOCK, CHUNK
from megamoe.kernels.parts.fp8_stream_device import symbolic_scales
from megamoe.kernels.parts.fp8_tiles import BLOCK_ROWS, CONSUMERS, OUT_STRIDE, THREADS, Config
from megamoe.kernels.parts.memory_device import (
    bulk_copy_if,
    expect_bytes_if,
    init_barrier,
    load_global_vector,
    load_shared,
    pack_bf16,
    publish_barriers,
    store_global_vector_if,
    store_matrices_transposed,
    wait_barrier,
)

OUT_DTYPES = {"bf16": BFloat16, "f32": Float32}
HALVES = BLOCK // CHUNK
WARPS = CONSUMERS // 32


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, num_rows = cute.sym_int32(), cute.sym_int32(divisibility=16)
    columns, padded = cute.sym_int32(divisibility=BLOCK), cute.sym_int64(divisibility=PADDED_TOKENS)

    def rows_of(dtype, count, width):
        stride = cute.sym_int64(divisibility=16)
        return make_fake_tensor(dtype, (count, width), (stride, 1), assumed_align=16)

    arguments = (
        rows_of(Float16, num_tokens, columns),
        make_fake_tensor(Float32, (cute.sym_int32(), padded), (padded, 1), assumed_align=16),
        rows_of(Uint8, num_rows, columns),
        *symbolic_scales(cute.sym_int32()),
        rows_of(OUT_DTYPES[config.out], num_tokens, num_rows),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return Fp8Tiles(config), arguments


class Fp8Tiles:
    """One block computes one tile of 128 weight rows by `block_tokens` tokens."""

    def __init__(self, config: Config):
        self.config = config
        self.tokens, self.stages = config.block_tokens, config.stages
        self.stage_bytes = self.tokens * BLOCK * 2 + self.tokens * 4

    @cute.jit
    def __call__(self, x, factors, w, w_scales, scale_size: Int32, out, stream):
        """Describe the tokens to the copy engine and launch one block a tile."""
        mma = hopper_helpers.make_trivial_tiled_mma(
            Float16,
            Float16,
            warpgroup.OperandMajorMode.K,
            warpgroup.OperandMajorMode.K,
            Float32,
            (1, 1, 1),
            (64, self.tokens),
            warpgroup.OperandSource.RMEM,
        )
        token_layout = hopper_helpers.make_smem_layout_b(
            LayoutEnum.ROW_MAJOR, (64, self.tokens, CHUNK), Float16, self.stages * HALVES
        )
        shares = self.config.cluster > 1
        copy, tokens = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SMulticastOp() if shares else cpasync.CopyBulkTensorTileG2SOp(),
            x,
            cute.slice_(token_layout, (None, None, 0)),
            (self.tokens, CHUNK),
            num_multicast=self.config.cluster,
        )
        num_tokens, num_rows = out.shape
        rows = BLOCK_ROWS * self.config.cluster
        self.kernel(mma, copy, tokens, token_layout, factors, w, w_scales, scale_size, out).launch(
            grid=(
                (num_rows + (rows - 1)) // rows * self.config.cluster,
                (num_tokens + (self.tokens - 1)) // self.tokens,
                1,
            ),
            block=(THREADS, 1, 1),
            cluster=(self.config.cluster, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        copy: cute.CopyAtom,
        tokens: cute.Tensor,
        token_layout: cute.ComposedLayout,
        factors: cute.Tensor,
        w: cute.Tensor,
        w_scales: cute.Tensor,
        scale_size: Int32,
        out: cute.Tensor,
    ):
        tid, _, _ = cute.arch.thread_idx()
        _, token_block, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(tid // 32)
        stages, cluster = self.stages, self.config.cluster
        allocator = cutlass.memory.SmemAllocator()
        barriers = allocator.allocate_array(Int64, 2 * stages)  # full, then empty
        shared_factors = allocator.allocate_array(Float32, stages * self.tokens)
        shared_tokens = allocator.allocate_tensor(
            Float16, token_layout.outer, byte_alignment=1024, swizzle=token_layout.inner
        )
        shared_out = allocator.allocate_tensor(
            BFloat16, cute.make_layout((self.tokens, BLOCK_ROWS), stride=(OUT_STRIDE, 1)), byte_alignment=128
        )
        full, factor_area = barriers.toint(), shared_factors.toint()
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
                self.produce(copy, tokens, shared_tokens, barriers, full, empty, factors, factor_area, token_block)
        else:
            cute.arch.setmaxregister_increase(232)
            self.consume(
                mma, shared_tokens, shared_out, full, empty, factor_area, w, w_scales, scale_size, out, tid, warp
            )
        if cutlass.const_expr(cluster > 1):  # the other block may still arrive at this one's barriers
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @cute.jit
    def produce(
        self,
        copy: cute.CopyAtom,
        tokens: cute.Tensor,
        shared_tokens: cute.Tensor,
        barriers: cute.Pointer,
        full: Int32,
        empty: Int32,
        factors: cute.Tensor,
        factor_area: Int32,
        token_block: Int32,
    ):
        """Keep the stages full: this block's share of the tokens, to all blocks of the cluster, and their scales."""
        stages, cluster = self.stages, self.config.cluster
        tile = cute.local_tile(tokens, (self.tokens, CHUNK), (token_block, None))
        rank = cute.arch.block_idx_in_cluster() if cluster > 1 else 0
        to_shared, from_global = cpasync.tma_partition(
            copy,
            rank,
            cute.make_layout(cluster),
            cute.group_modes(shared_tokens, 0, 2),
            cute.group_modes(tile, 0, 2),
        )
        stride = factors.layout.stride[0]
        is_first = cute.arch.lane_idx() == 0
        for block in cutlass.range(factors.shape[0], unroll=1):
            stage = block % stages
            wait_barrier(empty + stage * 8, (block // stages & 1) ^ 1)
            expect_bytes_if(is_first, full + stage * 8, Int32(self.stage_bytes))
            for half in cutlass.range_constexpr(HALVES):
                source, target = from_global[(None, block * HALVES + half)], to_shared[(None, stage * HALVES + half)]
                if cutlass.const_expr(cluster > 1):
                    mask = cutlass.Int16((1 << cluster) - 1)
                    cute.copy(copy, source, target, tma_bar_ptr=barriers + stage, mcast_mask=mask)
                else:
                    cute.copy(copy, source, target, tma_bar_ptr=barriers + stage)
            address = factors.iterator.toint() + (Int64(block) * stride + token_block * self.tokens) * 4
            bulk_copy_if(
                is_first,
                factor_area + stage * (self.tokens * 4),
                address,
                Int32(self.tokens * 4),
                full + stage * 8,
            )

    @cute.jit
    def consume(
        self,
        mma: cute.TiledMma,
        shared_tokens: cute.Tensor,
        shared_out: cute.Tensor,
        full: Int32,
        empty: Int32,
        factor_area: Int32,
        w: cute.Tensor,
        w_scales: cute.Tensor,
        scale_size: Int32,
        out: cute.Tensor,
        tid: Int32,
        warp: Int32,
    ):
        """Multiply the tile and store it."""
        row_block, _, _ = cute.arch.block_idx()
        num_rows, columns = w.shape
        blocks = columns // BLOCK
        lane = tid % 32
        stages = self.stages
        thread_mma = mma.get_slice(tid % 128)
        token_fragments = mma.make_fragment_B(thread_mma.partition_B(shared_tokens))
        shape = mma.partition_shape_C((64, self.tokens))
        products, sums = cute.make_rmem_tensor(shape, Float32), cute.make_rmem_tensor(shape, Float32)
        sums.fill(0.0)
        weights = [cute.make_rmem_tensor(mma.partition_shape_A((64, CHUNK)), Float16) for _ in range(HALVES)]
        raw = cute.make_rmem_tensor(cute.make_layout((8, HALVES)), Uint32)
        # This warp's 16 rows of its warpgroup's 64. Rows past the end repeat the last tile.
        row_tile = cutlass.min(row_block * (BLOCK_ROWS // 16) + warp, num_rows // 16 - 1)
        source = w.iterator.toint() + Int64(row_tile * 16 + lane // 4) * columns + lane % 4 * 16
        below = Int64(8 * columns)  # from row g to row g + 8
        scales = w_scales.iterator.toint()
        first_scale = Int64(cutlass.min(row_block, (num_rows - 1) // BLOCK)) * blocks

        self.load(raw, source, below, 0)
        self.load(raw, source + CHUNK, below, 1)
        scale = load_scale_if(Int32(1), scales, first_scale, scale_size)
        self.decode(raw, weights, 0)
        self.load(raw, source + cutlass.min(1, blocks - 1) * BLOCK, below, 0)
        flat_sums = cute.make_tensor(sums.iterator, cute.make_layout(cute.size(sums)))
        flat_products = cute.make_tensor(products.iterator, cute.make_layout(cute.size(products)))
        for block in cutlass.range(blocks, unroll=1):
            stage = block % stages
            wait_barrier(full + stage * 8, block // stages & 1)
            self.multiply(mma, products, weights[0], token_fragments, stage * HALVES, fresh=True)
            self.decode(raw, weights, 1)
            following = cutlass.min(block + 1, blocks - 1)  # past the last block, the last again
            self.load(raw, source + following * BLOCK + CHUNK, below, 1)
            self.multiply(mma, products, weights[1], token_fragments, stage * HALVES + 1, fresh=False)
            warpgroup.wait_group(1)  # the first half has read its registers
            self.decode(raw, weights, 0)
            self.load(raw, source + cutlass.min(block + 2, blocks - 1) * BLOCK, below, 0)
            factors = []
            for group in cutlass.range_constexpr(self.tokens // 8):
                address = factor_area + (stage * self.tokens + group * 8 + lane % 4 * 2) * 4
                factors.append([scale * factor for factor in load_shared_floats(address, 2)])
            scale = load_scale_if(Int32(1), scales, first_scale + following, scale_size)
            warpgroup.wait_group(0)
            self.release(empty + stage * 8, lane)
            for position in cutlass.range_constexpr(self.tokens // 2):
                factor = factors[position // 4][position % 2]
                flat_sums[position] = flat_sums[position] + flat_products[position] * factor
        self.store(sums, shared_out, out, tid, warp)

    def release(self, barrier, lane):
        """Tell all blocks of the cluster that this warp has read a stage."""
        for rank in range(self.config.cluster):
            arrive_in_cluster_if(lane == 0, barrier, Int32(rank), self.config.cluster)

    def load(self, raw, address, below, half: int):
        """Start loading this lane's 16 bytes of two rows."""
        for index, word in enumerate([*load_global_vector(address, 4), *load_global_vector(address + below, 4)]):
            raw[index, half] = word

    def decode(self, raw, weights, half: int):
        """Expand half of a block of columns to the A operand."""
        registers = cute.recast_tensor(weights[half], Uint32)
        flat = cute.make_tensor(registers.iterator, cute.make_layout(cute.size(registers)))
        for step in range(4):
            above, below = e4m3_pairs(raw[step, half]), e4m3_pairs(raw[4 + step, half])
            for index, pair in enumerate((above[0], below[0], above[1], below[1])):
                flat[step * 4 + index] = pair

    def multiply(self, mma, products, weights, token_fragments, position, fresh: bool):
        """Issue the products of 64 columns as one group; `fresh` ones start from zero."""
        warpgroup.fence()
        for step in range(4):
            mma.set(warpgroup.Field.ACCUMULATE, not (fresh and step == 0))
            cute.gemm(
                mma, products, weights[None, None, step], token_fragments[None, None, step, position], products
            )
        warpgroup.commit_group()

    @cute.jit
    def store(self, sums, shared_out: cute.Tensor, out: cute.Tensor, tid: Int32, warp: Int32):
        """Turn token-major through shared memory, store whole rows."""
        row_block, token_block, _ = cute.arch.block_idx()
        num_tokens, num_rows = out.shape
        lane = tid % 32
        first_row, first_token = warp * 16, token_block * self.tokens
        flat = cute.make_tensor(sums.iterator, cute.make_layout(cute.size(sums)))
        if cutlass.const_expr(self.config.out == "bf16"):
            for blocks in cutlass.range_constexpr(self.tokens // 16):  # two blocks of 8 tokens, two of 8 rows
                words = [
                    pack_bf16(flat[blocks * 8 + index * 2], flat[blocks * 8 + index * 2 + 1]) for index in range(4)
                ]
                token = blocks * 16 + lane // 16 * 8 + lane % 8
                row = first_row + lane // 8 % 2 * 8
                store_matrices_transposed(shared_out.iterator.toint() + (token * OUT_STRIDE + row) * 2, *words)
            cute.arch.barrier(barrier_id=1, number_of_threads=CONSUMERS)
            row = lane % 16 * 8
            for index in cutlass.range_constexpr(self.tokens // (2 * WARPS)):
                token = (index * WARPS + warp) * 2 + lane // 16
                words = load_shared(shared_out.iterator.toint() + (token * OUT_STRIDE + row) * 2, 4)
                wanted = (first_token + token < num_tokens) & (row_block * BLOCK_ROWS + row < num_rows)
                address = out.iterator.toint() + (
                    Int64(first_token + token) * num_rows + row_block * BLOCK_ROWS + row
                ) * 2
                store_global_vector_if(wanted, address, *words)
        else:
            for position in cutlass.range_constexpr(self.tokens // 2):
                token = first_token + position // 4 * 8 + lane % 4 * 2 + position % 2
                row = row_block * BLOCK_ROWS + first_row + lane // 4 + position // 2 % 2 * 8
                if (token < num_tokens) & (row < num_rows):
                    out[token, row] = flat[position]
