# SPDX-License-Identifier: Apache-2.0
"""Device half of sparse_attention: a block has one token, up to 64 heads and a range of its items.

Items come in tiles of 64 columns. Of each tile, in turn:

    fetch    every thread asks for 9 pieces of 16 bytes of the tile's rows, a tile ahead
    convert  E4M3 codes times their power of two, and bf16 rotary values, become fp16 in shared memory [64, 512]
    scores   S = Q K^T, 16 heads and 16 or 32 keys a warp; fp32
    weights  exp2(S scale log2 e - n + 15) with n the running ceiling of the largest S scale log2 e; fp16, shared memory
    values   O = O 2^(n_before - n) + P V, all heads and 64 of 512 channels a warp; fp32 registers

A row is key and value: the same tile is read by rows for S and by columns for O. Pieces of 16 bytes lie at their place
exclusive-or the row's last three bits, so that eight rows of a matrix lie in different banks.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.arch import inline_ptx
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.attention.sparse_attention_config import LATENT, ROW_CHUNKS, THREADS, TILE, WIDTH, Config
from megamoe.kernels.parts.memory_device import (
    load_global_if,
    load_global_vector_if,
    load_matrices,
    pack_bf16,
    store_shared,
)
from megamoe.kernels.parts.mma_device import bf16_pair
from megamoe.kernels.parts.pool_device import (
    ring_slot,
    round_to_bf16,
    row_addresses,
    row_bytes,
    store_bytes,
    symbolic_integers,
    symbolic_pool,
)
from megamoe.kernels.parts.ptx_device import fma, from_bits, multiply
from megamoe.kernels.parts.rope_device import sine_and_cosine
from megamoe.kernels.parts.rows_device import current_stream, overlap_launches, symbolic_heads, symbolic_vector

ROW_BYTES = row_bytes("fp8_rope_bf16", WIDTH)
PIECES = TILE * ROW_CHUNKS // THREADS
LATENT_PIECES = LATENT // 16
LOG2_E = 1.4426950408889634
HEADROOM = 15.0
LOWEST = -1e30
TILE_ROW_BYTES = 2 * WIDTH
WEIGHT_ROW_BYTES = 2 * TILE


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens = cute.sym_int32()
    q = symbolic_heads(BFloat16, num_tokens, config.heads, WIDTH)
    sink = symbolic_vector(Float32, config.heads)
    inv_freq = symbolic_vector(Float32, config.rope // 2)
    tokens = [make_fake_tensor(dtype, (num_tokens,), (1,)) for dtype in (Int64, Int64, Int32, Int32, Int32)]
    tables = [symbolic_integers(Int32, cute.sym_int32(), cute.sym_int32()) for _ in range(2)]
    entry_idx = symbolic_integers(Int32, num_tokens, cute.sym_int32())
    pools = [symbolic_pool() for _ in range(3)]
    sizes = [Int32(0) for _ in range(6)]
    out = make_fake_tensor(Uint8, (cute.sym_int32(),), (1,), assumed_align=16)
    stats = make_fake_tensor(Float32, (cute.sym_int32(),), (1,))
    arguments = (q, sink, inv_freq, *tokens, *tables, entry_idx, *pools, out, stats, *sizes, Float32(0.0))
    return SparseAttention(config), (*arguments, current_stream())


def load_matrices_transposed(address):
    """Return four 8 x 8 matrices of 16-bit values, transposed; lane l addresses row l % 8 of matrix l / 8."""
    return inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Uint32] * 4,
        read_only_args=[address],
    )


def mma_f16(accumulators, a, b):
    """Return accumulators + a @ b for 4 fp32 accumulators, 4 registers of a and 2 of b, all fp16 pairs."""
    return inline_ptx(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
        write_only_types=[Float32] * 4,
        read_only_args=[*a, *b, *accumulators],
    )


def pack_f16(low, high):
    """Return two floats rounded to fp16 in one word."""
    return inline_ptx("cvt.rn.f16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Uint32], read_only_args=[low, high])


def scaled_codes(word, scale):
    """Return four E4M3 codes times a pair of fp16 scales, as two words of fp16."""
    return inline_ptx(
        """{
        .reg .b16 low, high;
        .reg .b32 a, b;
        mov.b32 {low, high}, {$r0};
        cvt.rn.f16x2.e4m3x2 a, low;
        cvt.rn.f16x2.e4m3x2 b, high;
        mul.rn.f16x2 {$w0}, a, {$r1};
        mul.rn.f16x2 {$w1}, b, {$r1};
        }""",
        write_only_types=[Uint32, Uint32],
        read_only_args=[word, scale],
    )


def exp2(a):
    """Return 2^a within two units in the last place."""
    return inline_ptx("ex2.approx.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[a])


def ceiling(a):
    """Return the least integer that is at least a."""
    return inline_ptx("cvt.rpi.f32.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[a])


def swizzled(row, piece, row_size: int):
    """Return the byte offset of a piece of 16 bytes of a row."""
    return row * row_size + ((piece ^ (row & 7)) << 4)


class SparseAttention:
    """See ops/sparse_attention.py."""

    def __init__(self, config: Config):
        self.config = config

    @cute.jit
    def __call__(
        self,
        q,
        sink,
        inv_freq,
        positions,
        ends,
        requests,
        first_idx,
        num_visible,
        window_tables,
        entry_tables,
        entry_idx,
        window,
        step,
        entries,
        out,
        stats,
        window_size: Int32,
        window_rows: Int32,
        step_rows: Int32,
        entry_rows: Int32,
        split_tiles: Int32,
        num_splits: Int32,
        scale: Float32,
        stream,
    ):
        config = self.config
        self.kernel(
            q,
            sink,
            inv_freq,
            positions,
            ends,
            requests,
            first_idx,
            num_visible,
            window_tables,
            entry_tables,
            entry_idx,
            window,
            step,
            entries,
            out,
            stats,
            window_size,
            window_rows,
            step_rows,
            entry_rows,
            split_tiles,
            num_splits,
            scale,
        ).launch(
            grid=(q.shape[0], config.head_blocks, num_splits),
            block=(THREADS, 1, 1),
            smem=config.shared_bytes + 1024,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        q,
        sink,
        inv_freq,
        positions,
        ends,
        requests,
        first_idx,
        num_visible,
        window_tables,
        entry_tables,
        entry_idx,
        window,
        step,
        entries,
        out,
        stats,
        window_size: Int32,
        window_rows: Int32,
        step_rows: Int32,
        entry_rows: Int32,
        split_tiles: Int32,
        num_splits: Int32,
        scale: Float32,
    ):
        config = self.config
        token, head_block, split = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        shared = cutlass.memory.SmemAllocator()
        queries = shared.allocate_tensor(
            Uint32, cute.make_layout(config.block_heads * WIDTH // 2), byte_alignment=1024
        ).iterator.toint()
        tile_at = shared.allocate_tensor(
            Uint32, cute.make_layout(TILE * WIDTH // 2), byte_alignment=1024
        ).iterator.toint()
        weights_at = shared.allocate_tensor(
            Uint32, cute.make_layout(config.block_heads * TILE // 2), byte_alignment=1024
        ).iterator.toint()
        addresses = shared.allocate_tensor(Int64, cute.make_layout((TILE, 2, 2)), byte_alignment=16)
        tops = shared.allocate_tensor(Float32, cute.make_layout((config.block_heads, config.key_groups)))
        octaves = shared.allocate_tensor(Float32, cute.make_layout((config.block_heads, 2)))
        factors = shared.allocate_tensor(Float32, cute.make_layout(config.block_heads))
        overlap_launches()

        request, end = requests[token], Int32(ends[token])
        window_tiles = (window_size + TILE - 1) // TILE
        num_entries = Int32(0)
        if cutlass.const_expr(config.entries == "list"):
            num_entries = entry_idx.shape[1]
        if cutlass.const_expr(config.entries == "all"):
            num_entries = num_visible[token]
        num_tiles = window_tiles + (num_entries + TILE - 1) // TILE
        if request < 0:
            num_tiles = Int32(0)
        first, last = Int32(0), num_tiles
        if cutlass.const_expr(config.split):
            first = cutlass.min(split * split_tiles, num_tiles)
            last = cutlass.min(first + split_tiles, num_tiles)
        where = (
            token,
            request,
            end,
            first_idx,
            window_tables,
            entry_tables,
            entry_idx,
            window,
            step,
            entries,
            window_size,
            window_rows,
            step_rows,
            entry_rows,
            num_entries,
        )
        accumulators = cute.make_rmem_tensor(cute.make_layout((4, 8, config.row_tiles)), Float32)
        accumulators.fill(0.0)
        sums = cute.make_rmem_tensor(cute.make_layout(2), Float32)
        sums.fill(0.0)
        if first < last:
            self.load_queries(q, token, head_block, queries, thread)
            if thread < config.block_heads:
                octaves[thread, 0] = LOWEST
            self.find_rows(addresses, Int32(0), first, thread, where)
            cute.arch.sync_threads()
            words = cute.make_rmem_tensor(cute.make_layout((4, PIECES)), Uint32)
            bytes_of = cute.make_rmem_tensor(cute.make_layout(PIECES), Uint32)
            self.fetch(addresses, Int32(0), thread, words, bytes_of)
            for tile in cutlass.range(first, last, unroll=1):
                parity = (tile - first) % 2
                self.convert(addresses, parity, thread, words, bytes_of, tile_at)
                has_next = tile + 1 < last
                if has_next:
                    self.find_rows(addresses, 1 - parity, tile + 1, thread, where)
                cute.arch.sync_threads()
                if has_next:
                    self.fetch(addresses, 1 - parity, thread, words, bytes_of)
                self.score(addresses, parity, queries, tile_at, weights_at, tops, octaves, factors, sums, scale, thread)
                cute.arch.sync_threads()
                self.add_values(weights_at, tile_at, factors, accumulators, thread)
                cute.arch.sync_threads()
        parity = (last - first) % 2
        self.finish(
            accumulators,
            sums,
            tops,
            octaves,
            parity,
            sink,
            inv_freq,
            Int32(positions[token]),
            out,
            stats,
            token,
            head_block,
            split,
            num_splits,
            first < last,
            thread,
        )

    @cute.jit
    def load_queries(self, q, token: Int32, head_block: Int32, queries: Int32, thread: Int32):
        """Round a block's queries to fp16 in shared memory; heads beyond the last are zeros."""
        config = self.config
        for index in cutlass.range_constexpr(config.block_heads * (WIDTH // 8) // THREADS):
            piece = index * THREADS + thread
            row, column = piece // (WIDTH // 8), piece % (WIDTH // 8)
            head = head_block * config.block_heads + row
            address = q[(token, cutlass.min(head, config.heads - 1), None)].iterator.toint() + Int64(column) * 16
            words = load_global_vector_if(Int32(head < config.heads), address, 4)
            store_shared(
                queries + swizzled(row, column, TILE_ROW_BYTES), *[pack_f16(*bf16_pair(word)) for word in words]
            )

    @cute.jit
    def find_rows(self, addresses, parity: Int32, tile: Int32, thread: Int32, where):
        """Put the addresses of a tile's rows and of their scales into shared memory; 0 where a column has no item."""
        config = self.config
        (
            token,
            request,
            end,
            first_idx,
            window_tables,
            entry_tables,
            entry_idx,
            window,
            step,
            entries,
            window_size,
            window_rows,
            step_rows,
            entry_rows,
            num_entries,
        ) = where
        if thread < TILE:
            data, scales = Int64(0), Int64(0)
            column = tile * TILE + thread
            window_columns = (window_size + TILE - 1) // TILE * TILE
            if column < window_columns:
                back = window_size - 1 - column
                position = end - back
                if (back >= 0) & (position >= 0):
                    slot = Int32(-1)
                    is_new = False
                    if cutlass.const_expr(config.has_step):
                        is_new = token - back >= first_idx[token]
                        if is_new:
                            data, scales = row_addresses(step, token - back, step_rows, *ROW_BYTES)
                        else:
                            slot = ring_slot(window_tables, window_rows, request, position)
                    else:
                        slot = ring_slot(window_tables, window_rows, request, position)
                    if slot >= 0:
                        data, scales = row_addresses(window, slot, window_rows, *ROW_BYTES)
            else:
                if cutlass.const_expr(config.entries != "none"):
                    place = column - window_columns
                    entry = Int32(-1)
                    if place < num_entries:
                        entry = place
                        if cutlass.const_expr(config.entries == "list"):
                            entry = entry_idx[token, place]
                    slot = ring_slot(entry_tables, entry_rows, request, entry)
                    if slot >= 0:
                        data, scales = row_addresses(entries, slot, entry_rows, *ROW_BYTES)
            addresses[thread, 0, parity] = data
            addresses[thread, 1, parity] = scales

    @cute.jit
    def fetch(self, addresses, parity: Int32, thread: Int32, words, bytes_of):
        """Ask for this thread's pieces of a tile and the scales of those that have one."""
        for index in cutlass.range_constexpr(PIECES):
            piece = index * THREADS + thread
            row, column = piece // ROW_CHUNKS, piece % ROW_CHUNKS
            data, scales = addresses[row, 0, parity], addresses[row, 1, parity]
            is_item = Int32(data != 0)
            for number, word in enumerate(load_global_vector_if(is_item, data + Int64(column) * 16, 4)):
                words[number, index] = word
            has_scale = Int32((data != 0) & (column < LATENT_PIECES))
            bytes_of[index] = load_global_if(has_scale, scales + Int64(column // 4), 8)

    @cute.jit
    def convert(self, addresses, parity: Int32, thread: Int32, words, bytes_of, tile_at: Int32):
        """Store this thread's pieces as fp16; a column without an item is zeros, whatever lies in memory."""
        for index in cutlass.range_constexpr(PIECES):
            piece = index * THREADS + thread
            row, column = piece // ROW_CHUNKS, piece % ROW_CHUNKS
            four = [words[number, index] for number in range(4)]
            if column < LATENT_PIECES:
                scale = from_bits(bytes_of[index] << 23)
                pair = pack_f16(scale, scale)
                halves = [half for word in four for half in scaled_codes(word, pair)]
                store_shared(tile_at + swizzled(row, 2 * column, TILE_ROW_BYTES), *halves[:4])
                store_shared(tile_at + swizzled(row, 2 * column + 1, TILE_ROW_BYTES), *halves[4:])
            else:
                place = 2 * LATENT_PIECES + column - LATENT_PIECES
                store_shared(
                    tile_at + swizzled(row, place, TILE_ROW_BYTES), *[pack_f16(*bf16_pair(word)) for word in four]
                )

    @cute.jit
    def score(
        self,
        addresses,
        parity: Int32,
        queries: Int32,
        tile_at: Int32,
        weights_at: Int32,
        tops,
        octaves,
        factors,
        sums,
        scale: Float32,
        thread: Int32,
    ):
        """Make the weights of a tile, in fp16 in shared memory, and what O must be multiplied by before."""
        config = self.config
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        row_tile, group = warp % config.row_tiles, warp // config.row_tiles
        num_fragments = config.group_keys // 8
        scores = cute.make_rmem_tensor(cute.make_layout((4, num_fragments)), Float32)
        scores.fill(0.0)
        own_row = row_tile * 16 + lane // 4
        if group < config.key_groups:
            query_row, query_piece = row_tile * 16 + lane % 16, lane // 16
            key_row, key_piece = group * config.group_keys + lane % 8 + lane // 16 * 8, lane // 8 % 2
            for step in cutlass.range(WIDTH // 16, unroll=4):
                a = load_matrices(queries + swizzled(query_row, 2 * step + query_piece, TILE_ROW_BYTES))
                for pair in cutlass.range_constexpr(num_fragments // 2):
                    b = load_matrices(tile_at + swizzled(key_row + pair * 16, 2 * step + key_piece, TILE_ROW_BYTES))
                    for half in cutlass.range_constexpr(2):
                        place = 2 * pair + half
                        old = [scores[number, place] for number in range(4)]
                        new = mma_f16(old, a, b[2 * half : 2 * half + 2])
                        for number in cutlass.range_constexpr(4):
                            scores[number, place] = new[number]
            for upper in cutlass.range_constexpr(2):
                top = Float32(LOWEST)
                for place in cutlass.range_constexpr(num_fragments):
                    for right in cutlass.range_constexpr(2):
                        key = group * config.group_keys + place * 8 + lane % 4 * 2 + right
                        value = scores[2 * upper + right, place] * scale * Float32(LOG2_E)
                        if addresses[key, 0, parity] == 0:
                            value = Float32(LOWEST)
                        scores[2 * upper + right, place] = value
                        top = cutlass.max(top, value)
                top = cute.arch.warp_reduction(top, lambda a, b: cute.arch.fmax(a, b), threads_in_group=4)
                if lane % 4 == 0:
                    tops[own_row + 8 * upper, group] = top
        cute.arch.sync_threads()
        if group < config.key_groups:
            for upper in cutlass.range_constexpr(2):
                row = own_row + 8 * upper
                top = tops[row, 0]
                for other in cutlass.range_constexpr(1, config.key_groups):
                    top = cutlass.max(top, tops[row, other])
                before = octaves[row, parity]
                octave = cutlass.max(before, ceiling(top))
                factor = exp2(before - octave)
                total = Float32(0.0)
                for place in cutlass.range_constexpr(num_fragments):
                    two = []
                    for right in cutlass.range_constexpr(2):
                        value = scores[2 * upper + right, place]
                        weight = exp2(value - octave + Float32(HEADROOM))
                        if value == Float32(LOWEST):
                            weight = Float32(0.0)
                        total = total + weight
                        two.append(weight)
                    key_piece = group * (config.group_keys // 8) + place
                    store_shared(
                        weights_at + swizzled(row, key_piece, WEIGHT_ROW_BYTES) + lane % 4 * 4, pack_f16(two[0], two[1])
                    )
                total = cute.arch.warp_reduction(total, lambda a, b: a + b, threads_in_group=4)
                sums[upper] = sums[upper] * factor + total
                if (lane % 4 == 0) & (group == 0):
                    octaves[row, 1 - parity] = octave
                    factors[row] = factor

    @cute.jit
    def add_values(self, weights_at: Int32, tile_at: Int32, factors, accumulators, thread: Int32):
        """Add weights times rows to O, 64 channels a warp."""
        config = self.config
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        for row_tile in cutlass.range_constexpr(config.row_tiles):
            for upper in cutlass.range_constexpr(2):
                factor = factors[row_tile * 16 + lane // 4 + 8 * upper]
                for place in cutlass.range_constexpr(8):
                    for right in cutlass.range_constexpr(2):
                        number = 2 * upper + right
                        accumulators[number, place, row_tile] = accumulators[number, place, row_tile] * factor
        for step in cutlass.range_constexpr(TILE // 16):
            a = [
                load_matrices(weights_at + swizzled(row_tile * 16 + lane % 16, 2 * step + lane // 16, WEIGHT_ROW_BYTES))
                for row_tile in range(config.row_tiles)
            ]
            for pair in cutlass.range_constexpr(4):
                b = load_matrices_transposed(
                    tile_at + swizzled(step * 16 + lane % 16, warp * 8 + 2 * pair + lane // 16, TILE_ROW_BYTES)
                )
                for half in cutlass.range_constexpr(2):
                    for row_tile in cutlass.range_constexpr(config.row_tiles):
                        place = 2 * pair + half
                        old = [accumulators[number, place, row_tile] for number in range(4)]
                        new = mma_f16(old, a[row_tile], b[2 * half : 2 * half + 2])
                        for number in cutlass.range_constexpr(4):
                            accumulators[number, place, row_tile] = new[number]

    @cute.jit
    def finish(
        self,
        accumulators,
        sums,
        tops,
        octaves,
        parity: Int32,
        sink,
        inv_freq,
        position: Int32,
        out,
        stats,
        token: Int32,
        head_block: Int32,
        split: Int32,
        num_splits: Int32,
        has_tiles,
        thread: Int32,
    ):
        """Store the parts of a split, or divide, rotate back and store the result."""
        config = self.config
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        row_tile, group = warp % config.row_tiles, warp // config.row_tiles
        if (group < config.key_groups) & (lane % 4 == 0):
            for upper in cutlass.range_constexpr(2):
                tops[row_tile * 16 + lane // 4 + 8 * upper, group] = sums[upper]
        cute.arch.sync_threads()
        base = out.iterator.toint()
        for tile in cutlass.range_constexpr(config.row_tiles):
            for upper in cutlass.range_constexpr(2):
                row = tile * 16 + lane // 4 + 8 * upper
                head = head_block * config.block_heads + row
                total, octave = Float32(0.0), Float32(LOWEST)
                if has_tiles:
                    octave = octaves[row, parity]
                    for other in cutlass.range_constexpr(config.key_groups):
                        total = total + tops[row, other]
                if head < config.heads:
                    if cutlass.const_expr(config.split):
                        if has_tiles:
                            place = (Int64(token) * num_splits + split) * config.heads + head
                            if (warp == 0) & (lane % 4 == 0):
                                stats[place * 2] = octave
                                stats[place * 2 + 1] = total
                            for fragment in cutlass.range_constexpr(8):
                                column = warp * 64 + fragment * 8 + lane % 4 * 2
                                left = accumulators[2 * upper, fragment, tile]
                                right = accumulators[2 * upper + 1, fragment, tile]
                                store_floats(base + (place * WIDTH + column) * 4, left, right)
                    else:
                        denominator = total + exp2(sink[head] * Float32(LOG2_E) - octave + Float32(HEADROOM))
                        inverse = Float32(0.0)
                        if (denominator > 0.0) & has_tiles:
                            inverse = Float32(1.0) / denominator
                        place = Int64(token) * config.heads + head
                        for fragment in cutlass.range_constexpr(8):
                            column = warp * 64 + fragment * 8 + lane % 4 * 2
                            left = multiply(accumulators[2 * upper, fragment, tile], inverse)
                            right = multiply(accumulators[2 * upper + 1, fragment, tile], inverse)
                            word = rotated_back(left, right, column, position, inv_freq, config.rope)
                            store_bytes(base + (place * WIDTH + column) * 2, word, 4)


def store_floats(address, left, right):
    """Store two floats."""
    inline_ptx("st.global.v2.f32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[address, left, right])


@cute.jit
def rotated_back(
    left: Float32, right: Float32, column: Int32, position: Int32, inv_freq: cute.Tensor, rope: cutlass.Constexpr
) -> Uint32:
    """Return a pair of channels rounded to bf16 and, if they rotate, rotated by -position and rounded again."""
    left, right = round_to_bf16(left), round_to_bf16(right)
    if column >= WIDTH - rope:
        sine, cosine = sine_and_cosine(multiply(Float32(position), inv_freq[(column - (WIDTH - rope)) // 2]))
        even = fma(left, cosine, multiply(right, sine))
        right = fma(right, cosine, -multiply(left, sine))
        left = even
    return pack_bf16(left, right)
