# SPDX-License-Identifier: Apache-2.0
"""Device half of compress_kv and write_index_keys.

First the threads of a block look up where the rows are, one row each. Then a thread goes through its share of the rows,
8 channels of each, four rows at a time: their loads are on their way together. It keeps the largest score so far, the
sum of the weights, and the weighted sum; parts are joined through shared memory, in their order.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass.cute.arch import inline_ptx
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.cache.compress_config import Config
from megamoe.kernels.parts.memory_device import load_global_vector_if, store_global_vector
from megamoe.kernels.parts.mma_device import bf16_pair
from megamoe.kernels.parts.pool_device import (
    hadamard,
    ring_slot,
    round_vector,
    row_addresses,
    row_bytes,
    store_row,
    symbolic_pool,
)
from megamoe.kernels.parts.ptx_device import (
    add,
    bits_of,
    divide,
    fma,
    from_bits,
    max_keeping_nan,
    multiply,
    subtract,
)
from megamoe.kernels.parts.rope_device import Rotation
from megamoe.kernels.parts.rows import VECTOR, WARP, RowTile
from megamoe.kernels.parts.rows_device import (
    DTYPES,
    RowThread,
    current_stream,
    overlap_launches,
    symbolic_rows,
    symbolic_vector,
)

LOWEST = -1e30
"""Where the largest score starts: below every score, and finite, so that differences are."""


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens = cute.sym_int32()
    raw = symbolic_rows(Float32, num_tokens, 2 * config.half)
    ape = symbolic_rows(DTYPES[config.ape], config.ratio, config.half)
    weight = symbolic_vector(DTYPES[config.weight], config.width)
    tokens = [make_fake_tensor(dtype, (num_tokens,), (1,)) for dtype in (Int64, Int32, Int32, Int64, Int64)]
    tables = make_fake_tensor(Int32, (cute.sym_int32(), cute.sym_int32()), (cute.sym_int64(), 1))
    inv_freq = symbolic_vector(Float32, config.rope // 2)
    arguments = (
        raw,
        ape,
        weight,
        *(symbolic_pool() for _ in range(3)),
        *tokens[:3],
        tables,
        *tokens[3:],
        inv_freq,
        *(Int32(0) for _ in range(4)),
        Float32(0.0),
        current_stream(),
    )
    return Compress(config), arguments


def exponential(x):
    """Return e^x of a number that is not positive: one product and one instruction, 2 units in the last place near 0.

    Far below, the product's rounding counts |x| times; so small a weight does not.
    """
    return inline_ptx(
        "{ .reg .f32 turns; mul.rn.f32 turns, {$r0}, 0f3FB8AA3B; ex2.approx.ftz.f32 {$w0}, turns; }",
        write_only_types=[Float32],
        read_only_args=[x],
    )


def load_scores_if(wanted, address):
    """Return 4 words of global memory, or minus infinities if `wanted` is 0."""
    fill = " ".join(f"mov.b32 {{$w{index}}}, 0xFF800000;" for index in range(4))
    return inline_ptx(
        "{ .reg .pred p; .reg .b32 flag; mov.b32 flag, {$r0}; setp.ne.b32 p, flag, 0; "
        + fill
        + " @p ld.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r1}]; }",
        write_only_types=[Uint32] * 4,
        read_only_args=[wanted, address],
    )


class EntryThread(RowThread):
    """This thread's share of an entry: one vector of its row."""

    def __init__(self, config: Config, thread):
        self.tile = RowTile(config.width, config.lanes, 1, 1, True)
        self.lane = thread % config.lanes


