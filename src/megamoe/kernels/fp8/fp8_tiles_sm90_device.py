# SPDX-License-Identifier: Apache-2.0
"""Device half of fp8_tiles."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers

from megamoe.kernels.fp8.fp8_device import (
    e4m3_pairs,
    folded_pairs,
    folding_factor,
    load_scale_if,
    load_two_floats,
    nan_of_row,
)
from megamoe.kernels.fp8.fp8_expand_config import PADDED_TOKENS
from megamoe.kernels.fp8.fp8_stream_config import BLOCK, CHUNK
from megamoe.kernels.fp8.fp8_stream_device import symbolic_scales
from megamoe.kernels.fp8.fp8_tiles_sm90_config import CONSUMERS, GROUP_ROWS, THREADS, UNDO, Config
from megamoe.kernels.parts.memory_device import (
    arrive_if,
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
STEPS = CHUNK // 16
WARPS = CONSUMERS // 32
STORED_TOKENS = 32  # that a warp turns round at once
STORED_STRIDE = 48  # bytes between the tokens of its 16 rows: 32 used, so that rows of a matrix lie in other banks


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
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    tiles = Fp8Tiles(config)
    return (tiles.folded if config.folded else tiles.apart), arguments


class Fp8Tiles:
    """A block computes tiles of `block_rows` weight rows by `block_tokens` tokens."""

    def __init__(self, config: Config):
        self.config = config
        self.tokens, self.stages = config.block_tokens, config.stages
        self.groups = config.block_rows // GROUP_ROWS  # groups of 64 rows of a warpgroup
        self.values = BFloat16 if config.folded else Float16

    @cute.jit
    def folded(self, x, w, w_scales, scale_size: Int32, out, num_blocks: Int32, stream):
        self.launch(x, w, None, w_scales, scale_size, out, num_blocks, stream)

    @cute.jit
    def apart(self, x, w, factors, w_scales, scale_size: Int32, out, num_blocks: Int32, stream):
        self.launch(x, w, factors, w_scales, scale_size, out, num_blocks, stream)

    def launch(self, x, w, factors, w_scales, scale_size, out, num_blocks, stream):
        """Describe the operands to the copy engine and launch."""
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
        copies = [self.describe(x, token_layout, (self.tokens, CHUNK))]
        if config.folded:
            weight_layout = hopper_helpers.make_smem_layout_b(
                LayoutEnum.ROW_MAJOR, (64, config.block_rows, BLOCK), Uint8, self.stages
            )
            copies.append(self.describe(w, weight_layout, (config.block_rows, BLOCK)))
        self.kernel(mma, copies, factors, w, w_scales, scale_size, out, num_blocks).launch(
            grid=(num_blocks, 1, 1), block=(THREADS, 1, 1), stream=stream
        )

    def describe(self, matrix, layout, tile):
        """Return how tiles of a matrix are copied: the operation, the matrix as it sees it, shared memory's layout."""
        operation = cpasync.CopyBulkTensorTileG2SOp()
        return (*cpasync.make_tiled_tma_atom(operation, matrix, cute.slice_(layout, (None, None, 0)), tile), layout)

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        copies,
        factors,
        w: cute.Tensor,
        w_scales: cute.Tensor,
        scale_size: Int32,
        out: cute.Tensor,
        num_blocks: Int32,
    ):
        tid, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(tid // 32)
        stages, config = self.stages, self.config
        allocator = cutlass.memory.SmemAllocator()
        barriers = allocator.allocate_array(Int64, 2 * stages)  # full, then empty
        areas = []
        for index in cutlass.range_constexpr(len(copies)):
            layout = copies[index][2]
            dtype = self.values if index == 0 else Uint8
            areas.append(allocator.allocate_tensor(dtype, layout.outer, byte_alignment=1024, swizzle=layout.inner))
        stored = allocator.allocate_array(Uint8, WARPS * STORED_TOKENS * STORED_STRIDE, byte_alignment=16)
        full = barriers.toint()
        empty = full + stages * 8
        if tid == 0:
            for stage in cutlass.range_constexpr(stages):
                init_barrier(full + stage * 8, Int32(1))
                init_barrier(empty + stage * 8, Int32(WARPS))
            publish_barriers()
        cute.arch.sync_threads()

        # Tiles of this block: every num_blocks-th, rows first.
        num_tokens, num_rows = out.shape
        row_blocks = (num_rows + (config.block_rows - 1)) // config.block_rows
        num_tiles = row_blocks * ((num_tokens + (self.tokens - 1)) // self.tokens)
        work = (row_blocks, num_tiles, num_blocks)
        if warp >= WARPS:
            cute.arch.setmaxregister_decrease(40)
            if warp == WARPS:
                self.produce(copies, areas, barriers, work, w.shape[1] // BLOCK)
        else:
            cute.arch.setmaxregister_increase(232)
            thread = (tid, warp, full, empty)
            weight = (w, w_scales.iterator.toint(), scale_size)
            output = (stored.toint() + warp * (STORED_TOKENS * STORED_STRIDE), out)
            if cutlass.const_expr(config.folded):
                self.consume_folded(mma, areas[0], areas[1].iterator.toint(), weight, output, thread, work)
            else:
                self.consume_apart(mma, areas[0], factors, weight, output, thread, work)

    @cute.jit
    def produce(self, copies, areas, barriers: cute.Pointer, work, blocks: Int32):
        """Keep the stages full."""
        row_blocks, num_tiles, num_blocks = work
        first, _, _ = cute.arch.block_idx()
        is_first = cute.arch.lane_idx() == 0
        slot, parity = Int32(0), Int32(1)
        for tile in cutlass.range(first, num_tiles, num_blocks, unroll=1):
            token_block = tile // row_blocks
            row_block = tile - token_block * row_blocks
            parts = [self.partition(copies[0], areas[0], (self.tokens, CHUNK), token_block)]
            if cutlass.const_expr(self.config.folded):
                parts.append(self.partition(copies[1], areas[1], (self.config.block_rows, BLOCK), row_block))
            for block in cutlass.range(blocks, unroll=1):
                full = barriers.toint() + slot * 8
                wait_barrier(full + self.stages * 8, parity)
                expect_bytes_if(is_first, full, Int32(self.config.stage_bytes))
                for half in cutlass.range_constexpr(HALVES):
                    target, source = (
                        parts[0][0][(None, slot * HALVES + half)],
                        parts[0][1][(None, block * HALVES + half)],
                    )
                    cute.copy(copies[0][0], source, target, tma_bar_ptr=barriers + slot)
                if cutlass.const_expr(self.config.folded):
                    target, source = parts[1][0][(None, slot)], parts[1][1][(None, block)]
                    cute.copy(copies[1][0], source, target, tma_bar_ptr=barriers + slot)
                slot, parity = self.following(slot, parity)

    def partition(self, copy, area, shape, index):
        """Return where the copies of a row of tiles go and come from."""
        tile = cute.local_tile(copy[1], shape, (index, None))
        return cpasync.tma_partition(
            copy[0], 0, cute.make_layout(1), cute.group_modes(area, 0, 2), cute.group_modes(tile, 0, 2)
        )

    def following(self, slot, parity):
        """Return the stage after one, and the parity of its barrier."""
        after = slot + 1
        wrapped = Int32(after == self.stages)
        return after - wrapped * self.stages, parity ^ wrapped

    def operands(self, mma, shared_tokens, tid):
        """Return token fragments, accumulators by group, and two sets of weight registers by group."""
        fragments = mma.make_fragment_B(mma.get_slice(tid % 128).partition_B(shared_tokens))
        shape_c, shape_a = mma.partition_shape_C((64, self.tokens)), mma.partition_shape_A((64, CHUNK))
        sums = [cute.make_rmem_tensor(shape_c, Float32) for _ in range(self.groups)]
        weights = [[cute.make_rmem_tensor(shape_a, self.values) for _ in range(self.groups)] for _ in range(HALVES)]
        return fragments, sums, weights

    def first_scale(self, w, row_block, warp):
        """Return the index of the scale of a warpgroup's rows of a tile and the first block of columns."""
        row = row_block * self.config.block_rows + warp // 4 * (64 * self.groups)
        return cutlass.min(row, w.shape[0] - 1) // BLOCK * (w.shape[1] // BLOCK)

    @cute.jit
    def consume_folded(self, mma: cute.TiledMma, shared_tokens: cute.Tensor, area: Int32, weight, output, thread, work):
        """Multiply tiles and store them; the scales are in the operands."""
        tid, warp, full, empty = thread
        w, scales, scale_size = weight
        row_blocks, num_tiles, num_blocks = work
        first, _, _ = cute.arch.block_idx()
        lane, blocks = tid % 32, w.shape[1] // BLOCK
        stage_bytes = self.config.block_rows * BLOCK
        fragments, sums, weights = self.operands(mma, shared_tokens, tid)
        # Row g of this warp's first group, and the first of its pieces of 16 bytes: swizzled, so that banks differ.
        row = warp // 4 * (64 * self.groups) + warp % 4 * 16 + lane // 4
        area = area + row * BLOCK + (lane % 4 * 2 ^ lane // 4) * 16
        raw = cute.make_rmem_tensor(cute.make_layout((8, self.groups)), Uint32)
        nan = cute.make_rmem_tensor(cute.make_layout((2, self.groups)), Uint32)
        slot, parity = Int32(0), Int32(0)
        wait_barrier(full, parity)
        self.load_pieces(raw, area)
        byte = load_global_if(Int32(1), scales + Int64(self.first_scale(w, first % row_blocks, warp)), 8)
        for tile in cutlass.range(first, num_tiles, num_blocks, unroll=1):
            for group in cutlass.range_constexpr(self.groups):
                sums[group].fill(0.0)
            nan.fill(0)
            first_scale = self.first_scale(w, tile % row_blocks, warp)
            next_tile = tile + num_blocks
            for block in cutlass.range(blocks, unroll=1):
                next_slot, next_parity = self.following(slot, parity)
                factor = folding_factor(byte)
                is_last_block = block + 1 == blocks
                scale_index = first_scale + block + 1
                if is_last_block:
                    scale_index = self.first_scale(w, next_tile % row_blocks, warp)
                byte = load_global_if(Int32(1), scales + Int64(scale_index), 8)
                # What is loaded after this stage: the next one, or where there is none, this one again.
                ahead_slot, ahead_parity = next_slot, next_parity
                if is_last_block & (next_tile >= num_tiles):
                    ahead_slot, ahead_parity = slot, parity
                for half in cutlass.range_constexpr(HALVES):  # one set of registers is read, the other written
                    for group in cutlass.range_constexpr(self.groups):
                        self.fold(raw, weights[half][group], factor, nan, group)
                    if cutlass.const_expr(half == 0):
                        self.load_pieces(raw, (area + slot * stage_bytes) ^ 16)
                    else:
                        wait_barrier(full + ahead_slot * 8, ahead_parity)
                        self.load_pieces(raw, area + ahead_slot * stage_bytes)
                    self.multiply(mma, sums, weights[half], fragments, slot * HALVES + half)
                    warpgroup.wait_group(1)
                    if cutlass.const_expr(half == 0):  # the stage before has been read
                        before = slot + (self.stages - 1)
                        before = before - Int32(before >= self.stages) * self.stages
                        arrive_if((lane == 0) & (block > 0), empty + before * 8)
                slot, parity = next_slot, next_parity
            warpgroup.wait_group(0)
            before = slot + (self.stages - 1)
            before = before - Int32(before >= self.stages) * self.stages
            arrive_if(lane == 0, empty + before * 8)
            for group in cutlass.range_constexpr(self.groups):
                bias = [nan_of_row(nan[row, group]) for row in range(2)]
                flat = cute.make_tensor(sums[group].iterator, cute.make_layout(cute.size(sums[group])))
                for position in cutlass.range_constexpr(self.tokens // 2):
                    flat[position] = fma(flat[position], Float32(UNDO), bias[position // 2 % 2])
            self.store(sums, output, tile, row_blocks, warp, lane)

    def load_pieces(self, raw, address):
        """Load half a block of columns of rows g and g + 8 of every group."""
        for group in range(self.groups):
            for row in range(2):
                for index, word in enumerate(load_shared(address + (group * 64 + row * 8) * BLOCK, 4)):
                    raw[row * 4 + index, group] = word

    def fold(self, raw, weights, factor, nan, group: int):
        """Expand half a block of columns to the A operand, scaled."""
        registers = cute.recast_tensor(weights, Uint32)
        flat = cute.make_tensor(registers.iterator, cute.make_layout(cute.size(registers)))
        for step in range(STEPS):
            for row in range(2):
                pairs = folded_pairs(raw[4 * row + step, group], factor, nan[row, group])
                flat[step * 4 + row], flat[step * 4 + 2 + row], nan[row, group] = pairs

    @cute.jit
    def consume_apart(self, mma: cute.TiledMma, shared_tokens: cute.Tensor, factors, weight, output, thread, work):
        """Multiply tiles and store them; scales multiply sums of 128 products."""
        tid, warp, full, empty = thread
        w, scales, scale_size = weight
        row_blocks, num_tiles, num_blocks = work
        first, _, _ = cute.arch.block_idx()
        num_rows, columns = w.shape
        lane, blocks = tid % 32, columns // BLOCK
        fragments, (products,), weights = self.operands(mma, shared_tokens, tid)
        sums = cute.make_rmem_tensor(mma.partition_shape_C((64, self.tokens)), Float32)
        raw = [cute.make_rmem_tensor(cute.make_layout(8), Uint32) for _ in range(HALVES)]
        flat_sums = cute.make_tensor(sums.iterator, cute.make_layout(cute.size(sums)))
        flat_products = cute.make_tensor(products.iterator, cute.make_layout(cute.size(products)))
        below = Int64(8 * columns)  # from row g to row g + 8
        slot, parity = Int32(0), Int32(0)
        for tile in cutlass.range(first, num_tiles, num_blocks, unroll=1):
            sums.fill(0.0)
            token_block = tile // row_blocks
            row_block = tile - token_block * row_blocks
            row_tile = cutlass.min(row_block * (GROUP_ROWS // 16) + warp, num_rows // 16 - 1)  # past the end, the last
            source = w.iterator.toint() + Int64(row_tile * 16 + lane // 4) * columns + lane % 4 * 16
            first_scale = self.first_scale(w, row_block, warp)
            token = token_block * self.tokens + lane % 4 * 2
            self.load(raw[0], source, below)
            self.load(raw[1], source + CHUNK, below)
            scale = load_scale_if(Int32(1), scales, Int64(first_scale), scale_size)
            self.decode(raw[0], weights[0][0])
            self.load(raw[0], source + cutlass.min(1, blocks - 1) * BLOCK, below)
            for block in cutlass.range(blocks, unroll=1):
                # Not through shared memory: the stage may be filled anew before such loads have come back.
                address = factors.iterator.toint() + (Int64(block) * factors.layout.stride[0] + token) * 4
                token_scales = [load_two_floats("global", address + group * 32) for group in range(self.tokens // 8)]
                wait_barrier(full + slot * 8, parity)
                self.multiply(mma, [products], weights[0], fragments, slot * HALVES, fresh=True)
                self.decode(raw[1], weights[1][0])
                following = cutlass.min(block + 1, blocks - 1)  # past the last block, the last again
                self.load(raw[1], source + following * BLOCK + CHUNK, below)
                self.multiply(mma, [products], weights[1], fragments, slot * HALVES + 1)
                warpgroup.wait_group(1)  # the first half has read its registers
                self.decode(raw[0], weights[0][0])
                self.load(raw[0], source + cutlass.min(block + 2, blocks - 1) * BLOCK, below)
                warpgroup.wait_group(0)
                arrive_if(lane == 0, empty + slot * 8)
                for position in cutlass.range_constexpr(self.tokens // 2):
                    factor = scale * token_scales[position // 4][position % 2]
                    flat_sums[position] = flat_sums[position] + flat_products[position] * factor
                scale = load_scale_if(Int32(1), scales, Int64(first_scale + following), scale_size)
                slot, parity = self.following(slot, parity)
            self.store([sums], output, tile, row_blocks, warp, lane)

    def load(self, raw, address, below):
        """Start loading this lane's 16 bytes of rows g and g + 8."""
        for index, word in enumerate([*load_global_vector(address, 4), *load_global_vector(address + below, 4)]):
            raw[index] = word

    def decode(self, raw, weights):
        """Expand half a block of columns to the A operand."""
        registers = cute.recast_tensor(weights, Uint32)
        flat = cute.make_tensor(registers.iterator, cute.make_layout(cute.size(registers)))
        for step in range(STEPS):
            above, below = e4m3_pairs(raw[step]), e4m3_pairs(raw[4 + step])
            for index, pair in enumerate((above[0], below[0], above[1], below[1])):
                flat[step * 4 + index] = pair

    def multiply(self, mma, sums, weights, fragments, position, fresh: bool = False):
        """Issue the products of 64 columns as one group; `fresh` ones start from zero."""
        warpgroup.fence()
        for step in range(STEPS):
            mma.set(warpgroup.Field.ACCUMULATE, not (fresh and step == 0))
            for group in range(self.groups):
                cute.gemm(
                    mma,
                    sums[group],
                    weights[group][None, None, step],
                    fragments[None, None, step, position],
                    sums[group],
                )
        warpgroup.commit_group()

    @cute.jit
    def store(self, sums, output, tile: Int32, row_blocks: Int32, warp: Int32, lane: Int32):
        """Store a tile: a warp turns its rows token-major through shared memory of its own."""
        stored, out = output
        num_tokens, num_rows = out.shape
        token_block = tile // row_blocks
        first_token = token_block * self.tokens
        first_row = (tile - token_block * row_blocks) * self.config.block_rows
        first_row = first_row + warp // 4 * (64 * self.groups) + warp % 4 * 16
        for group in cutlass.range_constexpr(self.groups):
            flat = cute.make_tensor(sums[group].iterator, cute.make_layout(cute.size(sums[group])))
            row = first_row + group * 64
            if cutlass.const_expr(self.config.out == "bf16"):
                for start in cutlass.range_constexpr(0, self.tokens, STORED_TOKENS):
                    for blocks in cutlass.range_constexpr(STORED_TOKENS // 16):  # two of 8 tokens, two of 8 rows
                        at = (start // 16 + blocks) * 8
                        words = [pack_bf16(flat[at + index * 2], flat[at + index * 2 + 1]) for index in range(4)]
                        token = blocks * 16 + lane // 16 * 8 + lane % 8
                        store_matrices_transposed(stored + token * STORED_STRIDE + lane // 8 % 2 * 16, *words)
                    cute.arch.sync_warp()
                    for index in cutlass.range_constexpr(STORED_TOKENS // 16):
                        token = index * 16 + lane // 2
                        words = load_shared(stored + token * STORED_STRIDE + lane % 2 * 16, 4)
                        wanted = (first_token + start + token < num_tokens) & (row < num_rows)
                        place = Int64(first_token + start + token) * out.layout.stride[0] + row + lane % 2 * 8
                        store_global_vector_if(wanted, out.iterator.toint() + place * 2, *words)
                    cute.arch.sync_warp()
            else:
                for position in cutlass.range_constexpr(self.tokens // 2):
                    token = first_token + position // 4 * 8 + lane % 4 * 2 + position % 2
                    column = row + lane // 4 + position // 2 % 2 * 8
                    if (token < num_tokens) & (column < num_rows):
                        out[token, column] = flat[position]
