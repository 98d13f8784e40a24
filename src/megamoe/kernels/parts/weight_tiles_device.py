# SPDX-License-Identifier: Apache-2.0
"""Device half of weight_tiles."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.arch import inline_ptx
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers

from megamoe.formats.fragment_layout import TILE_CODE_BYTES, TILE_COLUMNS, TILE_ROWS, TILE_SCALE_BYTES
from megamoe.kernels.parts.fragment import UNDO
from megamoe.kernels.parts.fragment_device import (
    block_scales,
    expanding_scales,
    multiply_bf16x2,
    row_major_pairs,
    weight_fragment,
)
from megamoe.kernels.parts.memory_device import (
    arrive_if,
    expect_bytes_if,
    init_barrier,
    load_global_float,
    load_shared,
    pack_bf16,
    publish_barriers,
    publish_to_matrix_unit,
    store_global_vector_if,
    store_matrices_transposed,
    store_shared,
    wait_barrier,
)
from megamoe.kernels.parts.weight_tiles import GROUP_ROWS, RAW_SLOTS, Config, place

OUT_DTYPES = {"bf16": BFloat16, "f32": Float32}
CODE_WORDS = TILE_CODE_BYTES // 4
SCALE_WORDS = TILE_SCALE_BYTES // 4
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
    if config.x == "nvfp4":
        arguments = [
            matrix(Uint8, num_tokens, cute.sym_int32(divisibility=32), 32),
            matrix(Uint8, num_tokens, cute.sym_int32(divisibility=4), 4),
        ]
    else:
        arguments = [matrix(BFloat16, num_tokens, cute.sym_int32(divisibility=8), 8)]
    if config.weight == "bf16":
        arguments.append(matrix(BFloat16, num_rows, cute.sym_int32(divisibility=8), 8))
    else:
        arguments += [
            matrix(Uint8, num_rows, cute.sym_int32(divisibility=32), 32),
            matrix(Uint8, num_rows, cute.sym_int32(divisibility=4), 4),
            make_fake_tensor(Float32, (cute.sym_int32(),), (1,)),
        ]
    if config.x != "bf16":
        arguments.append(make_fake_tensor(Float32, (cute.sym_int32(),), (1,)))
    out = matrix(OUT_DTYPES[config.out], num_tokens, num_rows, out_divisibility)
    arguments += [out, Int32(0), Int32(0), make_fake_stream(use_tvm_ffi_env_stream=True)]
    tiles = WeightTiles(config)
    launcher = {"bf16": tiles.weight_only, "expanded": tiles.expanded, "nvfp4": tiles.both_nvfp4}[config.x]
    launcher = tiles.plain if config.weight == "bf16" else launcher
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
        self.launch((x,), (w,), None, None, out, num_groups, num_blocks, stream)

    @cute.jit
    def weight_only(self, x, codes, scales, tensor_scale, out, num_groups: Int32, num_blocks: Int32, stream):
        self.launch((x,), (codes, scales), tensor_scale, None, out, num_groups, num_blocks, stream)

    @cute.jit
    def expanded(self, x, codes, scales, tensor_scale, token_scales, out, num_groups: Int32, num_blocks: Int32, stream):
        self.launch((x,), (codes, scales), tensor_scale, token_scales, out, num_groups, num_blocks, stream)

    @cute.jit
    def both_nvfp4(
        self,
        x_codes,
        x_scales,
        codes,
        scales,
        tensor_scale,
        token_scales,
        out,
        num_groups: Int32,
        num_blocks: Int32,
        stream,
    ):
        x = (x_codes, x_scales)
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
        token_copy, tokens = None, x
        if config.x != "nvfp4":
            box = cute.slice_(token_layout, (None, None, 0))
            token_copy, tokens = tma(x[0], box, (config.tokens, TILE_COLUMNS))
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
        token_copy,
        tokens,
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
        self.raw = Int32(0)
        if cutlass.const_expr(config.x == "nvfp4"):
            raw = allocator.allocate_tensor(
                Uint32, cute.make_layout((RAW_SLOTS * (4096 + 512) // 4,)), byte_alignment=128
            )
            self.raw = raw.iterator.toint()
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
                init_barrier(self.full + stage * 8, Int32(config.full_arrivals))
                init_barrier(self.empty + stage * 8, Int32(config.consumers // 32))
            init_barrier(self.finished, Int32(config.consumers // 32))
            init_barrier(self.carried, Int32(config.carriers))
            publish_barriers()
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()

        first_other = config.consumers // 32
        if warp >= first_other:
            cute.arch.setmaxregister_decrease(40)
            if cutlass.const_expr(config.x == "nvfp4"):
                self.feed(
                    tokens,
                    shared_tokens.iterator.toint(),
                    weight_copies,
                    weights,
                    shared_weights,
                    barriers,
                    out,
                    num_chunks,
                    num_steps,
                    first_tile,
                    num_tiles,
                    num_blocks,
                    warp - first_other,
                    tid - config.consumers,
                )
            elif warp == first_other:
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
        token_copy,
        tokens,
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
        for tile in cutlass.range(first_tile, num_tiles, num_blocks, unroll=1):
            group, row_block, token_block = self.place(tile)
            if cutlass.const_expr(config.x != "nvfp4"):
                block_tokens = cute.local_tile(tokens, (config.tokens, TILE_COLUMNS), (token_block, None))
                to_tokens, from_tokens = partition(token_copy, shared_tokens, block_tokens)
            first_row = group * self.group_rows + row_block * config.rows
            parts = self.weight_parts(weight_copies, weights, shared_weights, first_row)
            for step in cutlass.range(num_steps, unroll=1):
                wait_barrier(self.empty + stage * 8, parity)
                expect_bytes_if(lane == 0, self.full + stage * 8, Int32(config.copied_bytes))
                full = barriers + stage
                if cutlass.const_expr(config.x != "nvfp4"):
                    column = group * num_chunks + step
                    cute.copy(token_copy, from_tokens[(None, column)], to_tokens[(None, stage)], tma_bar_ptr=full)
                self.copy_weights(weight_copies, parts, step, stage, full)
                at = Place(config, stage, parity)
                at.advance()
                stage, parity = at.stage, at.parity

    def weight_parts(self, copies, weights, shared, first_row):
        """Return what `copy_weights` copies of the rows from one on: stages, and steps of global memory."""
        config = self.config
        if config.weight == "bf16":
            rows = cute.domain_offset((first_row, 0), weights[0])
            return [
                partition(copies[0], shared[0], cute.local_tile(rows, (GROUP_ROWS, TILE_COLUMNS), (index, None)))
                for index in range(config.rows // GROUP_ROWS)
            ]
        parts = []
        for index, words in enumerate((CODE_WORDS, SCALE_WORDS)):
            rows = cute.domain_offset((first_row // TILE_ROWS, 0), weights[index])
            tile = cute.local_tile(rows, (config.row_tiles, words), (0, None))
            parts.append(partition(copies[index], shared[index], tile))
        return parts

    def copy_weights(self, copies, parts, step, stage, full):
        """Start the copies of a step's weights into a stage."""
        for index, (to_weights, from_weights) in enumerate(parts):
            plain = self.config.weight == "bf16"
            copy, target = (copies[0], stage * len(parts) + index) if plain else (copies[index], stage)
            cute.copy(copy, from_weights[(None, step)], to_weights[(None, target)], tma_bar_ptr=full)

    @cute.jit
    def feed(
        self,
        x,
        shared_tokens: Int32,
        weight_copies,
        weights,
        shared_weights,
        barriers,
        out: cute.Tensor,
        num_chunks: Int32,
        num_steps: Int32,
        first_tile: Int32,
        num_tiles: Int32,
        num_blocks: Int32,
        warp: Int32,
        thread: Int32,
    ):
        """Do everything but multiply, with NVFP4 tokens: expand them in place of copies, and carry finished tiles."""
        config = self.config
        codes, scales = x
        row, lane = thread, thread % 32
        target = shared_tokens + row * (TILE_COLUMNS * 2)
        slots, scale_slots = self.raw + thread * 16, self.raw + RAW_SLOTS * 4096 + thread * 4
        position = Int32(0)
        stage, parity, finished_parity = Int32(0), Int32(1), Int32(0)
        carry_step = cutlass.min(num_steps, Int32(config.stages)) - 1  # the ring is full, and consumers busy
        for tile in cutlass.range(first_tile, num_tiles, num_blocks, unroll=1):
            group, row_block, token_block = self.place(tile)
            parts = self.weight_parts(
                weight_copies, weights, shared_weights, group * self.group_rows + row_block * config.rows
            )
            token = Int64(cutlass.min(token_block * config.tokens + row, self.num_tokens - 1))
            chunk = group * num_chunks
            code_address = codes.iterator.toint() + token * codes.shape[1] + chunk * 32
            scale_address = scales.iterator.toint() + token * scales.shape[1] + chunk * 4
            wait_copies(0)  # requests past the end of the tile before went to the same slots
            for ahead in cutlass.range_constexpr(RAW_SLOTS - 1):
                following = cutlass.min(Int32(ahead), num_chunks - 1)
                slot = (position + ahead) % RAW_SLOTS
                request(
                    slots + slot * 4096,
                    code_address + following * 32,
                    scale_slots + slot * 512,
                    scale_address + following * 4,
                )
            for step in cutlass.range(num_steps, unroll=1):
                wait_barrier(self.empty + stage * 8, parity)
                if warp == 0:
                    expect_bytes_if(lane == 0, self.full + stage * 8, Int32(config.copied_bytes))
                    self.copy_weights(weight_copies, parts, step, stage, barriers + stage)
                following = cutlass.min(step + (RAW_SLOTS - 1), num_chunks - 1)
                slot = (position + (RAW_SLOTS - 1)) % RAW_SLOTS
                request(
                    slots + slot * 4096,
                    code_address + following * 32,
                    scale_slots + slot * 512,
                    scale_address + following * 4,
                )
                wait_copies(RAW_SLOTS - 1)
                slot = position % RAW_SLOTS
                position = position + 1
                factors = expanding_scales(load_shared(scale_slots + slot * 512, 1))
                words = [*load_shared(slots + slot * 4096, 4), *load_shared(slots + slot * 4096 + 2048, 4)]
                for index in cutlass.range_constexpr(8):
                    pairs = [multiply_bf16x2(pair, factors[index // 2]) for pair in row_major_pairs(words[index])]
                    column = index ^ (row & 7)
                    store_shared(target + stage * (config.tokens * TILE_COLUMNS * 2) + column * 16, *pairs)
                publish_to_matrix_unit()
                cute.arch.sync_warp()
                arrive_if(lane == 0, self.full + stage * 8)
                if cutlass.const_expr(config.out == "bf16"):
                    if (step == carry_step) & (tile > first_tile):
                        finished_parity = self.carry_tile(out, tile - num_blocks, finished_parity, warp, lane)
                at = Place(config, stage, parity)
                at.advance()
                stage, parity = at.stage, at.parity
        if cutlass.const_expr(config.out == "bf16"):
            last = first_tile + (num_tiles - 1 - first_tile) // num_blocks * num_blocks
            self.carry_tile(out, last, finished_parity, warp, lane)

    @cute.jit
    def carry(
        self, out: cute.Tensor, first_tile: Int32, num_tiles: Int32, num_blocks: Int32, carrier: Int32, lane: Int32
    ):
        """Store all finished tiles."""
        parity = Int32(0)
        for tile in cutlass.range(first_tile, num_tiles, num_blocks, unroll=1):
            parity = self.carry_tile(out, tile, parity, carrier, lane)

    @cute.jit
    def carry_tile(self, out: cute.Tensor, tile: Int32, parity: Int32, carrier: Int32, lane: Int32):
        """Store a finished tile, whole rows of a token; return the parity of the next one."""
        config = self.config
        lanes = config.rows // 8  # a token's rows, 16 bytes a lane
        together = max(1, 32 // lanes)
        group, row_block, token_block = self.place(tile)
        row = lane % lanes * 8
        is_row = row_block * config.rows + row < self.group_rows
        first_row = group * self.group_rows + row_block * config.rows + row
        for piece in cutlass.range_constexpr(config.tokens // config.staged_tokens):
            first_token = token_block * config.tokens + piece * config.staged_tokens
            wait_barrier(self.finished, parity)
            for index in cutlass.range(carrier, config.staged_tokens // together, config.carriers, unroll=1):
                local = index * together + lane // lanes
                words = load_shared(self.finished_tile + (local * config.out_stride + row) * 2, 4)
                token = first_token + local
                target = out.iterator.toint() + (Int64(token) * self.num_rows + first_row) * 2
                store_global_vector_if(is_row & (token < self.num_tokens), target, *words)
            cute.arch.sync_warp()
            arrive_if(lane == 0, self.carried)
            parity = parity ^ 1
        return parity

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
        if cutlass.const_expr(config.weight == "nvfp4"):
            factor = load_global_float(tensor_scale.iterator.toint() + Int64(group) * 4) * UNDO
            factors = [factor, factor]
            for block in cutlass.range_constexpr(config.tokens // 8):
                if cutlass.const_expr(config.x != "bf16"):
                    for index in cutlass.range_constexpr(2):
                        token = cutlass.min(first_token + block * 8 + lane % 4 * 2 + index, self.num_tokens - 1)
                        factors[index] = factor * UNDO * token_scales[token * self.num_groups + group]
                for flat in flats:
                    for position in cutlass.range_constexpr(4):
                        flat[block * 4 + position] = flat[block * 4 + position] * factors[position % 2]
        first_row = warp // 4 * (GROUP_ROWS * config.row_groups) + warp % 4 * 16
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


def request(slot, codes, scale_slot, scales):
    """Start copying 32 bytes of codes and 4 of scales to a thread's own slot, as one group."""
    inline_ptx(
        "cp.async.cg.shared.global [{$r0}], [{$r1}], 16; cp.async.cg.shared.global [{$r2}], [{$r3}], 16; "
        "cp.async.ca.shared.global [{$r4}], [{$r5}], 4; cp.async.commit_group;",
        read_only_args=[slot, codes, slot + 2048, codes + 16, scale_slot, scales],
    )


def wait_copies(pending: int):
    """Wait until all but some groups of this thread's copies are there."""
    inline_ptx(f"cp.async.wait_group {pending};")


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