class Compress:
    """See ops/compress_kv.py."""

    def __init__(self, config: Config):
        self.config = config
        self.threads = config.lanes * config.parts

    @cute.jit
    def __call__(
        self,
        raw: cute.Tensor,
        ape: cute.Tensor,
        weight: cute.Tensor,
        state: cute.Tensor,
        into: cute.Tensor,
        entries: cute.Tensor,
        positions: cute.Tensor,
        requests: cute.Tensor,
        first_idx: cute.Tensor,
        tables: cute.Tensor,
        state_slots: cute.Tensor,
        entry_slots: cute.Tensor,
        inv_freq: cute.Tensor,
        state_rows: Int32,
        into_rows: Int32,
        entry_rows: Int32,
        in_step: Int32,
        eps: Float32,
        stream,
    ):
        pools, numbers = (state, into, entries), (state_rows, into_rows, entry_rows, in_step)
        tokens = (positions, requests, first_idx, tables, state_slots, entry_slots)
        self.kernel(raw, ape, weight, pools, tokens, inv_freq, numbers, eps).launch(
            grid=((raw.shape[0] + self.config.tokens - 1) // self.config.tokens, 1, 1),
            block=(self.threads, 1, 1),
            stream=stream,
            use_pdl=True,
            min_blocks_per_mp=640 // self.threads,
            preferred_smem_carveout=50,
        )

    @cute.kernel
    def kernel(self, raw: cute.Tensor, ape: cute.Tensor, weight: cute.Tensor, pools, tokens, inv_freq, numbers, eps):
        config = self.config
        state, into, entries = pools
        positions, requests, first_idx, tables, state_slots, entry_slots = tokens
        state_rows, into_rows, entry_rows, in_step = numbers
        shared = cutlass.memory.SmemAllocator()
        sources = shared.allocate_tensor(Int64, cute.make_layout(config.num_rows))
        ape_rows = shared.allocate_tensor(Int32, cute.make_layout(config.num_rows))
        sums = shared.allocate_tensor(Float32, cute.make_layout(max(self.threads // WARP, 1)))
        joined = shared.allocate_tensor(Float32, cute.make_layout((config.lanes, 3 * VECTOR, config.parts)))
        block, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        overlap_launches()
        if cutlass.const_expr(config.tokens == 1):
            token = block
            position, slot, entry = Int32(positions[token]), Int32(state_slots[token]), Int32(entry_slots[token])
            loaded = self.load_raw(raw, ape, token, position, slot, thread)
            if entry >= 0:  # the same for the whole block
                self.find_rows(raw, state, tokens, numbers, token, position, sources, ape_rows, thread)
            self.store_raw(into, into_rows, slot, loaded)
            if entry >= 0:
                cute.arch.sync_threads()
                self.write_entry(
                    ape,
                    weight,
                    entries,
                    position,
                    entry,
                    inv_freq,
                    entry_rows,
                    eps,
                    thread,
                    sources,
                    ape_rows,
                    sums,
                    joined,
                )
        else:
            first, num_tokens, completing = block * config.tokens, raw.shape[0], Int32(0)
            for index in cutlass.range_constexpr(config.tokens):
                token = cutlass.min(first + index, num_tokens - 1)
                completes = Int32(first + index < num_tokens) & Int32(entry_slots[token] >= Int64(0))
                completing = completing | (completes << index)
            for start in cutlass.range(0, config.tokens, config.rows_stored_at_once, unroll=1):
                rows = []
                for index in cutlass.range_constexpr(config.rows_stored_at_once):
                    token = first + start + index
                    place = cutlass.min(token, num_tokens - 1)
                    position, slot = Int32(positions[place]), Int32(state_slots[place])
                    if token >= num_tokens:
                        slot = Int32(-1)
                    rows.append((slot, self.load_raw(raw, ape, place, position, slot, thread)))
                for slot, loaded in rows:
                    self.store_raw(into, into_rows, slot, loaded)
            for index in cutlass.range(config.tokens, unroll=1):
                if (completing >> index) & 1 == 1:  # the same for the whole block
                    token = first + index
                    position, entry = Int32(positions[token]), Int32(entry_slots[token])
                    self.find_rows(raw, state, tokens, numbers, token, position, sources, ape_rows, thread)
                    cute.arch.sync_threads()
                    self.write_entry(
                        ape,
                        weight,
                        entries,
                        position,
                        entry,
                        inv_freq,
                        entry_rows,
                        eps,
                        thread,
                        sources,
                        ape_rows,
                        sums,
                        joined,
                    )
                    cute.arch.sync_threads()

    @cute.jit
    def find_rows(self, raw, state, tokens, numbers, token: Int32, position: Int32, sources, ape_rows, thread: Int32):
        """Look up where the rows of a token's entry are, a row a thread."""
        config = self.config
        _, requests, first_idx, tables, state_slots, _ = tokens
        state_rows, _, _, in_step = numbers
        request, first_of_request = requests[token], Int32(0)
        if in_step != 0:
            first_of_request = first_idx[token]
        for first in cutlass.range_constexpr(0, config.num_rows, self.threads):
            self.find_row(
                first + thread,
                raw,
                state,
                tables,
                state_slots,
                token,
                position,
                request,
                first_of_request,
                state_rows,
                in_step,
                sources,
                ape_rows,
            )

    @cute.jit
    def store_raw(self, into, into_rows: Int32, slot: Int32, loaded):
        """Store a token's values, and its scores with `ape` added."""
        config = self.config
        if slot >= 0:
            data, _ = row_addresses(into, slot, into_rows, *row_bytes("fp32", 2 * config.half))
            for vector, values, bias, column in loaded:
                address = data + Int64(vector) * 16
                self.store_vector(vector < 2 * config.half // 4, address, values, bias, column >= 0)

    def load_raw(self, raw, ape, token, position, slot, thread):
        """Return this thread's vectors of a token's row, with what is to be added to those that are scores."""
        config = self.config
        num_vectors = 2 * config.half // 4
        source = raw[(token, None)].iterator.toint()
        ape_row = ape[(cutlass.max(position, 0) % config.ratio, None)].iterator.toint()
        wanted, loaded = Int32(slot >= 0), []
        for first in range(0, num_vectors, self.threads):
            vector = first + thread
            here, column = wanted & Int32(vector < num_vectors), vector * 4 - config.half
            values = [from_bits(word) for word in load_global_vector_if(here, source + Int64(vector) * 16, 4)]
            bias = self.load_ape(here & Int32(column >= 0), ape_row, column, 4)
            loaded.append((vector, values, bias, column))
        return loaded

    @cute.jit
    def store_vector(self, wanted, address: Int64, values, bias, is_score):
        """Store four values, or four scores with their bias."""
        if wanted:
            words = [bits_of(value) for value in values]
            if is_score:
                words = [bits_of(add(value, one)) for value, one in zip(values, bias, strict=True)]
            store_global_vector(address, *words)

    def load_ape(self, wanted, row, column, count: int):
        """Return 4 or 8 values of a row of `ape` as fp32, or zeros."""
        if self.config.ape == "f32":
            address = row + Int64(column) * 4
            words = [word for at in range(0, 4 * count, 16) for word in load_global_vector_if(wanted, address + at, 4)]
            return [from_bits(word) for word in words]
        words = load_global_vector_if(wanted, row + Int64(column) * 2, count // 2)
        return [value for word in words for value in bf16_pair(word)]

    @cute.jit
    def find_row(
        self,
        number: Int32,
        raw,
        state,
        tables,
        state_slots,
        token: Int32,
        position: Int32,
        request: Int32,
        first_of_request: Int32,
        state_rows: Int32,
        in_step: Int32,
        sources,
        ape_rows,
    ):
        """Write where a row of the entry is, and the row of `ape` that is still to be added; 0 and -1 for none.

        A row of this step is read where it came from. In the rings it is one if the token that many places before this
        one writes the very slot.
        """
        config = self.config
        if number < config.num_rows:
            back = config.num_rows - 1 - number
            row_position, row_token = position - back, token - back
            source, ape_row = Int64(0), Int32(-1)
            if (row_position >= 0) & (request >= 0):
                is_new = row_token >= first_of_request
                slot = ring_slot(tables, state_rows, request, row_position)
                if (in_step == 0) & is_new:
                    is_new = (state_slots[row_token] == Int64(slot)) & (slot >= 0)
                if is_new:
                    source = raw[(row_token, None)].iterator.toint()
                    ape_row = row_position % config.ratio
                else:
                    if slot >= 0:
                        source, _ = row_addresses(state, slot, state_rows, *row_bytes("fp32", 2 * config.half))
            sources[number] = source
            ape_rows[number] = ape_row

    @cute.jit
    def pool_rows(self, ape, sources, ape_rows, thread: Int32, joined):
        """Return the weighted means of this thread's channels over all rows."""
        config = self.config
        lane, part = thread % config.lanes, thread // config.lanes
        top, total, pooled = (cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32) for _ in range(3))
        top.fill(LOWEST)
        total.fill(0.0)
        pooled.fill(0.0)
        rows_of_part, at_once = config.num_rows // config.parts, config.rows_at_once
        for turn in cutlass.range(rows_of_part // at_once, unroll=1):
            first = part * rows_of_part + turn * at_once
            rows = []
            for index in cutlass.range_constexpr(at_once):
                number = first + index
                source, ape_row = sources[number], ape_rows[number]
                column = lane * VECTOR
                if cutlass.const_expr(config.overlap):  # the rows of the block itself have the second half
                    column = column + Int32(number >= config.ratio) * config.width
                here, address = Int32(source != Int64(0)), source + Int64(column) * 4
                words = [word for at in (0, 16) for word in load_global_vector_if(here, address + at, 4)]
                address = address + config.half * 4
                scores = [word for at in (0, 16) for word in load_scores_if(here, address + at)]
                ape_address = ape[(cutlass.max(ape_row, 0), None)].iterator.toint()
                bias = self.load_ape(Int32(ape_row >= 0), ape_address, column, VECTOR)
                rows.append((words, scores, bias))
            for element in cutlass.range_constexpr(VECTOR):
                scores = [add(from_bits(score[element]), bias[element]) for _, score, bias in rows]
                highest = top[element]
                for score in scores:
                    highest = max_keeping_nan(highest, score)
                before = exponential(subtract(top[element], highest))
                weight_sum, value_sum = multiply(total[element], before), multiply(pooled[element], before)
                for score, (words, _, _) in zip(scores, rows, strict=True):
                    weight = exponential(subtract(score, highest))
                    weight_sum = add(weight_sum, weight)
                    value_sum = fma(weight, from_bits(words[element]), value_sum)
                top[element], total[element], pooled[element] = highest, weight_sum, value_sum
        if cutlass.const_expr(config.parts > 1):
            self.join(joined, lane, part, top, total, pooled)
        means = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
        for element in cutlass.range_constexpr(VECTOR):
            divisor = total[element]
            if divisor == Float32(0.0):
                divisor = Float32(1.0)
            means[element] = divide(pooled[element], divisor)
        return means

    @cute.jit
    def write_entry(
        self,
        ape,
        weight,
        entries,
        position: Int32,
        entry: Int32,
        inv_freq,
        entry_rows: Int32,
        eps: Float32,
        thread: Int32,
        sources,
        ape_rows,
        sums,
        joined,
    ):
        """Pool the rows; norm, rotate and store the means."""
        config = self.config
        share = EntryThread(config, thread)
        lane, part = share.lane, thread // config.lanes
        rotation = Rotation(share, inv_freq, Float32(position + 1 - config.ratio), config.rope)
        values = self.pool_rows(ape, sources, ape_rows, thread, joined)
        weights = cute.make_rmem_tensor(cute.make_layout(VECTOR), weight.element_type)
        cute.autovec_copy(cute.zipped_divide(weight, (VECTOR,))[(None,), lane], weights)
        factors = weights.load().to(Float32)
        square = Float32(0.0)
        for element in cutlass.range_constexpr(VECTOR):
            square = square + values[element] * values[element]
        square = cute.arch.warp_reduction(square, lambda a, b: a + b, threads_in_group=min(WARP, config.lanes))
        if cutlass.const_expr(config.lanes > WARP):
            warp = cute.arch.warp_idx()
            if cute.arch.lane_idx() == 0:
                sums[warp] = square
            cute.arch.sync_threads()
            warps = config.lanes // WARP
            square = sums[part * warps]
            for other in cutlass.range_constexpr(1, warps):
                square = square + sums[part * warps + other]
        factor = cute.math.rsqrt(square / config.width + eps)
        for element in cutlass.range_constexpr(VECTOR):
            values[element] = values[element] * factor * factors[element]
        turned = rotation.turned(share, 0, [values[element] for element in range(VECTOR)])
        for element in cutlass.range_constexpr(VECTOR):
            values[element] = turned[element]
        if cutlass.const_expr(config.rounded):
            round_vector(values)
        if cutlass.const_expr(config.rotate):
            hadamard([values], config.lanes)
            if cutlass.const_expr(config.rounded):
                round_vector(values)
        data, scales = row_addresses(entries, entry, entry_rows, *row_bytes(config.row_format, config.width))
        store_row([values], [lane], config.lanes, part == 0, config.row_format, config.width, data, scales)

    @cute.jit
    def join(self, joined, lane: Int32, part: Int32, top, total, pooled):
        """Join the parts of all rows, in their order; every part gets the result."""
        config = self.config
        for element in cutlass.range_constexpr(VECTOR):
            joined[lane, element, part] = top[element]
            joined[lane, VECTOR + element, part] = total[element]
            joined[lane, 2 * VECTOR + element, part] = pooled[element]
        cute.arch.sync_threads()
        for element in cutlass.range_constexpr(VECTOR):
            highest = joined[lane, element, 0]
            for other in cutlass.range_constexpr(1, config.parts):
                highest = cutlass.max(highest, joined[lane, element, other])
            weights, values = Float32(0.0), Float32(0.0)
            for other in cutlass.range_constexpr(config.parts):
                share = exponential(subtract(joined[lane, element, other], highest))
                weights = weights + joined[lane, VECTOR + element, other] * share
                values = values + joined[lane, 2 * VECTOR + element, other] * share
            total[element] = weights
            pooled[element] = values
