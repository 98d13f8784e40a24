# SPDX-License-Identifier: Apache-2.0
"""Device half of expert_tiles."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint32
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers

from megamoe.formats.fragment_layout import TILE_CODE_BYTES, TILE_COLUMNS, TILE_SCALE_BYTES
from megamoe.kernels.experts.expert_tiles_sm90_config import (
    BOX_TOKENS,
    CONSUMERS,
    HALF_ROWS,
    HALF_TILES,
    STEP_BYTES,
    THREADS,
    Config,
)
from megamoe.kernels.experts.sort_pairs_config import PASS_FIELDS, SHARED_EXPERT
from megamoe.kernels.parts.fragment import UNDO
from megamoe.kernels.parts.fragment_device import block_scales, weight_fragment
from megamoe.kernels.parts.memory_device import (
    arrive_if,
    expect_bytes_if,
    init_barrier,
    load_global_float,
    load_global_int,
    load_shared,
    pack_bf16,
    predicated,
    publish_barriers,
    store_global_vector_if,
    store_matrices_transposed,
    wait_barrier,
)
from megamoe.kernels.parts.ptx_device import max_keeping_nan, min_keeping_nan

OUT_DTYPES = {"bf16": BFloat16, "f32": Float32}
LOG2_E = 1.4426950408889634
CODE_WORDS, SCALE_WORDS = TILE_CODE_BYTES // 4, TILE_SCALE_BYTES // 4
BOX_BYTES = BOX_TOKENS * TILE_COLUMNS * 2
TURN = 3  # named barriers 3 and 4: whose turn it is to issue products
HALVES = 2  # groups of 64 rows of a warpgroup: w1 and w3, or the halves of a block of w2


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_pairs, bound = cute.sym_int32(), cute.sym_int32()
    chunks = config.num_columns // TILE_COLUMNS

    def matrix(dtype, count, width):
        return make_fake_tensor(dtype, (count, width), (width, 1), assumed_align=16)

    def vector(dtype, size):
        return make_fake_tensor(dtype, (size,), (1,))

    x = (matrix(BFloat16, num_pairs, config.num_columns),)
    if config.scaled:
        x = (*x, vector(Float32, num_pairs))

    def weight():
        row_tiles = cute.sym_int32()
        codes, scales = (matrix(Int32, row_tiles, chunks * words) for words in (CODE_WORDS, SCALE_WORDS))
        return codes, scales, vector(Float32, cute.sym_int32())

    passes = (matrix(Int32, bound, PASS_FIELDS), vector(Int32, cute.sym_int32()))
    out = matrix(OUT_DTYPES[config.out], num_pairs, config.num_rows)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    tiles = ExpertTiles(config)
    if config.step == "down":
        launcher = tiles.down_scaled if config.scaled else tiles.down
        return launcher, (*x, *weight(), *weight(), *passes, vector(Int32, num_pairs), out, Int32(0), stream)
    launcher = tiles.gate_up_scaled if config.scaled else tiles.gate_up
    weights = (*weight(), *weight(), *weight(), *weight())
    return launcher, (*x, *weights, *passes, vector(Float32, num_pairs), out, Float32(0.0), Int32(0), stream)


class ExpertTiles:
    """One of the two products; each block computes tiles b, b + blocks, .. of 256 weight rows and one pass."""

    def __init__(self, config: Config):
        self.config = config
        self.chunks = config.num_columns // TILE_COLUMNS
        self.stages = config.stages

    # Weights are codes, scales and tensor scales of w1, w3 and w2; v1, v3 and v2 are the shared expert's.

    @cute.jit
    def gate_up(
        self,
        x,
        c1,
        s1,
        t1,
        c3,
        s3,
        t3,
        vc1,
        vs1,
        vt1,
        vc3,
        vs3,
        vt3,
        passes,
        num_passes,
        route,
        out,
        limit: Float32,
        blocks: Int32,
        stream,
    ):
        weights, shared = ((c1, s1, t1), (c3, s3, t3)), ((vc1, vs1, vt1), (vc3, vs3, vt3))
        self.launch(x, None, weights, shared, passes, num_passes, route, out, limit, blocks, stream)

    @cute.jit
    def gate_up_scaled(
        self,
        x,
        xt,
        c1,
        s1,
        t1,
        c3,
        s3,
        t3,
        vc1,
        vs1,
        vt1,
        vc3,
        vs3,
        vt3,
        passes,
        num_passes,
        route,
        out,
        limit: Float32,
        blocks: Int32,
        stream,
    ):
        weights, shared = ((c1, s1, t1), (c3, s3, t3)), ((vc1, vs1, vt1), (vc3, vs3, vt3))
        self.launch(x, xt, weights, shared, passes, num_passes, route, out, limit, blocks, stream)

    @cute.jit
    def down(self, x, c2, s2, t2, vc2, vs2, vt2, passes, num_passes, order, out, blocks: Int32, stream):
        weights, shared = ((c2, s2, t2),), ((vc2, vs2, vt2),)
        self.launch(x, None, weights, shared, passes, num_passes, order, out, Float32(0.0), blocks, stream)

    @cute.jit
    def down_scaled(self, x, xt, c2, s2, t2, vc2, vs2, vt2, passes, num_passes, order, out, blocks: Int32, stream):
        weights, shared = ((c2, s2, t2),), ((vc2, vs2, vt2),)
        self.launch(x, xt, weights, shared, passes, num_passes, order, out, Float32(0.0), blocks, stream)

    def launch(self, x, row_scales, weights, shared, passes, num_passes, per_pair, out, limit, blocks, stream):
        """Describe tokens and weights to the copy engine and launch."""
        token_layout = hopper_helpers.make_smem_layout_b(
            LayoutEnum.ROW_MAJOR, (64, self.config.pass_tokens, TILE_COLUMNS), BFloat16, self.stages
        )
        box_layout = hopper_helpers.make_smem_layout_b(
            LayoutEnum.ROW_MAJOR, (64, BOX_TOKENS, TILE_COLUMNS), BFloat16, 1
        )
        to_shared = cpasync.CopyBulkTensorTileG2SOp()
        boxes = cpasync.make_tiled_tma_atom(
            to_shared, x, cute.slice_(box_layout, (None, None, 0)), (BOX_TOKENS, TILE_COLUMNS)
        )
        self.kernel(
            (boxes[0], boxes[1]),
            token_layout,
            (self.described(to_shared, weights, 0, CODE_WORDS), self.described(to_shared, shared, 0, CODE_WORDS)),
            (self.described(to_shared, weights, 1, SCALE_WORDS), self.described(to_shared, shared, 1, SCALE_WORDS)),
            tuple((weight[2], one[2]) for weight, one in zip(weights, shared, strict=True)),
            row_scales,
            passes,
            num_passes,
            per_pair,
            out,
            limit,
            blocks,
        ).launch(
            grid=(blocks, 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
            use_pdl=True,
            min_blocks_per_mp=1,  # without it the compiler ignores setmaxnreg, and may wait after every instruction
        )

    def described(self, operation, weights, part: int, words: int):
        """Return copy atom and coordinates of the codes (part 0) or scales (1) of each weight."""
        layout = cute.make_layout((HALF_TILES, words), stride=(words, 1))
        infos = [cpasync.make_tiled_tma_atom(operation, one[part], layout, (HALF_TILES, words)) for one in weights]
        return tuple((info[0], info[1]) for info in infos)

    @cute.kernel
    def kernel(
        self,
        boxes,
        token_layout: cute.ComposedLayout,
        codes,
        scales,
        tensor_scales,
        row_scales,
        passes: cute.Tensor,
        num_passes: cute.Tensor,
        per_pair: cute.Tensor,
        out: cute.Tensor,
        limit: Float32,
        num_blocks: Int32,
    ):
        stages, row_blocks = self.stages, self.config.row_blocks
        tid, _, _ = cute.arch.thread_idx()
        first_tile, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(tid // 32)
        self.group = warp // 4  # the warpgroup
        allocator = cutlass.memory.SmemAllocator()
        barriers = allocator.allocate_array(Int64, 2 * stages)  # full, then empty
        shared_tokens = allocator.allocate_tensor(
            BFloat16, token_layout.outer, byte_alignment=1024, swizzle=token_layout.inner
        )
        shared_codes = allocator.allocate_tensor(Int32, half_layout(CODE_WORDS, stages), byte_alignment=128)
        shared_scales = allocator.allocate_tensor(Int32, half_layout(SCALE_WORDS, stages), byte_alignment=128)
        shared_out = allocator.allocate_tensor(
            BFloat16, cute.make_layout(self.config.pass_tokens * self.config.out_stride), byte_alignment=128
        )
        full = barriers.toint()
        empty = full + stages * 8
        if tid == 0:
            for stage in cutlass.range_constexpr(stages):
                init_barrier(full + stage * 8, Int32(1))
                init_barrier(empty + stage * 8, Int32(CONSUMERS // 32))
            publish_barriers()
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        num_tiles = load_global_int(num_passes.iterator.toint()) * row_blocks

        if warp >= CONSUMERS // 32:
            cute.arch.setmaxregister_decrease(40)
            if warp == CONSUMERS // 32:
                self.produce(
                    boxes,
                    codes,
                    scales,
                    passes,
                    shared_tokens,
                    shared_codes,
                    shared_scales,
                    barriers,
                    empty,
                    first_tile,
                    num_tiles,
                    num_blocks,
                )
        else:
            cute.arch.setmaxregister_increase(232)
            position = Int32(0)  # steps since the start, over all tiles
            if self.group == 1:  # the first turn is the other's
                cute.arch.barrier_arrive(barrier_id=TURN, number_of_threads=CONSUMERS)
            for tile in cutlass.range(first_tile, num_tiles, num_blocks, unroll=1):
                this_pass = tile // row_blocks
                address = passes.iterator.toint() + Int64(this_pass) * (PASS_FIELDS * 4)
                expert, first = load_global_int(address), load_global_int(address + 4)
                count = load_global_int(address + 8)
                self.consume(
                    shared_tokens,
                    shared_codes,
                    shared_scales,
                    shared_out,
                    full,
                    empty,
                    position,
                    tensor_scales,
                    row_scales,
                    per_pair,
                    out,
                    limit,
                    tid,
                    warp,
                    tile - this_pass * row_blocks,
                    expert,
                    first,
                    count,
                )
                position = position + self.chunks
            if self.group == 0:  # takes the other's last turn, so that none is left
                cute.arch.barrier(barrier_id=TURN, number_of_threads=CONSUMERS)

    @cute.jit
    def produce(
        self,
        boxes,
        codes,
        scales,
        passes: cute.Tensor,
        shared_tokens: cute.Tensor,
        shared_codes: cute.Tensor,
        shared_scales: cute.Tensor,
        barriers,
        empty: Int32,
        first_tile: Int32,
        num_tiles: Int32,
        num_blocks: Int32,
    ):
        """Keep shared memory full, one tile after the other."""
        row_blocks, full = self.config.row_blocks, barriers.toint()
        box_target = cute.make_tensor(
            shared_tokens.iterator,
            cute.make_layout(
                ((8, BOX_TOKENS // 8), (TILE_COLUMNS, 1), self.config.pass_tokens // BOX_TOKENS, self.stages),
                stride=(
                    (TILE_COLUMNS, 8 * TILE_COLUMNS),
                    (1, 0),
                    BOX_TOKENS * TILE_COLUMNS,
                    self.config.pass_tokens * TILE_COLUMNS,
                ),
            ),
        )
        position = Int32(0)
        for tile in cutlass.range(first_tile, num_tiles, num_blocks, unroll=1):
            this_pass = tile // row_blocks
            address = passes.iterator.toint() + Int64(this_pass) * (PASS_FIELDS * 4)
            expert, first = load_global_int(address), load_global_int(address + 4)
            num_boxes = (load_global_int(address + 8) + (BOX_TOKENS - 1)) // BOX_TOKENS
            row_tile = (tile - this_pass * row_blocks) * (self.config.block_rows // 16)
            box_to, box_from = self.partition(boxes, box_target, first, (BOX_TOKENS, TILE_COLUMNS))
            routed = self.halves(
                codes[0], scales[0], shared_codes, shared_scales, expert * (self.config.num_rows // 16) + row_tile
            )
            shared = self.halves(codes[1], scales[1], shared_codes, shared_scales, row_tile)
            for step in cutlass.range(self.chunks, unroll=1):
                stage = position % self.stages
                wait_barrier(empty + stage * 8, (position // self.stages & 1) ^ 1)
                expect_bytes_if(cute.arch.lane_idx() == 0, full + stage * 8, Int32(STEP_BYTES) + num_boxes * BOX_BYTES)
                if expert == SHARED_EXPERT:
                    self.copy_weights(shared, step, stage, barriers + stage)
                else:
                    self.copy_weights(routed, step, stage, barriers + stage)
                for box in cutlass.range(num_boxes, unroll=1):
                    cute.copy(
                        boxes[0],
                        box_from[(None, box, step)],
                        box_to[(None, box, stage)],
                        tma_bar_ptr=barriers + stage,
                    )
                position = position + 1

    def partition(self, source, target, start, box):
        """Return shared memory and the rows of a matrix from `start` on, as the copy engine takes them."""
        copy, tensor = source
        tiles = cute.local_tile(cute.domain_offset((start, 0), tensor), box, (None, None))
        return cpasync.tma_partition(
            copy, 0, cute.make_layout(1), cute.group_modes(target, 0, 2), cute.group_modes(tiles, 0, 2)
        )

    def halves(self, codes, scales, shared_codes, shared_scales, row_tile):
        """Return what brings codes and scales of both halves of a tile: copy atom, target and source of each."""
        found = []
        for half in range(HALVES):
            index, start = (half, row_tile) if len(codes) == HALVES else (0, row_tile + half * HALF_TILES)
            for source, target, words in ((codes, shared_codes, CODE_WORDS), (scales, shared_scales, SCALE_WORDS)):
                ends = self.partition(source[index], target, start, (HALF_TILES, words))
                found.append((source[index][0], half, *ends))
        return found

    def copy_weights(self, halves, step, stage, barrier):
        """Ask for a step's codes and scales."""
        for copy, half, target, source in halves:
            cute.copy(copy, source[(None, 0, step)], target[(None, half, stage)], tma_bar_ptr=barrier)

    @cute.jit
    def consume(
        self,
        shared_tokens: cute.Tensor,
        shared_codes: cute.Tensor,
        shared_scales: cute.Tensor,
        shared_out: cute.Tensor,
        full: Int32,
        empty: Int32,
        position: Int32,
        tensor_scales,
        row_scales,
        per_pair: cute.Tensor,
        out: cute.Tensor,
        limit: Float32,
        tid: Int32,
        warp: Int32,
        row_block: Int32,
        expert: Int32,
        first: Int32,
        count: Int32,
    ):
        """Multiply a tile, whose first step is the block's step `position`, and store it."""
        lane, size = tid % 32, self.config.pass_tokens
        mma = hopper_helpers.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            warpgroup.OperandMajorMode.K,
            warpgroup.OperandMajorMode.K,
            Float32,
            (1, 1, 1),
            (64, size),
            warpgroup.OperandSource.RMEM,
        )
        tokens = cute.make_tensor(
            shared_tokens.iterator,
            cute.make_layout(
                ((8, size // 8), (TILE_COLUMNS, 1), self.stages),
                stride=((TILE_COLUMNS, 8 * TILE_COLUMNS), (1, 0), size * TILE_COLUMNS),
            ),
        )
        token_fragments = mma.make_fragment_B(mma.get_slice(tid % 128).partition_B(tokens))
        sums = [cute.make_rmem_tensor(mma.partition_shape_C((64, size)), Float32) for _ in range(HALVES)]
        weights = [
            [cute.make_rmem_tensor(mma.partition_shape_A((64, TILE_COLUMNS)), BFloat16) for _ in range(HALVES)]
            for _ in range(2)
        ]
        for half in cutlass.range_constexpr(HALVES):
            sums[half].fill(0.0)
        # This warp's row tiles: one of each half; four warps of a warpgroup are the 64 rows of an instruction.
        code_address = shared_codes.iterator.toint() + warp * TILE_CODE_BYTES + lane * 16
        scale_address = shared_scales.iterator.toint() + warp * TILE_SCALE_BYTES + lane // 4 * 8

        mma.set(warpgroup.Field.ACCUMULATE, True)
        for pair in cutlass.range((self.chunks + 1) // 2, unroll=1):
            for odd in cutlass.range_constexpr(2):  # two sets of registers: one is read while the other is written
                step = pair * 2 + odd
                if cutlass.const_expr(odd == 0 or self.chunks % 2 == 0):
                    self.multiply(
                        mma, sums, weights[odd], token_fragments, full, position + step, code_address, scale_address
                    )
                else:
                    if step < self.chunks:
                        self.multiply(
                            mma, sums, weights[odd], token_fragments, full, position + step, code_address, scale_address
                        )
                warpgroup.wait_group(1)
                self.release(empty, position + step - 1, (lane == 0) & (step > 0) & (step < self.chunks))
        warpgroup.wait_group(0)
        self.release(empty, position + self.chunks - 1, lane == 0)
        flat = [cute.make_tensor(one.iterator, cute.make_layout(cute.size(one))) for one in sums]
        factors = [self.tensor_scale(*pair, expert) * UNDO for pair in tensor_scales]
        if expert == SHARED_EXPERT:
            self.scale(flat, factors, row_scales, per_pair, limit, lane, first, True)
        else:
            self.scale(flat, factors, row_scales, per_pair, limit, lane, first, False)
        self.store(flat, shared_out, per_pair, out, tid, warp, row_block, first, count)

    def release(self, empty, position, wanted):
        """Let the producer overwrite a step."""
        arrive_if(wanted, empty + position % self.stages * 8)

    def multiply(self, mma, sums, weights, token_fragments, full, position, code_address, scale_address):
        """Decode a step's weights and issue its products as one group."""
        stage = position % self.stages
        wait_barrier(full + stage * 8, position // self.stages & 1)
        raw = []
        for half in range(HALVES):
            index = stage * HALVES + half
            words = load_shared(code_address + index * (HALF_TILES * TILE_CODE_BYTES), 4)
            raw.append((words, load_shared(scale_address + index * (HALF_TILES * TILE_SCALE_BYTES), 2)))
        for half in range(HALVES):
            words, scale_words = raw[half]
            registers = cute.recast_tensor(weights[half], Uint32)
            flat = cute.make_tensor(registers.iterator, cute.make_layout(cute.size(registers)))
            upper, lower = block_scales(scale_words[0]), block_scales(scale_words[1])
            for block in range(4):
                fragment = weight_fragment(words[block], upper[block], lower[block])
                for register in range(4):
                    flat[block * 4 + register] = fragment[register]
        # Warpgroups take turns: one issues a step's products while the other decodes. Left alone they do both at once.
        cute.arch.barrier(barrier_id=TURN + self.group, number_of_threads=CONSUMERS)
        warpgroup.fence()
        for block in range(4):
            for half in range(HALVES):
                cute.gemm(
                    mma,
                    sums[half],
                    weights[half][None, None, block],
                    token_fragments[None, None, block, stage],
                    sums[half],
                )
        warpgroup.commit_group()
        cute.arch.barrier_arrive(barrier_id=TURN + 1 - self.group, number_of_threads=CONSUMERS)

    @cute.jit
    def tensor_scale(self, routed: cute.Tensor, shared: cute.Tensor, expert: Int32) -> Float32:
        """Return the tensor scale of an expert."""
        scale = shared[0]
        if expert != SHARED_EXPERT:
            scale = routed[expert]
        return scale

    def scale(self, flat, factors, row_scales, per_pair, limit, lane, first, is_shared: bool):
        """Turn sums into values; for gate_up, into h in the first half.

        The shared expert has the roundings of three linears: gate, up and h to bf16.
        """
        last = per_pair.shape[0] - 1
        for block in range(self.config.pass_tokens // 8):
            for index in range(2):
                pair = cutlass.min(first + block * 8 + lane % 4 * 2 + index, last)
                here = factors
                if row_scales is not None:
                    row_scale = load_global_float(row_scales.iterator.toint() + Int64(pair) * 4) * UNDO
                    here = [factor * row_scale for factor in factors]
                if self.config.step == "gate_up":
                    route = load_global_float(per_pair.iterator.toint() + Int64(pair) * 4)
                for eight in range(2):  # rows g and g + 8
                    place = block * 4 + eight * 2 + index
                    if self.config.step == "gate_up":
                        gate, up = flat[0][place] * here[0], flat[1][place] * here[1]
                        if is_shared:
                            gate, up = gate.to(BFloat16).to(Float32), up.to(BFloat16).to(Float32)
                        gate = min_keeping_nan(gate, limit)
                        up = max_keeping_nan(min_keeping_nan(up, limit), -limit)
                        sigmoid = cute.arch.rcp_approx(1.0 + cute.math.exp2(-gate * LOG2_E))
                        value = gate * sigmoid * up * route
                        flat[0][place] = value.to(BFloat16).to(Float32) if is_shared else value
                    else:
                        for half in range(HALVES):
                            flat[half][place] = flat[half][place] * here[0]

    @cute.jit
    def store(
        self,
        flat,
        shared_out: cute.Tensor,
        per_pair: cute.Tensor,
        out: cute.Tensor,
        tid: Int32,
        warp: Int32,
        row_block: Int32,
        first: Int32,
        count: Int32,
    ):
        """Turn a tile token-major through shared memory and store whole rows; fp32 is stored as it lies."""
        config, lane, size = self.config, tid % 32, self.config.pass_tokens
        first_row = row_block * config.block_rows
        if cutlass.const_expr(config.out == "f32"):
            token, row = lane % 4 * 2, first_row + warp * 16 + lane // 4
            address = out.iterator.toint() + (Int64(first + token) * config.num_rows + row) * 4
            for place in cutlass.range_constexpr(size // 2):
                tokens, rows = place // 4 * 8 + place % 2, place // 2 % 2 * 8
                predicated(
                    (token + tokens < count) & (row + rows < config.num_rows),
                    "st.global.f32 [{$r1}], {$r2};",
                    address + (tokens * config.num_rows + rows) * 4,
                    flat[0][place],
                )
        else:
            shared, stride = shared_out.iterator.toint(), config.out_stride
            cute.arch.barrier(barrier_id=1, number_of_threads=CONSUMERS)  # the tile before has been read
            for half in cutlass.range_constexpr(config.block_rows // HALF_ROWS):
                for blocks in cutlass.range_constexpr(size // 16):  # two blocks of 8 tokens, two of 8 rows
                    words = [
                        pack_bf16(flat[half][blocks * 8 + index * 2], flat[half][blocks * 8 + index * 2 + 1])
                        for index in range(4)
                    ]
                    token = blocks * 16 + lane // 16 * 8 + lane % 8
                    row = half * HALF_ROWS + warp * 16 + lane // 8 % 2 * 8
                    store_matrices_transposed(shared + (token * stride + row) * 2, *words)
            cute.arch.barrier(barrier_id=2, number_of_threads=CONSUMERS)
            lanes = config.block_rows // 8  # that store a token
            per_warp = 32 // lanes
            row = lane % lanes * 8
            for index in cutlass.range_constexpr(size // (CONSUMERS // 32 * per_warp)):
                token = (index * (CONSUMERS // 32) + warp) * per_warp + lane // lanes
                words = load_shared(shared + (token * stride + row) * 2, 4)
                target = first + cutlass.min(token, count - 1)
                if cutlass.const_expr(config.step == "down"):
                    target = load_global_int(per_pair.iterator.toint() + Int64(target) * 4)
                address = out.iterator.toint() + (Int64(target) * config.num_rows + first_row + row) * 2
                store_global_vector_if((token < count) & (first_row + row < config.num_rows), address, *words)


def half_layout(words: int, stages: int):
    """Return the layout of a half's row tiles, both halves, all stages, in shared memory."""
    return cute.make_layout(
        (HALF_TILES, words, HALVES, stages), stride=(words, 1, HALF_TILES * words, HALVES * HALF_TILES * words)
    )
