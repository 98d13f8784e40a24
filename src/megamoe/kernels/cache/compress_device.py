# SPDX-License-Identifier: Apache-2.0
"""Device half of compress_kv and write_index_keys.

First the threads of a block look up where the rows are, one row each. Then a thread goes through its share of the rows,
8 channels of each, four rows at a time: their loads are on their way together. It keeps the largest score so far, the
sum of the weights, and the weighted sum; parts are joined through shared memory, in their order.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
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
from megamoe.kernels.parts.ptx_device import add, bits_of, divide, from_bits
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
MISSING = -float("inf")


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
            grid=(raw.shape[0], 1, 1), block=(self.threads, 1, 1), stream=stream, use_pdl=True
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
        token, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        overlap_launches()
        position, slot, entry = Int32(positions[token]), Int32(state_slots[token]), Int32(entry_slots[token])
        request, first_of_request = requests[token], Int32(0)
        if in_step != 0:
            first_of_request = first_idx[token]
        if slot >= 0:
            self.store_raw(raw, ape, into, token, position, slot, into_rows, thread)
        if entry >= 0:  # the same for the whole block
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

    @cute.jit
    def store_raw(self, raw, ape, into, token: Int32, position: Int32, slot: Int32, into_rows: Int32, thread: Int32):
        """Store a token's values, and its scores with `ape` added."""
        config = self.config
        half = config.half
        num_vectors = 2 * half // 4
        source = raw[(token, None)].iterator.toint()
        data, _ = row_addresses(into, slot, into_rows, *row_bytes("fp32", 2 * half))
        ape_row = ape[(position % config.ratio, None)].iterator.toint()
        loaded = []
        for first in cutlass.range_constexpr(0, num_vectors, self.threads):
            vector = first + thread
            here, column = Int32(vector < num_vectors), vector * 4 - half
            values = [from_bits(word) for word in load_global_vector_if(here, source + Int64(vector) * 16, 4)]
            bias = self.load_ape(here & Int32(column >= 0), ape_row, column, 4)
            loaded.append((vector, values, bias, column))
        for vector, values, bias, column in loaded:
            self.store_vector(vector < num_vectors, data + Int64(vector) * 16, values, bias, column >= 0)

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
                scores = [word for at in (0, 16) for word in load_global_vector_if(here, address + at, 4)]
                ape_address = ape[(cutlass.max(ape_row, 0), None)].iterator.toint()
                bias = self.load_ape(Int32(ape_row >= 0), ape_address, column, VECTOR)
                rows.append((source != Int64(0), words, scores, bias))
            for element in cutlass.range_constexpr(VECTOR):
                scores = [self.score(here, from_bits(score[element]), bias[element]) for here, _, score, bias in rows]
                highest = top[element]
                for score in scores:
                    highest = cutlass.max(highest, score)
                before = cute.math.exp(top[element] - highest)
                weight_sum, value_sum = total[element] * before, pooled[element] * before
                for score, (_, words, _, _) in zip(scores, rows, strict=True):
                    weight = cute.math.exp(score - highest)
                    weight_sum = weight_sum + weight
                    value_sum = value_sum + weight * from_bits(words[element])
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
    def score(self, here, score: Float32, bias: Float32) -> Float32:
        """Return the score of a row with its bias, or minus infinity where there is no row."""
        result = Float32(MISSING)
        if here:
            result = add(score, bias)
        return result

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
                share = cute.math.exp(joined[lane, element, other] - highest)
                weights = weights + joined[lane, VECTOR + element, other] * share
                values = values + joined[lane, 2 * VECTOR + element, other] * share
            total[element] = weights
            pooled[element] = values
