# SPDX-License-Identifier: Apache-2.0
"""Device half of attention in tiles: eight warps bring rows, eight multiply.

A thread block has up to 64 heads of a token and a range of its items. Fetching warps find each item's row, turn it into
fp16 and store it as a tile [64 items, C], two of them in turn. The others compute scores, 16 heads and a share of the
items each; agree on a power of two per head; store the weights as fp16; and then each multiplies the weights of all
heads by its own 64 columns of the rows, which are keys and values at once. So the sums stay in registers from the first
item to the last, and a head's power of two changes them only by exact factors.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.attention.attention_device import (
    HEADROOM,
    LOG2_E,
    LOWEST,
    ROW_BYTES,
    ceiling,
    chunk_of,
    exp2,
    fp16_of_bf16,
    fp16_word,
    load_matrices_transposed,
    load_two_words,
    multiply_pairs,
    power_of_two,
    store_shared_float_if,
    store_two_floats,
)
from megamoe.kernels.attention.attention_tiles_config import (
    FETCHERS,
    MAX_ROWS,
    THREADS,
    TILE_ITEMS,
    WARPS,
    Config,
)
from megamoe.kernels.fp8.fp8_device import e4m3_pairs, mma_fp16
from megamoe.kernels.parts.memory_device import (
    arrive_if,
    init_barrier,
    load_global_vector_if,
    load_matrices,
    load_shared,
    load_shared_float,
    pack_bf16,
    publish_barriers,
    store_global_vector_if,
    store_shared,
    store_shared_if,
    wait_barrier,
)
from megamoe.kernels.parts.mma_device import zeros
from megamoe.kernels.parts.pool_device import (
    round_to_bf16,
    row_addresses,
    symbolic_integers,
    symbolic_pool,
)
from megamoe.kernels.parts.ptx_device import (
    fma,
    from_bits,
    max_keeping_nan,
    multiply,
    reciprocal,
)
from megamoe.kernels.parts.rope_device import sine_and_cosine
from megamoe.kernels.parts.rows_device import (
    DTYPES,
    current_stream,
    overlap_launches,
    symbolic_heads,
    symbolic_vector,
)

MULTIPLIERS = WARPS * 32
BATCH_ROWS = TILE_ITEMS // FETCHERS  # rows of a tile that a fetching warp brings: four lanes a row
LATENT_GROUPS = 7  # scales of a row of 512
NEGATIVE_INFINITY = 0xFF800000


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens = cute.sym_int32()
    q = symbolic_heads(DTYPES[config.q], num_tokens, config.heads, config.width)
    if config.out == "partial":
        out = make_fake_tensor(
            Float32,
            (num_tokens, cute.sym_int32(), config.heads, config.width),
            (cute.sym_int64(divisibility=4), config.heads * config.width, config.width, 1),
            assumed_align=16,
        )
    else:
        out = symbolic_heads(DTYPES[config.out], num_tokens, config.heads, config.width)
    stats = make_fake_tensor(
        Float32, (num_tokens, cute.sym_int32(), config.heads, 2), (cute.sym_int64(), config.heads * 2, 2, 1)
    )
    arguments = (
        q,
        *(symbolic_pool() for _ in range(3)),
        symbolic_vector(Float32, config.heads),
        make_fake_tensor(Int64, (num_tokens,), (1,)),
        make_fake_tensor(Int64, (num_tokens,), (1,)),
        make_fake_tensor(Int32, (num_tokens,), (1,)),
        make_fake_tensor(Int32, (num_tokens,), (1,)),
        symbolic_integers(Int32, cute.sym_int32(), cute.sym_int32()),
        symbolic_integers(Int32, cute.sym_int32(), cute.sym_int32()),
        symbolic_integers(Int32, num_tokens, cute.sym_int32()),
        make_fake_tensor(Int32, (num_tokens,), (1,)),
        symbolic_vector(Float32, config.rope // 2),
        out,
        stats,
        *(Int32(0) for _ in range(8)),
        Float32(0.0),
        current_stream(),
    )
    return AttentionTiles(config), arguments


class AttentionTiles:
    """See ops/sparse_attention.py."""

    def __init__(self, config: Config):
        self.config = config
        self.registers = (
            72,
            184,
        )  # of fetching and of multiplying threads: as many together as two threads have at launch
        self.warp_tiles, self.warp_blocks = config.head_tiles, 1  # of 16 heads and of 64 columns, whose sums a warp has

    def place_of_sums(self, warp):
        """Return the first head and the first column block of the sums that a warp has."""
        return 0, warp

    def publish(self):
        """Make what this thread has stored to shared memory visible to what multiplies."""

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        window: cute.Tensor,
        step: cute.Tensor,
        entries: cute.Tensor,
        sink: cute.Tensor,
        positions: cute.Tensor,
        window_ends: cute.Tensor,
        requests: cute.Tensor,
        first_idx: cute.Tensor,
        window_tables: cute.Tensor,
        entry_tables: cute.Tensor,
        entry_idx: cute.Tensor,
        num_visible: cute.Tensor,
        inv_freq: cute.Tensor,
        out: cute.Tensor,
        stats: cute.Tensor,
        window_rows: Int32,
        step_rows: Int32,
        entry_rows: Int32,
        window_size: Int32,
        has_step: Int32,
        has_entries: Int32,
        has_list: Int32,
        splits: Int32,
        scale: Float32,
        stream,
    ):
        self.kernel(
            q,
            window,
            step,
            entries,
            sink,
            positions,
            window_ends,
            requests,
            first_idx,
            window_tables,
            entry_tables,
            entry_idx,
            num_visible,
            inv_freq,
            out,
            stats,
            window_rows,
            step_rows,
            entry_rows,
            window_size,
            has_step,
            has_entries,
            has_list,
            splits,
            scale,
        ).launch(
            grid=(q.shape[0] * self.config.head_blocks, splits, 1),
            block=(THREADS, 1, 1),
            stream=stream,
            use_pdl=True,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        q: cute.Tensor,
        window: cute.Tensor,
        step: cute.Tensor,
        entries: cute.Tensor,
        sink: cute.Tensor,
        positions: cute.Tensor,
        window_ends: cute.Tensor,
        requests: cute.Tensor,
        first_idx: cute.Tensor,
        window_tables: cute.Tensor,
        entry_tables: cute.Tensor,
        entry_idx: cute.Tensor,
        num_visible: cute.Tensor,
        inv_freq: cute.Tensor,
        out: cute.Tensor,
        stats: cute.Tensor,
        window_rows: Int32,
        step_rows: Int32,
        entry_rows: Int32,
        window_size: Int32,
        has_step: Int32,
        has_entries: Int32,
        has_list: Int32,
        splits: Int32,
        scale: Float32,
    ):
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        block, split, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(thread // 32)
        token, head_block = block // config.head_blocks, block % config.head_blocks
        allocator = cutlass.memory.SmemAllocator()
        memory = allocator.allocate_tensor(Uint8, cute.make_layout(config.shared_bytes - 1024), 1024)
        self.memory = memory
        self.queries = memory.iterator.toint()
        self.tiles = self.queries + config.query_bytes
        self.weights = self.tiles + 2 * config.tile_bytes
        self.live = self.weights + config.weight_bytes
        self.maxima = self.live + 4 * 2 * TILE_ITEMS
        self.added = self.maxima + 4 * WARPS * 16
        self.factors = self.added + 4 * WARPS * 16
        self.powers = self.factors + 4 * MAX_ROWS
        self.full = self.powers + 4 * MAX_ROWS
        self.empty = self.full + 16
        if thread == 0:
            for buffer in cutlass.range_constexpr(2):
                init_barrier(self.full + buffer * 8, Int32(FETCHERS))
                init_barrier(self.empty + buffer * 8, Int32(WARPS))
            publish_barriers()
        cute.arch.sync_threads()
        overlap_launches()

        # Which tiles: those of the window, then those of entries, cut into as many ranges as there are splits. Tiles
        # before the start of the sequence are passed over.
        request, end = requests[token], Int32(window_ends[token])
        window_tiles = (window_size + (TILE_ITEMS - 1)) // TILE_ITEMS
        num_entries = Int32(0)
        if has_entries != 0:
            if has_list != 0:
                num_entries = Int32(entry_idx.shape[1])
            else:
                num_entries = cutlass.max(num_visible[token], 0)
        if request < 0:  # whatever else it holds
            num_entries, end = Int32(0), Int32(-1)
        num_tiles = window_tiles + (num_entries + (TILE_ITEMS - 1)) // TILE_ITEMS
        share = (num_tiles + splits - 1) // splits
        first = split * share
        last = cutlass.min(first + share, num_tiles)
        first = cutlass.max(first, cutlass.min((window_size - 1 - end) // TILE_ITEMS, window_tiles))
        if request < 0:
            last = Int32(0)
        last = cutlass.max(first, last)

        if warp >= WARPS:
            cute.arch.setmaxregister_decrease(self.registers[0])
            self.fetch(
                window,
                step,
                entries,
                first_idx,
                window_tables,
                entry_tables,
                entry_idx,
                window_rows,
                step_rows,
                entry_rows,
                window_size,
                has_step,
                has_list,
                token,
                request,
                end,
                window_tiles,
                num_entries,
                first,
                last,
                warp - WARPS,
            )
        else:
            cute.arch.setmaxregister_increase(self.registers[1])
            self.multiply(
                q, sink, positions, inv_freq, out, stats, token, head_block, split, first, last, scale, thread, warp
            )

    # Fetching warps.

    @cute.jit
    def number(self, entry_idx, has_list: Int32, token: Int32, num_entries: Int32, place: Int32):
        """Return the number of an entry by its place among a token's; -1 where there is none."""
        entry = Int32(-1)
        if (place >= 0) & (place < num_entries):
            entry = place
            if has_list != 0:
                entry = entry_idx[token, place]
        return entry

    @cute.jit
    def find(
        self,
        window,
        step,
        entries,
        window_tables,
        entry_tables,
        window_rows: Int32,
        step_rows: Int32,
        entry_rows: Int32,
        window_size: Int32,
        window_tiles: Int32,
        token: Int32,
        request: Int32,
        first_of_request: Int32,
        end: Int32,
        column: Int32,
        entry: Int32,
    ):
        """Return the addresses of the data and the scales of an item's row, 0 where there is no item.

        Args:
            window, step, entries, window_tables, entry_tables, window_rows, step_rows, entry_rows, window_size: as in
                the operation.
            window_tiles: tiles of the window.
            token, request, end: the token, its request and the position of its newest row.
            first_of_request: the first token of the request in this step; beyond all tokens where there is no step.
            column: of the item.
            entry: the number of the entry in that column.
        """
        sizes = (self.config.width + 64, self.config.width // 64)
        data, scales = Int64(0), Int64(0)
        if column < window_tiles * TILE_ITEMS:
            back = window_size - 1 - column
            row = end - back
            if (back >= 0) & (row >= 0):
                if token - back >= first_of_request:
                    data, scales = row_addresses(step, token - back, step_rows, *sizes)
                else:
                    data, scales = row_of(window, window_tables, window_rows, request, row, sizes)
        else:
            if entry >= 0:
                data, scales = row_of(entries, entry_tables, entry_rows, request, entry, sizes)
        return data, scales

    @cute.jit
    def fetch(
        self,
        window,
        step,
        entries,
        first_idx,
        window_tables,
        entry_tables,
        entry_idx,
        window_rows: Int32,
        step_rows: Int32,
        entry_rows: Int32,
        window_size: Int32,
        has_step: Int32,
        has_list: Int32,
        token: Int32,
        request: Int32,
        end: Int32,
        window_tiles: Int32,
        num_entries: Int32,
        first: Int32,
        last: Int32,
        fetcher: Int32,
    ):
        """Bring all tiles: while one is being multiplied, the rows of the next are under way."""
        lane = cute.arch.lane_idx()
        first_of_request = Int32(2**31 - 1)
        if has_step != 0:
            first_of_request = first_idx[token]
        of_pools = (window, step, entries, window_tables, entry_tables, window_rows, step_rows, entry_rows)
        given = (*of_pools, window_size, window_tiles, token, request, first_of_request, end)
        of_list = (entry_idx, has_list, token, num_entries)
        place, part = lane // 4, lane % 4
        item = fetcher * BATCH_ROWS + place
        first_entry = item - window_tiles * TILE_ITEMS  # the place among entries, in tile 0
        words = cute.make_rmem_tensor(cute.make_layout((LATENT_GROUPS + 2, 4)), Uint32)
        scale_words = cute.make_rmem_tensor(cute.make_layout(2), Uint32)
        entry = self.number(*of_list, first * TILE_ITEMS + first_entry)
        following = self.number(*of_list, (first + 1) * TILE_ITEMS + first_entry)
        data, scales = self.find(*given, first * TILE_ITEMS + item, entry)
        found = Int32((data != Int64(0)) & (first < last))
        self.load(words, scale_words, found, data, scales, part)
        for tile in cutlass.range(first, last, unroll=1):
            buffer = (tile - first) % 2
            was_found, entry = found, following
            following = self.number(*of_list, (tile + 2) * TILE_ITEMS + first_entry)
            data, scales = self.find(*given, (tile + 1) * TILE_ITEMS + item, entry)
            found = Int32((data != Int64(0)) & (tile + 1 < last))
            wait_barrier(self.empty + buffer * 8, ((tile - first) // 2 % 2) ^ 1)
            target = self.tiles + buffer * self.config.tile_bytes
            self.exchange(words, scale_words, was_found, target, buffer, item, part, found, data, scales)
            self.publish()
            cute.arch.sync_warp()
            arrive_if(lane == 0, self.full + buffer * 8)

    def load(self, words, scales, wanted, data, scale_address, part):
        """Start loading a quarter of a row: 16 codes of each scale, and two vectors of the rotary part."""
        at = data + Int64(part * 16)
        for vector in range(LATENT_GROUPS + 2):
            loaded = load_global_vector_if(wanted, at + vector * 64, 4)
            for word in range(4):
                words[vector, word] = loaded[word]
        loaded = load_global_vector_if(wanted, scale_address, 2)
        scales[0], scales[1] = loaded[0], loaded[1]

    def exchange(self, words, scales, found, target, buffer, item, part, wanted, data, scale_address):
        """Turn a quarter of a row into fp16 and store it into a tile; start loading that of the next tile behind it.

        Args:
            words, scales, found: the quarter, as `load` has brought it, and whether there is a row.
            target, buffer, item, part: where it belongs.
            wanted, data, scale_address: of the next one.
        """
        following = load_global_vector_if(wanted, scale_address, 2)
        at = data + Int64(part * 16)
        for vector in range(LATENT_GROUPS + 2):
            if vector < LATENT_GROUPS:
                exponent = (scales[vector // 4] >> (8 * (vector % 4))) & Uint32(255)
                scale = from_bits(exponent << 23)
                pair = fp16_word(scale, scale)
                halves = []
                for word in range(4):
                    halves += [multiply_pairs(one, pair) for one in e4m3_pairs(words[vector, word])]
                block = target + vector * (TILE_ITEMS * ROW_BYTES)
                store_shared(block + chunk_of(item, 2 * part), *halves[:4])
                store_shared(block + chunk_of(item, 2 * part + 1), *halves[4:])
            else:
                halves = [fp16_of_bf16(words[vector, word]) for word in range(4)]
                block = target + LATENT_GROUPS * (TILE_ITEMS * ROW_BYTES)
                store_shared(block + chunk_of(item, part + 4 * (vector - LATENT_GROUPS)), *halves)
            loaded = load_global_vector_if(wanted, at + vector * 64, 4)
            for word in range(4):
                words[vector, word] = loaded[word]
            if vector % 2:
                cute.arch.sync_warp()  # or the assembler would put off these loads until all is stored
        scales[0], scales[1] = following[0], following[1]
        store_shared_if(part == 0, self.live + (buffer * TILE_ITEMS + item) * 4, found)

    # Multiplying warps.

    @cute.jit
    def multiply(
        self,
        q,
        sink,
        positions,
        inv_freq,
        out,
        stats,
        token: Int32,
        head_block: Int32,
        split: Int32,
        first: Int32,
        last: Int32,
        scale: Float32,
        thread: Int32,
        warp: Int32,
    ):
        """Scores, weights and sums of all tiles; then the result, or the share of it."""
        config = self.config
        lane = thread % 32
        head_tile, key_group = warp % config.head_tiles, warp // config.head_tiles
        row = head_tile * 16 + lane // 4  # of this thread's scores; the other one is 8 further
        if first < last:
            self.load_queries(q, token, head_block, thread)
        everyone()
        sums = zeros(config.head_tiles, 8, 4)
        power = cute.make_rmem_tensor(cute.make_layout(2), Float32)
        total = cute.make_rmem_tensor(cute.make_layout(2), Float32)
        power.fill(LOWEST)
        total.fill(0.0)
        for tile in cutlass.range(first, last, unroll=1):
            index = tile - first
            buffer = index % 2
            rows = self.tiles + buffer * config.tile_bytes
            wait_barrier(self.full + buffer * 8, index // 2 % 2)
            scores = zeros(config.head_tiles, 4)
            self.score(scores, rows, head_tile, key_group, lane)
            logits = self.logits(scores, scale, buffer, key_group, lane)
            self.weigh(logits, power, total, row, key_group, lane)
            self.add_values(sums, rows, warp, lane)
            cute.arch.sync_warp()
            arrive_if(lane == 0, self.empty + buffer * 8)
        self.end(
            sums,
            power,
            total,
            row,
            key_group,
            sink,
            positions,
            inv_freq,
            out,
            stats,
            token,
            head_block,
            split,
            first,
            last,
            thread,
            warp,
        )

    @cute.jit
    def load_queries(self, q, token: Int32, head_block: Int32, thread: Int32):
        """Round the queries of this block's heads to fp16; heads past the last one are zeros."""
        config = self.config
        chunks = config.width // 8
        turns = min(8, config.rows * chunks // MULTIPLIERS)  # loads under way
        for start in cutlass.range(0, config.rows * chunks, turns * MULTIPLIERS, unroll=1):
            vectors = []
            for turn in cutlass.range_constexpr(turns):
                number = start + turn * MULTIPLIERS + thread
                head = head_block * config.rows + number // chunks
                wanted = Int32(head < config.heads)
                source = q[(token, cutlass.min(head, config.heads - 1), None)].iterator.toint()
                if cutlass.const_expr(config.q == "bf16"):
                    vectors.append(load_global_vector_if(wanted, source + Int64(number % chunks * 16), 4))
                else:
                    address = source + Int64(number % chunks * 32)
                    loaded = load_global_vector_if(wanted, address, 4) + load_global_vector_if(wanted, address + 16, 4)
                    vectors.append(loaded)
            for turn in cutlass.range_constexpr(turns):
                number = start + turn * MULTIPLIERS + thread
                row, chunk = number // chunks, number % chunks
                words = vectors[turn]
                if cutlass.const_expr(config.q == "bf16"):
                    halves = [fp16_of_bf16(word) for word in words]
                else:
                    halves = [fp16_word(from_bits(words[2 * i]), from_bits(words[2 * i + 1])) for i in range(4)]
                address = self.queries + chunk // 8 * (config.rows * ROW_BYTES) + chunk_of(row, chunk % 8)
                store_shared(address, *halves)

    def score(self, scores, rows, head_tile, key_group, lane):
        """Multiply 16 heads by this warp's share of the items.

        ldmatrix: lane l names row l % 8 of matrix l // 8: of queries (heads 0, heads 8, both of the next 8 columns), of
        rows (four times 8 columns of the same items).
        """
        config = self.config
        matrix, place = lane // 8, lane % 8
        head = head_tile * 16 + matrix % 2 * 8 + place
        query_row = self.queries + head * ROW_BYTES
        item_row = rows + (key_group * (8 * config.head_tiles) + place) * ROW_BYTES
        for block in range(config.column_blocks):
            queries = query_row + block * (config.rows * ROW_BYTES)
            items = item_row + block * (TILE_ITEMS * ROW_BYTES)
            for pair in range(2):  # 32 columns
                left = [
                    load_matrices(queries + ((Int32(4 * pair + 2 * step) + matrix // 2) ^ place) * 16)
                    for step in range(2)
                ]
                for group in range(config.head_tiles):
                    right = load_matrices(items + group * (8 * ROW_BYTES) + ((Int32(4 * pair) + matrix) ^ place) * 16)
                    for step in range(2):
                        accumulate(scores, (group,), left[step], right[2 * step : 2 * step + 2])

    def logits(self, scores, scale, buffer, key_group, lane):
        """Return the scaled scores of this thread, four a block of 8 items; minus infinity where there is no item."""
        first_item = key_group * (8 * self.config.head_tiles) + lane % 4 * 2
        logits = []
        for group in range(self.config.head_tiles):
            live = load_two_words(self.live + (buffer * TILE_ITEMS + first_item + group * 8) * 4)
            logits += [logit_of(scores[group, position], scale, live[position % 2]) for position in range(4)]
        return logits

    def weigh(self, logits, power, total, row, key_group, lane):
        """Turn logits into weights relative to a power of two that covers all items so far.

        Returns:
            The factors that this makes of what was summed before, of both rows.
        """
        config = self.config
        groups = config.head_tiles
        first_item = lane % 4 * 2
        for half in range(2):
            highest = from_bits(Uint32(NEGATIVE_INFINITY))
            for group in range(groups):
                for one in range(2):
                    highest = max_keeping_nan(highest, logits[4 * group + 2 * half + one])
            for offset in (1, 2):
                highest = max_keeping_nan(highest, cute.arch.shuffle_sync_bfly(highest, offset=offset))
            store_shared_float_if(lane % 4 == 0, self.maxima + (key_group * config.rows + row + 8 * half) * 4, highest)
        everyone()
        factors = []
        for half in range(2):
            top = load_shared_float(self.maxima + (row + 8 * half) * 4)
            for other in range(1, config.key_groups):
                address = self.maxima + (other * config.rows + row + 8 * half) * 4
                top = max_keeping_nan(top, load_shared_float(address))
            now = max_keeping_nan(power[half], ceiling(multiply(top, Float32(LOG2_E))))
            factor = power_of_two(power[half] - now)
            power[half] = now
            factors.append(factor)
            is_first = (lane % 4 == 0) & (key_group == 0)
            store_shared_float_if(is_first, self.factors + (row + 8 * half) * 4, factor)
            shift = Float32(HEADROOM) - now
            added = total[half] * factor
            for group in range(groups):
                weights = [exp2(fma(logits[4 * group + 2 * half + one], Float32(LOG2_E), shift)) for one in range(2)]
                added = added + (weights[0] + weights[1])
                chunk = chunk_of(row + 8 * half, key_group * groups + group)
                store_shared(self.weights + chunk + first_item * 2, fp16_word(*weights))
            total[half] = added
        self.publish()
        everyone()
        return factors

    def add_values(self, sums, rows, warp, lane):
        """Multiply the weights of all heads by this warp's 64 columns."""
        config = self.config
        for tile in range(config.head_tiles):
            for half in range(2):
                factor = load_shared_float(self.factors + (tile * 16 + 8 * half + lane // 4) * 4)
                rescale(sums, tile, half, factor)
        matrix, place = lane // 8, lane % 8
        weight_row = self.weights + (matrix % 2 * 8 + place) * ROW_BYTES
        item_row = rows + warp * (TILE_ITEMS * ROW_BYTES) + (matrix % 2 * 8 + place) * ROW_BYTES
        for step in range(TILE_ITEMS // 16):
            chunk = ((Int32(2 * step) + matrix // 2) ^ place) * 16
            left = [load_matrices(weight_row + tile * (16 * ROW_BYTES) + chunk) for tile in range(config.head_tiles)]
            for pair in range(4):  # 16 columns
                chunk = ((Int32(2 * pair) + matrix // 2) ^ place) * 16
                right = load_matrices_transposed(item_row + step * (16 * ROW_BYTES) + chunk)
                for tile in range(config.head_tiles):
                    for one in range(2):
                        accumulate(sums, (tile, 2 * pair + one), left[tile], right[2 * one : 2 * one + 2])

    # The end.

    @cute.jit
    def end(
        self,
        sums,
        power,
        total,
        row: Int32,
        key_group: Int32,
        sink,
        positions,
        inv_freq,
        out,
        stats,
        token: Int32,
        head_block: Int32,
        split: Int32,
        first: Int32,
        last: Int32,
        thread: Int32,
        warp: Int32,
    ):
        """Add up the weights of each head, and store the result, or the share of it."""
        config = self.config
        lane = thread % 32
        for half in cutlass.range_constexpr(2):
            of_row = total[half]
            of_row = of_row + cute.arch.shuffle_sync_bfly(of_row, offset=1)
            of_row = of_row + cute.arch.shuffle_sync_bfly(of_row, offset=2)
            is_first = lane % 4 == 0
            store_shared_float_if(is_first, self.added + (key_group * config.rows + row + 8 * half) * 4, of_row)
            is_first = is_first & (key_group == 0)
            store_shared_float_if(is_first, self.powers + (row + 8 * half) * 4, power[half])
        everyone()
        if cutlass.const_expr(config.out == "partial"):
            self.store_stats(stats, token, head_block, split, thread)
            if first < last:
                self.store_floats(sums, out[(token, split, None, None)], head_block, warp, lane)
        else:
            self.finish(sums, sink, positions, inv_freq, token, head_block, warp, lane)
            target = out[(token, None, None)]
            if cutlass.const_expr(config.out == "bf16"):
                self.store_halves(sums, target, head_block, warp, lane)
            else:
                self.store_floats(sums, target, head_block, warp, lane)

    def weight_sum(self, row):
        """Return the sum of the weights of a head, added in the order of items."""
        of_row = load_shared_float(self.added + row * 4)
        for group in range(1, self.config.key_groups):
            of_row = of_row + load_shared_float(self.added + (group * self.config.rows + row) * 4)
        return of_row

    @cute.jit
    def store_stats(self, stats, token: Int32, head_block: Int32, split: Int32, thread: Int32):
        """Store the power of two and the sum of weights of each head."""
        config = self.config
        head = head_block * config.rows + thread
        if (thread < config.rows) & (head < config.heads):
            stats[token, split, head, 0] = load_shared_float(self.powers + thread * 4)
            stats[token, split, head, 1] = self.weight_sum(thread)

    @cute.jit
    def finish(self, sums, sink, positions, inv_freq, token: Int32, head_block: Int32, warp: Int32, lane: Int32):
        """Divide by the sum of the weights with the sink's, round, and rotate the last columns back."""
        config = self.config
        first_row, first_block = self.place_of_sums(warp)
        for tile in cutlass.range_constexpr(self.warp_tiles):
            for half in cutlass.range_constexpr(2):
                row = first_row + tile * 16 + 8 * half + lane // 4
                head = cutlass.min(head_block * config.rows + row, config.heads - 1)
                power = load_shared_float(self.powers + row * 4)
                inverse = inverse_of(self.weight_sum(row), sink[head], power)
                for columns in cutlass.range_constexpr(8 * self.warp_blocks):
                    for one in cutlass.range_constexpr(2):
                        value = sums[tile, columns, 2 * half + one] * inverse
                        if cutlass.const_expr(config.out == "bf16"):
                            value = round_to_bf16(value)
                        sums[tile, columns, 2 * half + one] = value
        if first_block + self.warp_blocks == config.column_blocks:
            position = Float32(Int32(positions[token]))
            start = 8 * self.warp_blocks - config.rope // 8
            for columns in cutlass.range_constexpr(start, 8 * self.warp_blocks):
                pair = (columns - start) * 4 + lane % 4
                sine, cosine = sine_and_cosine(multiply(position, inv_freq[pair]))
                for tile in cutlass.range_constexpr(self.warp_tiles):
                    for half in cutlass.range_constexpr(2):
                        even, odd = sums[tile, columns, 2 * half], sums[tile, columns, 2 * half + 1]
                        sums[tile, columns, 2 * half] = fma(even, cosine, multiply(odd, sine))
                        sums[tile, columns, 2 * half + 1] = fma(odd, cosine, -multiply(even, sine))

    @cute.jit
    def store_halves(self, sums, target, head_block: Int32, warp: Int32, lane: Int32):
        """Store results in bf16, through the memory of the queries of the same heads and columns."""
        config = self.config
        first_row, first_block = self.place_of_sums(warp)
        memory = self.queries + first_block * (config.rows * ROW_BYTES)
        for tile in cutlass.range_constexpr(self.warp_tiles):
            for half in cutlass.range_constexpr(2):
                row = first_row + tile * 16 + 8 * half + lane // 4
                for columns in cutlass.range_constexpr(8 * self.warp_blocks):
                    word = pack_bf16(sums[tile, columns, 2 * half], sums[tile, columns, 2 * half + 1])
                    address = memory + columns // 8 * (config.rows * ROW_BYTES) + chunk_of(row, columns % 8)
                    store_shared(address + lane % 4 * 4, word)
        cute.arch.sync_warp()
        for block in cutlass.range_constexpr(self.warp_blocks):
            column_bytes = Int64((first_block + block) * ROW_BYTES)
            self.carry(memory + block * (config.rows * ROW_BYTES), target, head_block, first_row, column_bytes, lane)

    @cute.jit
    def store_floats(self, sums, target, head_block: Int32, warp: Int32, lane: Int32):
        """Store sums in fp32, 32 columns at a time, through the memory of the queries of the same heads."""
        config = self.config
        first_row, first_block = self.place_of_sums(warp)
        memory = self.queries + first_block * (config.rows * ROW_BYTES)
        for turn in cutlass.range_constexpr(2):
            for slot in cutlass.range_constexpr(self.warp_blocks):
                piece = turn * self.warp_blocks + slot
                for tile in cutlass.range_constexpr(self.warp_tiles):
                    for half in cutlass.range_constexpr(2):
                        row = first_row + tile * 16 + 8 * half + lane // 4
                        for columns in cutlass.range_constexpr(4):
                            values = [sums[tile, 4 * piece + columns, 2 * half + one] for one in range(2)]
                            address = memory + slot * (config.rows * ROW_BYTES)
                            address = address + chunk_of(row, columns * 2 + lane % 4 // 2) + lane % 2 * 8
                            store_two_floats(address, *values)
            cute.arch.sync_warp()
            for slot in cutlass.range_constexpr(self.warp_blocks):
                column_bytes = Int64(first_block * (2 * ROW_BYTES) + (turn * self.warp_blocks + slot) * ROW_BYTES)
                address = memory + slot * (config.rows * ROW_BYTES)
                self.carry(address, target, head_block, first_row, column_bytes, lane)
            cute.arch.sync_warp()

    @cute.jit
    def carry(self, memory: Int32, target, head_block: Int32, first_row: Int32, column_bytes: Int64, lane: Int32):
        """Carry 128 bytes of each of this warp's heads from shared to global memory."""
        config = self.config
        for turn in cutlass.range_constexpr(self.warp_tiles * 4):
            row, chunk = first_row + turn * 4 + lane // 8, lane % 8
            words = load_shared(memory + chunk_of(row, chunk), 4)
            head = head_block * config.rows + row
            address = target[(cutlass.min(head, config.heads - 1), None)].iterator.toint()
            store_global_vector_if(head < config.heads, address + column_bytes + Int64(chunk * 16), *words)


@cute.jit
def row_of(pool, tables, rows_per_block: Int32, request: Int32, row: Int32, sizes: cutlass.Constexpr):
    """Return the addresses of the data and the scales of a row of a request (ops/row_slots.py), 0 without a block."""
    data, scales = Int64(0), Int64(0)
    place, num_blocks = row // rows_per_block, tables.shape[1]
    column = place
    if place >= num_blocks:
        column = place % cutlass.max(num_blocks, 1)
    block = Int32(-1)
    if num_blocks > 0:
        block = tables[request, column]
    if block >= 0:
        page, inside = pool[(block, None)].iterator.toint(), row - place * rows_per_block
        data = page + Int64(inside) * sizes[0]
        scales = page + Int64(rows_per_block) * sizes[0] + Int64(inside) * sizes[1]
    return data, scales


def everyone():
    """Wait for all multiplying warps."""
    cute.arch.barrier(barrier_id=1, number_of_threads=MULTIPLIERS)


def accumulate(sums, place: tuple[int, ...], left, right):
    """Add a product of fragments to four sums."""
    result = mma_fp16([sums[(*place, index)] for index in range(4)], left, right)
    for index in range(4):
        sums[(*place, index)] = result[index]


@cute.jit
def logit_of(score: Float32, scale: Float32, live: Uint32):
    """Return a scaled score, minus infinity where there is no item."""
    z = multiply(score, scale)
    if live == 0:
        z = from_bits(Uint32(NEGATIVE_INFINITY))
    return z


@cute.jit
def rescale(sums: cute.Tensor, tile: cutlass.Constexpr, half: cutlass.Constexpr, factor: Float32):
    """Multiply the sums of a head by a power of two, unless it is 1."""
    if factor != 1.0:
        for columns in cutlass.range_constexpr(8):
            for one in cutlass.range_constexpr(2):
                sums[tile, columns, 2 * half + one] = sums[tile, columns, 2 * half + one] * factor


@cute.jit
def inverse_of(weights: Float32, sink: Float32, power: Float32):
    """Return 1 / (weights + the sink's weight); 1 where there is neither."""
    all_weights = weights + exp2(fma(sink, Float32(LOG2_E), Float32(HEADROOM) - power))
    if all_weights == 0.0:
        all_weights = Float32(1.0)
    return reciprocal(all_weights)
