# SPDX-License-Identifier: Apache-2.0
"""Device half of fp8_stream."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from megamoe.kernels.fp8.fp8_device import (
    broadcast,
    commit_copies,
    copy_async_if,
    copy_async_or_zero,
    e4m3_pairs,
    load_scale_if,
    load_two_floats,
    mma_fp16,
    store_shared_floats,
    team_barrier,
    wait_copies,
)
from megamoe.kernels.fp8.fp8_stream_config import BLOCK, CHUNK, SLOT_BYTES, THREADS, TILE_ROWS, TOKENS_PER_TILE, Config
from megamoe.kernels.parts.memory_device import load_shared, load_shared_float, store_shared_float
from megamoe.kernels.parts.mma_device import zeros

OUT_DTYPES = {"bf16": BFloat16, "f32": Float32}


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, num_rows = cute.sym_int32(), cute.sym_int32(divisibility=16)
    columns, all_columns = config.num_columns, config.num_groups * config.num_columns

    def rows_of(dtype):
        return make_fake_tensor(dtype, (num_tokens, num_rows), (cute.sym_int64(divisibility=16), 1), assumed_align=16)

    arguments = [
        make_fake_tensor(Uint8, (num_tokens, all_columns), (all_columns, 1), assumed_align=16),
        make_fake_tensor(Uint8, (num_rows, columns), (columns, 1), assumed_align=16),
        *symbolic_scales(num_tokens),
        *symbolic_scales(cute.sym_int32()),
        *([rows_of(Float32)] if config.adds else []),
        rows_of(OUT_DTYPES[config.out]),
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    ]
    linear = Fp8Stream(config)
    return (linear.more if config.adds else linear.first), tuple(arguments)


def symbolic_scales(num_rows):
    """Return the arguments for contiguous scales as bytes, and for how many bytes one has."""
    num_bytes = cute.sym_int64()
    return make_fake_tensor(Uint8, (num_rows, num_bytes), (num_bytes, 1)), Int32(0)


class Fp8Stream:
    """The streaming linear."""

    def __init__(self, config: Config):
        self.config = config
        self.tokens_held = config.num_tiles * TOKENS_PER_TILE

    @cute.jit
    def first(self, x, w, x_scales, x_size: Int32, w_scales, w_size: Int32, out, num_blocks: Int32, stream):
        self.launch(x, w, x_scales, x_size, w_scales, w_size, None, out, num_blocks, stream)

    @cute.jit
    def more(self, x, w, x_scales, x_size: Int32, w_scales, w_size: Int32, earlier, out, num_blocks: Int32, stream):
        self.launch(x, w, x_scales, x_size, w_scales, w_size, earlier, out, num_blocks, stream)

    def launch(self, x, w, x_scales, x_size, w_scales, w_size, earlier, out, num_blocks, stream):
        """Launch the kernel; it may start before the kernel ahead of it has finished (see the wait inside)."""
        self.kernel(x, w, x_scales, x_size, w_scales, w_size, earlier, out, num_blocks).launch(
            grid=(num_blocks, self.config.num_groups, 1),
            block=(THREADS, 1, 1),
            smem=self.config.shared_bytes,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, x, w, x_scales, x_size: Int32, w_scales, w_size: Int32, earlier, out, num_blocks: Int32):
        config = self.config
        num_tokens, all_rows = out.shape
        num_rows = all_rows // config.num_groups  # of one group
        tid, _, _ = cute.arch.thread_idx()
        block, group, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(tid // 32)
        lane = tid % 32
        row, column = lane // 4, lane % 4
        shared = cute.arch.get_dyn_smem(Uint8, alignment=128).toint()
        team, member = warp // config.split, warp % config.split
        # Row tiles of this team: contiguous, all of them once, teams differing by at most one.
        place, places, num_units = block * config.teams + team, num_blocks * config.teams, num_rows // TILE_ROWS
        begin, end = place * num_units // places, (place + 1) * num_units // places
        # Blocks of columns of this warp.
        first_block = cutlass.min(member * config.slice_blocks, config.num_blocks)
        slice_blocks = cutlass.min(config.num_blocks - first_block, config.slice_blocks)
        slice_chunks = slice_blocks * (BLOCK // CHUNK)

        ring = shared + config.ring_offset + warp * (config.depth * SLOT_BYTES) + lane * 16
        source = (
            w.iterator.toint()
            + Int64(group * num_rows) * config.num_columns
            + config.first_column
            + first_block * BLOCK
            + column * 16
        )
        # The copy that is started next: row tile, chunk of the slice. A warp without a slice has none.
        ahead_unit, ahead_chunk = begin + Int32(slice_chunks == 0) * (end - begin), Int32(0)
        # The first scale of this warp: of the group's rows, and its blocks of columns.
        scale_rows = group * ((num_rows + (BLOCK - 1)) // BLOCK)
        own_scale = Int64(scale_rows) * (config.num_columns // BLOCK) + config.first_column // BLOCK + first_block
        scale = self.weight_scale(w_scales, w_size, begin, end, own_scale, slice_blocks, lane)
        for index in cutlass.range_constexpr(config.early):
            self.start_copy(ahead_unit < end, ring + index * SLOT_BYTES, source, ahead_unit * 16 + row, ahead_chunk)
            ahead_unit, ahead_chunk = self.following(ahead_unit, ahead_chunk, slice_chunks)
        # The weights do not depend on the kernel before this one, the tokens do.
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        self.start_tokens(x, shared, num_tokens, group, tid)
        for index in cutlass.range_constexpr(config.early, config.depth):
            self.start_copy(ahead_unit < end, ring + index * SLOT_BYTES, source, ahead_unit * 16 + row, ahead_chunk)
            ahead_unit, ahead_chunk = self.following(ahead_unit, ahead_chunk, slice_chunks)
        self.place_token_scales(x_scales, x_size, shared, num_tokens, group, tid)
        wait_copies(config.depth - config.early)
        cute.arch.sync_threads()

        tokens = shared + config.token_offset + lane * 16
        slot = Int32(0)
        for unit in cutlass.range(begin, end, unroll=1):
            sums = zeros(4, config.num_tiles)
            scale_now = scale
            scale = self.weight_scale(w_scales, w_size, unit + 1, end, own_scale, slice_blocks, lane)
            for index in cutlass.range(slice_blocks, unroll=1):
                products = [[Float32(0.0)] * 4 for _ in range(config.num_tiles)]
                column_block = first_block + index
                for half in cutlass.range_constexpr(BLOCK // CHUNK):
                    wait_copies(config.depth - 1)
                    address = ring + slot * SLOT_BYTES
                    upper, lower = load_shared(address, 4), load_shared(address + SLOT_BYTES // 2, 4)
                    chunk = column_block * (BLOCK // CHUNK) + half
                    products = self.multiply(products, upper, lower, tokens + chunk * 512)
                    self.start_copy(ahead_unit < end, address, source, ahead_unit * 16 + row, ahead_chunk)
                    ahead_unit, ahead_chunk = self.following(ahead_unit, ahead_chunk, slice_chunks)
                    slot = slot + 1
                    slot = slot - Int32(slot == config.depth) * config.depth
                weight_scale = broadcast(scale_now, index)
                for tile in cutlass.range_constexpr(config.num_tiles):
                    position = column_block * self.tokens_held + tile * TOKENS_PER_TILE + column * 2
                    factors = load_two_floats("shared", shared + config.scale_offset + position * 4)
                    for item in cutlass.range_constexpr(4):
                        factor = weight_scale * factors[item % 2]
                        sums[item, tile] = sums[item, tile] + products[tile][item] * factor
            self.finish(sums, shared, earlier, out, unit, group * num_rows, team, tid % (config.split * 32))

    def following(self, unit, chunk, slice_chunks):
        """Return the chunk after one, of the next row tile after the last."""
        after = chunk + 1
        wrapped = Int32(after == slice_chunks)
        return unit + wrapped, after - wrapped * slice_chunks

    def start_copy(self, wanted, address, source, row, chunk):
        """Start copying this lane's pieces of rows g and g + 8 of a chunk, as one group."""
        start = source + Int64(row) * self.config.num_columns + chunk * CHUNK
        copy_async_if(wanted, address, start)
        copy_async_if(wanted, address + SLOT_BYTES // 2, start + 8 * self.config.num_columns)
        commit_copies()

    def start_tokens(self, x, shared, num_tokens, group, tid):
        """Start copying the tokens, as one group: [tile, chunk, lane], 16 bytes each."""
        config = self.config
        chunks = config.num_blocks * (BLOCK // CHUNK)
        count = config.num_tiles * chunks * 32
        for first in range(0, count, THREADS):
            piece = first + tid
            inside = piece < count
            tile, chunk = piece // 32 // chunks, piece // 32 % chunks
            token = tile * TOKENS_PER_TILE + piece % 32 // 4
            wanted = inside & (token < num_tokens)
            source = (
                x.iterator.toint()
                + (Int64(cutlass.min(token, num_tokens - 1)) * config.num_groups + group) * config.num_columns
                + config.first_column
                + chunk * CHUNK
                + piece % 4 * 16
            )
            target = shared + config.token_offset + (chunk + tile * chunks) * 512 + piece % 32 * 16
            if count % THREADS == 0:
                copy_async_or_zero(wanted, target, source)
            else:
                self.copy_inside(inside, wanted, target, source)
        commit_copies()

    @cute.jit
    def copy_inside(self, inside, wanted, target, source):
        if inside:
            copy_async_or_zero(wanted, target, source)

    def place_token_scales(self, x_scales, size, shared, num_tokens, group, tid):
        """Bring the token scales to shared memory in fp32: [block, token]."""
        config = self.config
        count = config.num_blocks * self.tokens_held
        stride = config.num_columns // BLOCK
        for first in range(0, count, THREADS):
            place = first + tid
            block, token = place // self.tokens_held, place % self.tokens_held
            offset = (Int64(token) * config.num_groups + group) * stride + config.first_column // BLOCK + block
            wanted = (place < count) & (token < num_tokens)
            value = load_scale_if(wanted, x_scales.iterator.toint(), offset, size)
            self.store_inside(place < count, shared + config.scale_offset + place * 4, value)

    @cute.jit
    def store_inside(self, inside, address, value):
        if inside:
            store_shared_float(address, value)

    def weight_scale(self, w_scales, size, unit, end, own_scale, slice_blocks, lane):
        """Return, in lane i, the scale of a row tile and block i of the warp's slice."""
        offset = own_scale + Int64(unit * TILE_ROWS // BLOCK) * (self.config.num_columns // BLOCK) + lane
        return load_scale_if((unit < end) & (lane < slice_blocks), w_scales.iterator.toint(), offset, size)

    def multiply(self, products, upper, lower, token_address):
        """Return products plus those of a chunk: four steps of 16 columns."""
        chunks = self.config.num_blocks * (BLOCK // CHUNK)
        words = [load_shared(token_address + tile * (chunks * 512), 4) for tile in range(self.config.num_tiles)]
        for step in range(4):
            above, below = e4m3_pairs(upper[step]), e4m3_pairs(lower[step])
            fragment = (above[0], below[0], above[1], below[1])
            for tile in range(self.config.num_tiles):
                products[tile] = mma_fp16(products[tile], fragment, e4m3_pairs(words[tile][step]))
        return products

    @cute.jit
    def finish(
        self, sums, shared: Int32, earlier, out: cute.Tensor, unit: Int32, first_row: Int32, team: Int32, place: Int32
    ):
        """Add up the team's sums and store a row tile; `first_row` is the group's, `place` the thread in its team."""
        config = self.config
        values = 4 * 32 * config.num_tiles
        if cutlass.const_expr(config.split == 1):
            for tile in cutlass.range_constexpr(config.num_tiles):
                for item in cutlass.range_constexpr(4):
                    self.store(Float32(0.0), [sums[item, tile]], earlier, out, unit, first_row, tile, place * 4 + item)
        else:
            team_bytes = config.split * values * 4
            area = shared + team * team_bytes
            if cutlass.const_expr(config.partial_buffers == 2):
                area = area + (unit & 1) * config.partial_bytes
            else:
                team_barrier(team + 1, config.split * 32)
            for tile in cutlass.range_constexpr(config.num_tiles):
                mine = area + (place // 32 * values + tile * 128 + place % 32 * 4) * 4
                store_shared_floats(mine, *[sums[item, tile] for item in range(4)])
            team_barrier(team + 1, config.split * 32)
            threads = config.split * 32
            for first in cutlass.range_constexpr(0, values, threads):
                # Where a team has more threads than outputs, its warps take turns.
                index = first + ((place - unit * values) & (threads - 1) if values < threads else place)
                if index < values:
                    partials = [load_shared_float(area + (one * values + index) * 4) for one in range(config.slices)]
                    self.store(Float32(0.0), partials, earlier, out, unit, first_row, index // 128, index % 128)

    @cute.jit
    def store(
        self, total, partials, earlier, out: cute.Tensor, unit: Int32, first_row: Int32, tile: Int32, position: Int32
    ):
        """Store one output: the sums of the team's warps in their order, after those of earlier columns."""
        num_tokens, _ = out.shape
        lane, item = position // 4, position % 4
        token = tile * TOKENS_PER_TILE + lane % 4 * 2 + item % 2
        row = first_row + unit * TILE_ROWS + lane // 4 + item // 2 * 8
        if token < num_tokens:
            if cutlass.const_expr(self.config.adds):
                total = earlier[token, row]
                for partial in partials:
                    total = total + partial
            else:
                total = partials[0]
                for partial in partials[1:]:
                    total = total + partial
            out[token, row] = total.to(out.element_type)
