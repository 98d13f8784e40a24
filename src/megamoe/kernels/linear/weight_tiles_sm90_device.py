# SPDX-License-Identifier: Apache-2.0
"""Device half of weight_tiles."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers

from megamoe.formats.fragment_layout import TILE_CODE_BYTES, TILE_COLUMNS, TILE_ROWS, TILE_SCALE_BYTES
from megamoe.kernels.linear.weight_tiles_sm90_config import GROUP_ROWS, Config, place
from megamoe.kernels.parts.fragment import UNDO
from megamoe.kernels.parts.fragment_device import block_scales, weight_fragment
from megamoe.kernels.parts.memory_device import (
    arrive_if,
    expect_bytes_if,
    init_barrier,
    load_global_float,
    load_shared,
    pack_bf16,
    publish_barriers,
    store_global_vector_if,
    store_matrices_transposed,
    wait_barrier,
)

OUT_DTYPES = {"bf16": BFloat16, "f32": Float32}
CODE_WORDS = TILE_CODE_BYTES // 4
SCALE_WORDS = TILE_SCALE_BYTES // 4
STORERS = 3  # warps that carry finished tiles to global memory
STEPS = TILE_COLUMNS // 16  # instructions of a stage and row group


def matrix(dtype, num_rows, num_columns, divisibility: int):
    """Return a contiguous [num_rows, num_columns] argument, 16-byte aligned, with 64-bit offsets."""
    return make_fake_tensor(
        dtype, (num_rows, num_columns), (cute.sym_int64(divisibility=divisibility), 1), assumed_align=16
    )


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, num_rows = cute.sym_int32(), cute.sym_int32(divisibility=16 if config.weight == "nvfp4" else 1)
    out_divisibility = 16 if config.weight == "nvfp4" else 1
    arguments = [matrix(BFloat16, num_tokens, cute.sym_int32(divisibility=8), 8)]
    if config.weight == "bf16":
        arguments.append(matrix(BFloat16, num_rows, cute.sym_int32(divisibility=8), 8))
    else:
        arguments += [
            matrix(Uint8, num_rows, cute.sym_int32(divisibility=32), 32),
            matrix(Uint8, num_rows, cute.sym_int32(divisibility=4), 4),
            make_fake_tensor(Float32, (cute.sym_int32(),), (1,)),
        ]
    if config.scaled:
        arguments.append(make_fake_tensor(Float32, (cute.sym_int32(),), (1,)))
    out = matrix(OUT_DTYPES[config.out], num_tokens, num_rows, out_divisibility)
    arguments += [out, Int32(0), Int32(0), make_fake_stream(use_tvm_ffi_env_stream=True)]
    tiles = WeightTiles(config)
    launcher = tiles.plain if config.weight == "bf16" else tiles.scaled if config.scaled else tiles.weight_only
    return launcher, tuple(arguments)


class Place:
    """Where a warp is in the ring of stages: the stage, and the parity its mbarrier will have."""

    def __init__(self, config: Config, stage, parity):
        self.config, self.stage, self.parity = config, stage, parity

    def advance(self):
        """Go to the next stage."""
        following = self.stage + 1
        wrapped = Int32(following == self.config.stages)
        self.stage = following - wrapped * self.config.stages
        self.parity = self.parity ^ wrapped


class WeightTiles:
    """Block b computes tiles b, b + blocks, .. of some weight rows by some tokens."""

    def __init__(self, config: Config):
        self.config = config

    @cute.jit
    def plain(self, x, w, out, num_groups: Int32, num_blocks: Int32, stream):
        self.launch(x, (w,), None, None, out, num_groups, num_blocks, stream)

    @cute.jit
    def weight_only(self, x, codes, scales, tensor_scale, out, num_groups: Int32, num_blocks: Int32, stream):
        self.launch(x, (codes, scales), tensor_scale, None, out, num_groups, num_blocks, stream)

    @cute.jit
    def scaled(self, x, codes, scales, tensor_scale, token_scales, out, num_groups: Int32, num_blocks: Int32, stream):
        self.launch(x, (codes, scales), tensor_scale, token_scales, out, num_groups, num_blocks, stream)

    def launch(self, x, w, tensor_scale, token_scales, out, num_groups, num_blocks, stream):
        """Describe tokens and weights to the copy engine and launch."""
        config = self.config
        mma = hopper_helpers.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            warpgroup.OperandMajorMode.K,
            warpgroup.OperandMajorMode.K,
            Float32,
            (1, 1, 1),
            (GROUP_ROWS, config.tokens),
            warpgroup.OperandSource.SMEM if config.weight == "bf16" else warpgroup.OperandSource.RMEM,
        )
        tile = (GROUP_ROWS, config.tokens, TILE_COLUMNS)
        token_layout = hopper_helpers.make_smem_layout_b(LayoutEnum.ROW_MAJOR, tile, BFloat16, config.stages)
        token_copy, tokens = tma(x, cute.slice_(token_layout, (None, None, 0)), (config.tokens, TILE_COLUMNS))
        if config.weight == "bf16":
            groups = config.rows // GROUP_ROWS  # stage s has its groups of 64 rows at groups * s and after
            weight_layout = hopper_helpers.make_smem_layout_a(
                LayoutEnum.ROW_MAJOR, tile, BFloat16, config.stages * groups
            )
            copies = (tma(w[0], cute.slice_(weight_layout, (None, None, 0)), (GROUP_ROWS, TILE_COLUMNS)),)
        else:  # a row tile is a row of words: 128 of codes and 16 of scales for each step
            weight_layout = None
            copies = tuple(
                tma(row_tiles(one, words), self.words_layout(words, 1), (config.row_tiles, words))
                for one, words in zip(w, (CODE_WORDS, SCALE_WORDS), strict=True)
            )
        width = w[0].shape[1]
        num_chunks = (width + 63) // 64 if config.weight == "bf16" else width // 32
        # An odd number of chunks gets a step more, of zeros: consumers of NVFP4 take two at a time.
        num_steps = num_chunks if config.weight == "bf16" else (num_chunks + 1) // 2 * 2
        self.kernel(
            mma,
            token_copy,
            tokens,
            token_layout,
            tuple(copy for copy, _ in copies),
            tuple(view for _, view in copies),
            weight_layout,
            tensor_scale,
            token_scales,
            out,
            num_chunks,
            num_steps,
            num_groups,
            num_blocks,
        ).launch(grid=(num_blocks, 1, 1), block=(config.threads, 1, 1), stream=stream, use_pdl=True)

    def words_layout(self, words: int, stages: int):
        """Return where the words of some row tiles lie in shared memory."""
        tiles = self.config.row_tiles
        if stages == 1:
            return cute.make_layout((tiles, words), stride=(words, 1))
        return cute.make_layout((tiles, words, stages), stride=(words, 1, tiles * words))

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        token_copy: cute.CopyAtom,
        tokens: cute.Tensor,
        token_layout: cute.ComposedLayout,
        weight_copies,
        weights,
        weight_layout,
        tensor_scale,
        token_scales,
        out: cute.Tensor,
        num_chunks: Int32,
        num_steps: Int32,
        num_groups: Int32,
        num_blocks: Int32,
    ):
        config = self.config
        tid, _, _ = cute.arch.thread_idx()
        first_tile, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(tid // 32)
        num_tokens, num_rows = out.shape
        self.num_tokens, self.num_rows = num_tokens, num_rows
        self.group_rows = num_rows // num_groups
        self.group_blocks = (self.group_rows + (config.rows - 1)) // config.rows
        self.row_blocks = self.group_blocks * num_groups
        self.token_blocks = (num_tokens + (config.tokens - 1)) // config.tokens
        self.num_groups = num_groups
        num_tiles = self.row_blocks * self.token_blocks

        allocator = cutlass.memory.SmemAllocator()
        barriers = allocator.allocate_array(Int64, 2 * config.stages + 2)  # full, empty, finished, carried
        shared_tokens = allocator.allocate_tensor(
            BFloat16, token_layout.outer, byte_alignment=1024, swizzle=token_layout.inner
        )
        if cutlass.const_expr(config.weight == "bf16"):
            shared_weights = (
                allocator.allocate_tensor(
                    BFloat16, weight_layout.outer, byte_alignment=1024, swizzle=weight_layout.inner
                ),
            )
        else:
            shared_weights = tuple(
                allocator.allocate_tensor(Uint32, self.words_layout(words, config.stages), byte_alignment=128)
                for words in (CODE_WORDS, SCALE_WORDS)
            )
        self.finished_tile = Int32(0)
        if cutlass.const_expr(config.out == "bf16"):
            shared_out = allocator.allocate_tensor(
                BFloat16,
                cute.make_layout((config.staged_tokens, config.rows), stride=(config.out_stride, 1)),
                byte_alignment=128,
            )
            self.finished_tile = shared_out.iterator.toint()
        self.full = barriers.toint()
        self.empty = self.full + config.stages * 8
        self.finished = self.empty + config.stages * 8
        self.carried = self.finished + 8
        if tid == 0:
            for stage in cutlass.range_constexpr(config.stages):
                init_barrier(self.full + stage * 8, Int32(1))
                init_barrier(self.empty + stage * 8, Int32(config.consumers // 32))
            init_barrier(self.finished, Int32(config.consumers // 32))
            init_barrier(self.carried, Int32(STORERS))
            publish_barriers()
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()

        first_other = config.consumers // 32
        if warp >= first_other:
            cute.arch.setmaxregister_decrease(40)
            if warp == first_other:
                self.produce(
                    token_copy,
                    tokens,
                    shared_tokens,
                    weight_copies,
                    weights,
                    shared_weights,
                    barriers,
                    num_chunks,
                    num_steps,
                    first_tile,
                    num_tiles,
                    num_blocks,
                )
            else:
                if cutlass.const_expr(config.out == "bf16"):
                    self.carry(out, first_tile, num_tiles, num_blocks, warp - first_other - 1, tid % 32)
        else:
            cute.arch.setmaxregister_increase(232)
            self.consume(
                mma,
                shared_tokens,
                shared_weights,
                tensor_scale,
                token_scales,
                out,
                num_steps,
                first_tile,
                num_tiles,
                num_blocks,
                tid,
                warp,
            )

    def place(self, tile):
        """Return group, row block within the group, and token block of a tile."""
        return place(tile, self.group_blocks, self.row_blocks, self.token_blocks, cutlass.min)

    @cute.jit
    def produce(
        self,
        token_copy: cute.CopyAtom,
        tokens: cute.Tensor,
        shared_tokens: cute.Tensor,
        weight_copies,
        weights,
        shared_weights,
        barriers,
        num_chunks: Int32,
        num_steps: Int32,
        first_tile: Int32,
        num_tiles: Int32,
        num_blocks: Int32,
    ):
        """Bring tokens and weights of all steps of all tiles."""
        config = self.config
        lane = cute.arch.lane_idx()
        stage, parity = Int32(0), Int32(1)
        groups = config.rows // GROUP_ROWS
        for tile in cutlass.range(first_tile, num_tiles, num_blocks, unroll=1):
            group, row_block, token_block = self.place(tile)
            block_tokens = cute.local_tile(tokens, (config.tokens, TILE_COLUMNS), (token_block, None))
            to_tokens, from_tokens = partition(token_copy, shared_tokens, block_tokens)
            first_row = group * self.group_rows + row_block * config.rows
            if cutlass.const_expr(config.weight == "bf16"):
                rows = cute.domain_offset((first_row, 0), weights[0])
                parts = [
                    partition(
                        weight_copies[0],
                        shared_weights[0],
                        cute.local_tile(rows, (GROUP_ROWS, TILE_COLUMNS), (index, None)),
                    )
                    for index in range(groups)
                ]
            else:
                parts = [
                    partition(
                        weight_copies[index],
                        shared_weights[index],
                        cute.local_tile(
                            cute.domain_offset((first_row // TILE_ROWS, 0), weights[index]),
                            (config.row_tiles, words),
                            (0, None),
                        ),
                    )
                    for index, words in enumerate((CODE_WORDS, SCALE_WORDS))
                ]
            for step in cutlass.range(num_steps, unroll=1):
                wait_barrier(self.empty + stage * 8, parity)
                expect_bytes_if(lane == 0, self.full + stage * 8, Int32(config.stage_bytes))
                full = barriers + stage
                column = group * num_chunks + step
                cute.copy(token_copy, from_tokens[(None, column)], to_tokens[(None, stage)], tma_bar_ptr=full)
                for index in cutlass.range_constexpr(len(parts)):
                    to_weights, from_weights = parts[index]
                    if cutlass.const_expr(config.weight == "bf16"):
                        copy, target = weight_copies[0], stage * groups + index
                    else:
                        copy, target = weight_copies[index], stage
                    cute.copy(copy, from_weights[(None, step)], to_weights[(None, target)], tma_bar_ptr=full)
                at = Place(config, stage, parity)
                at.advance()
                stage, parity = at.stage, at.parity

    @cute.jit
    def carry(
        self, out: cute.Tensor, first_tile: Int32, num_tiles: Int32, num_blocks: Int32, carrier: Int32, lane: Int32
    ):
        """Store finished tiles, whole rows of a token."""
        config = self.config
        lanes = config.rows // 8  # a token's rows, 16 bytes a lane
        together = max(1, 32 // lanes)
        parity = Int32(0)
        for tile in cutlass.range(first_tile, num_tiles, num_blocks, unroll=1):
            group, row_block, token_block = self.place(tile)
            row = lane % lanes * 8
            is_row = row_block * config.rows + row < self.group_rows
            first_row = group * self.group_rows + row_block * config.rows + row
            for piece in cutlass.range_constexpr(config.tokens // config.staged_tokens):
                first_token = token_block * config.tokens + piece * config.staged_tokens
                wait_barrier(self.finished, parity)
                for index in cutlass.range(carrier, config.staged_tokens // together, STORERS, unroll=1):
                    local = index * together + lane // lanes
                    address = self.finished_tile + (local * config.out_stride + row) * 2
                    words = load_shared(address, 4)
                    token = first_token + local
                    target = out.iterator.toint() + (Int64(token) * self.num_rows + first_row) * 2
                    store_global_vector_if(is_row & (token < self.num_tokens), target, *words)
                cute.arch.sync_warp()
                arrive_if(lane == 0, self.carried)
                parity = parity ^ 1

    @cute.jit
    def consume(
        self,
        mma: cute.TiledMma,
        shared_tokens: cute.Tensor,
        shared_weights,
        tensor_scale,
        token_scales,
        out: cute.Tensor,
        num_steps: Int32,
        first_tile: Int32,
        num_tiles: Int32,
        num_blocks: Int32,
        tid: Int32,
        warp: Int32,
    ):
        """Multiply all tiles."""
        config = self.config
        lane = tid % 32
        thread_mma = mma.get_slice(tid % 128)
        token_fragments = mma.make_fragment_B(thread_mma.partition_B(shared_tokens))
        groups = config.row_groups
        sums = [
            cute.make_rmem_tensor(mma.partition_shape_C((GROUP_ROWS, config.tokens)), Float32) for _ in range(groups)
        ]
        if cutlass.const_expr(config.weight == "bf16"):
            weights = mma.make_fragment_A(thread_mma.partition_A(shared_weights[0]))
            addresses = None
        else:
            weights = [
                [
                    cute.make_rmem_tensor(mma.partition_shape_A((GROUP_ROWS, TILE_COLUMNS)), BFloat16)
                    for _ in range(groups)
                ]
                for _ in range(2)
            ]
            # This warp's row tiles: 16 rows in each group of 64 of its warpgroup.
            row_tile = warp // 4 * (4 * groups) + warp % 4
            addresses = (
                shared_weights[0].iterator.toint() + row_tile * TILE_CODE_BYTES + lane * 16,
                shared_weights[1].iterator.toint() + row_tile * TILE_SCALE_BYTES + lane // 4 * 8,
            )
        unrolled = 2 if config.weight == "nvfp4" else 1  # two sets of registers: one is read, the other written
        stage, parity = Int32(0), Int32(0)
        finished_parity = Int32(1)
        mma.set(warpgroup.Field.ACCUMULATE, True)
        for tile in cutlass.range(first_tile, num_tiles, num_blocks, unroll=1):
            for group in cutlass.range_constexpr(groups):
                sums[group].fill(0.0)
            for turn in cutlass.range(num_steps // unrolled, unroll=1):
                for half in cutlass.range_constexpr(unrolled):
                    before = stage
                    stage, parity = self.step(mma, sums, weights, half, token_fragments, addresses, stage, parity, warp)
                    warpgroup.wait_group(1)
                    self.release((lane == 0) & (turn * unrolled + half > 0), before)
            warpgroup.wait_group(0)
            self.release(lane == 0, stage)
            finished_parity = self.finish(sums, tensor_scale, token_scales, out, tile, finished_parity, lane, warp)

    def release(self, wanted, stage):
        """Let the producer overwrite the stage before `stage`."""
        before = stage - 1 + Int32(stage == 0) * self.config.stages
        arrive_if(wanted, self.empty + before * 8)

    def step(self, mma, sums, weights, half: int, token_fragments, addresses, stage, parity, warp):
        """Issue the products of a stage as one group; return the next stage."""
        config = self.config
        wait_barrier(self.full + stage * 8, parity)
        if config.weight == "nvfp4":
            self.decode(weights[half], addresses, stage)
        warpgroup.fence()
        for block in range(STEPS):
            for group in range(config.row_groups):
                if config.weight == "nvfp4":
                    operand = weights[half][group][None, None, block]
                else:
                    row_group = warp // 4 * config.row_groups + group
                    operand = weights[None, None, block, stage * (config.rows // GROUP_ROWS) + row_group]
                cute.gemm(mma, sums[group], operand, token_fragments[None, None, block, stage], sums[group])
        warpgroup.commit_group()
        at = Place(config, stage, parity)
        at.advance()
        return at.stage, at.parity

    def decode(self, weights, addresses, stage):
        """Expand a stage's codes to the A operand."""
        code_address, scale_address = addresses
        tiles = self.config.row_tiles
        for group in range(self.config.row_groups):
            words = load_shared(code_address + stage * (tiles * TILE_CODE_BYTES) + group * (4 * TILE_CODE_BYTES), 4)
            scale_words = load_shared(
                scale_address + stage * (tiles * TILE_SCALE_BYTES) + group * (4 * TILE_SCALE_BYTES), 2
            )
            registers = cute.recast_tensor(weights[group], Uint32)
            flat = cute.make_tensor(registers.iterator, cute.make_layout(cute.size(registers)))
            upper, lower = block_scales(scale_words[0]), block_scales(scale_words[1])
            for step in range(4):
                fragment = weight_fragment(words[step], upper[step], lower[step])
                for index in range(4):
                    flat[step * 4 + index] = fragment[index]

    @cute.jit
    def finish(
        self,
        sums,
        tensor_scale,
        token_scales,
        out: cute.Tensor,
        tile: Int32,
        parity: Int32,
        lane: Int32,
        warp: Int32,
    ):
        """Scale a tile and hand it over, token-major in shared memory; fp32 is stored from here."""
        config = self.config
        group, row_block, token_block = self.place(tile)
        first_token = token_block * config.tokens
        flats = [cute.make_tensor(one.iterator, cute.make_layout(cute.size(one))) for one in sums]
        first_row = warp // 4 * (GROUP_ROWS * config.row_groups) + warp % 4 * 16
        if cutlass.const_expr(config.row_scales):
            row = row_block * config.rows + first_row + lane // 4
            self.scale_rows(flats, tensor_scale, token_scales, row, first_token, lane)
        elif cutlass.const_expr(config.weight == "nvfp4"):
            factor = load_global_float(tensor_scale.iterator.toint() + Int64(group) * 4) * UNDO
            factors = [factor, factor]
            for block in cutlass.range_constexpr(config.tokens // 8):
                if cutlass.const_expr(config.scaled):
                    for index in cutlass.range_constexpr(2):
                        token = cutlass.min(first_token + block * 8 + lane % 4 * 2 + index, self.num_tokens - 1)
                        factors[index] = factor * UNDO * token_scales[token * self.num_groups + group]
                for flat in flats:
                    for position in cutlass.range_constexpr(4):
                        flat[block * 4 + position] = flat[block * 4 + position] * factors[position % 2]
        if cutlass.const_expr(config.out == "bf16"):
            for piece in cutlass.range_constexpr(config.tokens // config.staged_tokens):
                wait_barrier(self.carried, parity)
                for index in cutlass.range_constexpr(config.row_groups):
                    self.stage_out(flats[index], piece, first_row + index * GROUP_ROWS, lane)
                cute.arch.sync_warp()
                arrive_if(lane == 0, self.finished)
                parity = parity ^ 1
        else:
            for index in cutlass.range_constexpr(config.row_groups):
                for position in cutlass.range_constexpr(config.tokens // 2):
                    token = first_token + position // 4 * 8 + lane % 4 * 2 + position % 2
                    local = row_block * config.rows + first_row + index * GROUP_ROWS + lane // 4
                    row = local + position // 2 % 2 * 8
                    if (token < self.num_tokens) & (row < self.group_rows):
                        out[token, group * self.group_rows + row] = flats[index][position]
        return parity

    def scale_rows(self, flats, tensor_scale, token_scales, first_row, first_token, lane):
        """Multiply sums by the tensor scales of their rows, and of their tokens where those have one.

        A thread has rows first_row and first_row + 8 of each group of 64, and two tokens of each 8.
        """
        config = self.config
        for index, flat in enumerate(flats):
            factors = []
            for half in range(2):
                row = cutlass.min(first_row + index * GROUP_ROWS + half * 8, self.group_rows - 1)
                factors.append(load_global_float(tensor_scale.iterator.toint() + Int64(row) * 4) * UNDO)
            for block in range(config.tokens // 8):
                for position in range(4):
                    factor = factors[position // 2]
                    if config.scaled:
                        token = first_token + block * 8 + lane % 4 * 2 + position % 2
                        factor = factor * UNDO * token_scales[cutlass.min(token, self.num_tokens - 1)]
                    flat[block * 4 + position] = flat[block * 4 + position] * factor

    def stage_out(self, flat, piece: int, first_row, lane):
        """Write a group of rows of some tokens to shared memory, turned token-major."""
        config = self.config
        first = piece * config.staged_tokens // 16
        for blocks in range(config.staged_tokens // 16):  # two blocks of 8 tokens, two of 8 rows
            start = (first + blocks) * 8
            words = [pack_bf16(flat[start + index * 2], flat[start + index * 2 + 1]) for index in range(4)]
            token = blocks * 16 + lane // 16 * 8 + lane % 8
            row = first_row + lane // 8 % 2 * 8
            store_matrices_transposed(self.finished_tile + (token * config.out_stride + row) * 2, *words)


def tma(source, layout, tile):
    """Return a copy atom for tiles of a matrix, and the matrix as the copy engine sees it."""
    return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), source, layout, tile)


def partition(copy, shared, tiles):
    """Return stages of shared memory, and tiles of a matrix, as one mode each."""
    return cpasync.tma_partition(
        copy, 0, cute.make_layout(1), cute.group_modes(shared, 0, 2), cute.group_modes(tiles, 0, 2)
    )


def row_tiles(source, words: int):
    """Return bytes in fragment order as a matrix of words with one row a row tile."""
    num_rows, width = source.shape
    columns = width * TILE_ROWS // 4
    pointer = cute.recast_ptr(source.iterator, dtype=Uint32)
    return cute.make_tensor(pointer, cute.make_layout((num_rows // TILE_ROWS, columns), stride=(columns, 1)))
