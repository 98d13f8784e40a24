# SPDX-License-Identifier: Apache-2.0
"""Device half of weight_tiles."""

import math

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers

from megamoe.formats.fragment_layout import TILE_CODE_BYTES, TILE_COLUMNS, TILE_SCALE_BYTES
from megamoe.kernels.parts.fragment import UNDO
from megamoe.kernels.parts.fragment_device import block_scales, weight_fragment
from megamoe.kernels.parts.memory_device import (
    arrive_if,
    expect_bytes_if,
    init_barrier,
    load_global_float,
    load_global_vector,
    load_shared,
    pack_bf16,
    publish_barriers,
    store_global_vector_if,
    store_matrices_transposed,
    wait_barrier,
)
from megamoe.kernels.parts.weight_tiles import (
    BLOCK_ROWS,
    BLOCK_TOKENS,
    CONSUMERS,
    OUT_STRIDE,
    STAGES,
    THREADS,
    Config,
)

OUT_DTYPES = {"bf16": BFloat16, "f32": Float32}
STEP_BYTES = BLOCK_TOKENS * TILE_COLUMNS * 2
ROW_GROUPS = 2  # groups of 64 rows of a warpgroup


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, num_rows, columns = cute.sym_int32(), cute.sym_int32(divisibility=16), config.num_columns

    def rows(dtype, count, width):
        stride = cute.sym_int64(divisibility=16 if not isinstance(width, int) else math.gcd(width, 16))
        return make_fake_tensor(dtype, (count, width), (stride, 1), assumed_align=16)

    arguments = [
        make_fake_tensor(BFloat16, (num_tokens, columns), (columns, 1), assumed_align=16),
        rows(Uint8, num_rows, columns // 2),
        rows(Uint8, num_rows, columns // 16),
        make_fake_tensor(Float32, (1,), (1,)),
    ]
    if config.scaled:
        arguments.append(make_fake_tensor(Float32, (num_tokens,), (1,)))
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    arguments += [rows(OUT_DTYPES[config.out], num_tokens, num_rows), Int32(0), stream]
    tiles = WeightTiles(config)
    return (tiles.scaled if config.scaled else tiles.plain), tuple(arguments)


class WeightTiles:
    """Each block computes tiles b, b + blocks, .. of 256 weight rows by 128 tokens, all rows of some tokens first."""

    def __init__(self, config: Config):
        self.config = config
        self.chunks = config.num_columns // TILE_COLUMNS

    @cute.jit
    def plain(self, x, codes, scales, tensor_scale, out, num_blocks: Int32, stream):
        self.launch(x, codes, scales, tensor_scale, None, out, num_blocks, stream)

    @cute.jit
    def scaled(self, x, codes, scales, tensor_scale, token_scales, out, num_blocks: Int32, stream):
        self.launch(x, codes, scales, tensor_scale, token_scales, out, num_blocks, stream)

    def launch(self, x, codes, scales, tensor_scale, token_scales, out, num_blocks, stream):
        """Describe the tokens to the copy engine and launch."""
        mma = hopper_helpers.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            warpgroup.OperandMajorMode.K,
            warpgroup.OperandMajorMode.K,
            Float32,
            (1, 1, 1),
            (64, BLOCK_TOKENS),
            warpgroup.OperandSource.RMEM,
        )
        token_layout = hopper_helpers.make_smem_layout_b(
            LayoutEnum.ROW_MAJOR, (64, BLOCK_TOKENS, TILE_COLUMNS), BFloat16, STAGES
        )
        copy, tokens = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            x,
            cute.slice_(token_layout, (None, None, 0)),
            (BLOCK_TOKENS, TILE_COLUMNS),
        )
        self.kernel(mma, copy, tokens, token_layout, codes, scales, tensor_scale, token_scales, out, num_blocks).launch(
            grid=(num_blocks, 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        copy: cute.CopyAtom,
        tokens: cute.Tensor,
        token_layout: cute.ComposedLayout,
        codes: cute.Tensor,
        scales: cute.Tensor,
        tensor_scale: cute.Tensor,
        token_scales,
        out: cute.Tensor,
        num_blocks: Int32,
    ):
        tid, _, _ = cute.arch.thread_idx()
        first_tile, _, _ = cute.arch.block_idx()
        num_tokens, num_rows = out.shape
        row_blocks = (num_rows + (BLOCK_ROWS - 1)) // BLOCK_ROWS
        num_tiles = row_blocks * ((num_tokens + (BLOCK_TOKENS - 1)) // BLOCK_TOKENS)
        warp = cute.arch.make_warp_uniform(tid // 32)
        allocator = cutlass.memory.SmemAllocator()
        barriers = allocator.allocate_array(Int64, 2 * STAGES)  # full, then empty
        shared_tokens = allocator.allocate_tensor(
            BFloat16, token_layout.outer, byte_alignment=1024, swizzle=token_layout.inner
        )
        shared_out = allocator.allocate_tensor(
            BFloat16, cute.make_layout((BLOCK_TOKENS, BLOCK_ROWS), stride=(OUT_STRIDE, 1)), byte_alignment=128
        )
        full = barriers.toint()
        empty = full + STAGES * 8
        if tid == 0:
            for stage in cutlass.range_constexpr(STAGES):
                init_barrier(full + stage * 8, Int32(1))
                init_barrier(empty + stage * 8, Int32(CONSUMERS // 32))
            publish_barriers()
        cute.arch.sync_threads()

        if warp >= CONSUMERS // 32:
            cute.arch.setmaxregister_decrease(24)
            if warp == CONSUMERS // 32:
                position = Int32(0)  # steps since the start, over all tiles
                for tile in cutlass.range(first_tile, num_tiles, num_blocks, unroll=1):
                    block_tokens = cute.local_tile(tokens, (BLOCK_TOKENS, TILE_COLUMNS), (tile // row_blocks, None))
                    to_shared, from_global = cpasync.tma_partition(
                        copy,
                        0,
                        cute.make_layout(1),
                        cute.group_modes(shared_tokens, 0, 2),
                        cute.group_modes(block_tokens, 0, 2),
                    )
                    for step in cutlass.range(self.chunks, unroll=1):
                        stage = position % STAGES
                        wait_barrier(empty + stage * 8, (position // STAGES & 1) ^ 1)
                        expect_bytes_if(cute.arch.lane_idx() == 0, full + stage * 8, Int32(STEP_BYTES))
                        cute.copy(
                            copy, from_global[(None, step)], to_shared[(None, stage)], tma_bar_ptr=barriers + stage
                        )
                        position = position + 1
        else:
            cute.arch.setmaxregister_increase(240)
            position = Int32(0)
            for tile in cutlass.range(first_tile, num_tiles, num_blocks, unroll=1):
                token_block = tile // row_blocks
                self.consume(
                    mma,
                    shared_tokens,
                    shared_out,
                    full,
                    empty,
                    codes,
                    scales,
                    tensor_scale,
                    token_scales,
                    out,
                    tid,
                    warp,
                    tile - token_block * row_blocks,
                    token_block,
                    position,
                )
                position = position + self.chunks

    @cute.jit
    def consume(
        self,
        mma: cute.TiledMma,
        shared_tokens: cute.Tensor,
        shared_out: cute.Tensor,
        full: Int32,
        empty: Int32,
        codes: cute.Tensor,
        scales: cute.Tensor,
        tensor_scale: cute.Tensor,
        token_scales,
        out: cute.Tensor,
        tid: Int32,
        warp: Int32,
        row_block: Int32,
        token_block: Int32,
        position: Int32,
    ):
        """Multiply a tile, whose first step is the block's step number `position`, and store it."""
        num_tokens, num_rows = out.shape
        lane = tid % 32
        thread_mma = mma.get_slice(tid % 128)
        token_fragments = mma.make_fragment_B(thread_mma.partition_B(shared_tokens))
        sums = [cute.make_rmem_tensor(mma.partition_shape_C((64, BLOCK_TOKENS)), Float32) for _ in range(ROW_GROUPS)]
        weights = [
            [cute.make_rmem_tensor(mma.partition_shape_A((64, TILE_COLUMNS)), BFloat16) for _ in range(ROW_GROUPS)]
            for _ in range(2)
        ]
        for group in cutlass.range_constexpr(ROW_GROUPS):
            sums[group].fill(0.0)
        # This warp's row tiles: 16 rows in each group of 64 of its warpgroup. Rows past the end repeat the last tile.
        addresses = []
        for group in cutlass.range_constexpr(ROW_GROUPS):
            row_tile = row_block * (BLOCK_ROWS // 16) + warp // 4 * (4 * ROW_GROUPS) + group * 4 + warp % 4
            chunk = Int64(cutlass.min(row_tile, num_rows // 16 - 1)) * self.chunks
            addresses.append(
                (
                    codes.iterator.toint() + chunk * TILE_CODE_BYTES + lane * 16,
                    scales.iterator.toint() + chunk * TILE_SCALE_BYTES + lane // 4 * 8,
                )
            )
        raw = cute.make_rmem_tensor(cute.make_layout((6, ROW_GROUPS)), Uint32)
        self.load(raw, addresses, Int32(0))

        mma.set(warpgroup.Field.ACCUMULATE, True)
        for pair in cutlass.range((self.chunks + 1) // 2, unroll=1):
            for half in cutlass.range_constexpr(2):  # two sets of registers: one is read while the other is written
                step = pair * 2 + half
                self.decode(raw, weights[half])
                self.load(raw, addresses, cutlass.min(step + 1, self.chunks - 1))
                if cutlass.const_expr(half == 0 or self.chunks % 2 == 0):
                    self.multiply(mma, sums, weights[half], token_fragments, full, position + step)
                else:
                    if step < self.chunks:
                        self.multiply(mma, sums, weights[half], token_fragments, full, position + step)
                warpgroup.wait_group(1)
                self.release(empty, position + step - 1, (lane == 0) & (step > 0) & (step < self.chunks))
        warpgroup.wait_group(0)
        self.release(empty, position + self.chunks - 1, lane == 0)
        self.store(sums, shared_out, tensor_scale, token_scales, out, tid, warp, row_block, token_block)

    def release(self, empty, position, wanted):
        """Let the producer overwrite a step's tokens."""
        arrive_if(wanted, empty + position % STAGES * 8)

    def load(self, raw, addresses, step):
        """Start loading codes and scales of a step."""
        for group in range(ROW_GROUPS):
            code_address, scale_address = addresses[group]
            words = load_global_vector(code_address + Int64(step) * TILE_CODE_BYTES, 4)
            scale_words = load_global_vector(scale_address + Int64(step) * TILE_SCALE_BYTES, 2)
            for index, word in enumerate((*words, *scale_words)):
                raw[index, group] = word

    def decode(self, raw, weights):
        """Expand a step's codes to the A operand."""
        for group in range(ROW_GROUPS):
            registers = cute.recast_tensor(weights[group], Uint32)
            flat = cute.make_tensor(registers.iterator, cute.make_layout(cute.size(registers)))
            upper, lower = block_scales(raw[4, group]), block_scales(raw[5, group])
            for step in range(4):
                fragment = weight_fragment(raw[step, group], upper[step], lower[step])
                for index in range(4):
                    flat[step * 4 + index] = fragment[index]

    def multiply(self, mma, sums, weights, token_fragments, full, position):
        """Issue the products of a step as one group."""
        stage = position % STAGES
        wait_barrier(full + stage * 8, position // STAGES & 1)
        warpgroup.fence()
        for block in range(4):
            for group in range(ROW_GROUPS):
                cute.gemm(
                    mma,
                    sums[group],
                    weights[group][None, None, block],
                    token_fragments[None, None, block, stage],
                    sums[group],
                )
        warpgroup.commit_group()

    @cute.jit
    def store(
        self,
        sums,
        shared_out: cute.Tensor,
        tensor_scale: cute.Tensor,
        token_scales,
        out: cute.Tensor,
        tid: Int32,
        warp: Int32,
        row_block: Int32,
        token_block: Int32,
    ):
        """Scale, turn token-major through shared memory, store whole rows."""
        num_tokens, num_rows = out.shape
        lane = tid % 32
        factor = load_global_float(tensor_scale.iterator.toint()) * UNDO
        first_row = warp // 4 * (64 * ROW_GROUPS) + warp % 4 * 16
        first_token = token_block * BLOCK_TOKENS
        factors = [factor, factor]
        for block in cutlass.range_constexpr(BLOCK_TOKENS // 8):
            if cutlass.const_expr(self.config.scaled):
                for index in cutlass.range_constexpr(2):
                    token = cutlass.min(first_token + block * 8 + lane % 4 * 2 + index, num_tokens - 1)
                    factors[index] = factor * UNDO * token_scales[token]
            for group in cutlass.range_constexpr(ROW_GROUPS):
                flat = cute.make_tensor(sums[group].iterator, cute.make_layout(cute.size(sums[group])))
                for half in cutlass.range_constexpr(2):
                    for index in cutlass.range_constexpr(2):
                        position = block * 4 + half * 2 + index
                        flat[position] = flat[position] * factors[index]
        if cutlass.const_expr(self.config.out == "bf16"):
            cute.arch.barrier(barrier_id=1, number_of_threads=CONSUMERS)  # the tile before has been read
            for group in cutlass.range_constexpr(ROW_GROUPS):
                flat = cute.make_tensor(sums[group].iterator, cute.make_layout(cute.size(sums[group])))
                for blocks in cutlass.range_constexpr(BLOCK_TOKENS // 16):  # two blocks of 8 tokens, two of 8 rows
                    words = [
                        pack_bf16(flat[blocks * 8 + index * 2], flat[blocks * 8 + index * 2 + 1]) for index in range(4)
                    ]
                    token = blocks * 16 + lane // 16 * 8 + lane % 8
                    row = first_row + group * 64 + lane // 8 % 2 * 8
                    store_matrices_transposed(shared_out.iterator.toint() + (token * OUT_STRIDE + row) * 2, *words)
            cute.arch.barrier(barrier_id=1, number_of_threads=CONSUMERS)
            row = row_block * BLOCK_ROWS + lane * 8
            for index in cutlass.range_constexpr(BLOCK_TOKENS // (CONSUMERS // 32)):
                token = index * (CONSUMERS // 32) + warp
                words = load_shared(shared_out.iterator.toint() + (token * OUT_STRIDE + lane * 8) * 2, 4)
                wanted = (first_token + token < num_tokens) & (row < num_rows)
                address = out.iterator.toint() + (Int64(first_token + token) * num_rows + row) * 2
                store_global_vector_if(wanted, address, *words)
        else:
            for group in cutlass.range_constexpr(ROW_GROUPS):
                flat = cute.make_tensor(sums[group].iterator, cute.make_layout(cute.size(sums[group])))
                for position in cutlass.range_constexpr(BLOCK_TOKENS // 2):
                    token = first_token + position // 4 * 8 + lane % 4 * 2 + position % 2
                    row = row_block * BLOCK_ROWS + first_row + group * 64 + lane // 4 + position // 2 % 2 * 8
                    if (token < num_tokens) & (row < num_rows):
                        out[token, row] = flat[position]
