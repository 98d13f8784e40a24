# SPDX-License-Identifier: Apache-2.0
"""Device half of compress_kv and write_index_keys.

A thread has 8 channels of an entry (and, of 128 rows, an eighth of the rows). It goes through the rows with the running
maximum of the scores, so that a row is read once; parts are joined through shared memory in their order.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.cache.compress_config import Config
from megamoe.kernels.parts.memory_device import load_global_vector_if, store_global_vector
from megamoe.kernels.parts.pool_device import (
    hadamard,
    ring_slot,
    round_vector,
    row_addresses,
    row_bytes,
    store_row,
    symbolic_pool,
)
from megamoe.kernels.parts.ptx_device import add, bits_of, from_bits
from megamoe.kernels.parts.rope_device import rotate_vector
from megamoe.kernels.parts.rows import VECTOR, WARP
from megamoe.kernels.parts.rows_device import (
    DTYPES,
    current_stream,
    overlap_launches,
    symbolic_rows,
    symbolic_vector,
)

LOWEST = -1e30
"""Where the running maximum starts: below every score, and finite, so that differences are."""


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, half = cute.sym_int32(), config.width * (2 if config.overlap else 1)
    raw = symbolic_rows(Float32, num_tokens, 2 * half)
    ape = symbolic_rows(DTYPES[config.ape], config.ratio, half)
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
        *(Int32(0) for _ in range(3)),
        Float32(0.0),
        current_stream(),
    )
    return Compress(config), arguments


class Compress:
    """See ops/compress_kv.py."""

    def __init__(self, config: Config):
        self.config = config
        self.threads = max(config.lanes * config.parts, WARP)

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
        eps: Float32,
        stream,
    ):
        self.kernel(
            raw,
            ape,
            weight,
            state,
            into,
            entries,
            positions,
            requests,
            first_idx,
            tables,
            state_slots,
            entry_slots,
            inv_freq,
            state_rows,
            into_rows,
            entry_rows,
            eps,
        ).launch(grid=(raw.shape[0], 1, 1), block=(self.threads, 1, 1), stream=stream, use_pdl=True)

    @cute.kernel
    def kernel(
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
        eps: Float32,
    ):
        config = self.config
        shared = cutlass.memory.SmemAllocator()
        sums = shared.allocate_tensor(Float32, cute.make_layout(max(config.lanes // WARP, 1)))
        joined = shared.allocate_tensor(Float32, cute.make_layout((3, VECTOR, config.lanes, config.parts)))
        token, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        overlap_launches()
        position = Int32(positions[token])
        slot = Int32(state_slots[token])
        if slot >= 0:
            self.store_raw(raw, ape, into, token, position, slot, into_rows, thread)
        entry = Int32(entry_slots[token])
        if entry >= 0:  # the same for the whole block
            self.write_entry(
                raw,
                ape,
                weight,
                state,
                entries,
                token,
                position,
                requests[token],
                first_idx[token],
                tables,
                entry,
                inv_freq,
                state_rows,
                entry_rows,
                eps,
                thread,
                sums,
                joined,
            )

    @cute.jit
    def store_raw(self, raw, ape, into, token: Int32, position: Int32, slot: Int32, into_rows: Int32, thread: Int32):
        """Store a token's values, and its scores with `ape` added."""
        config = self.config
        half = config.width * (2 if config.overlap else 1)
        data, _ = row_addresses(into, slot, into_rows, *row_bytes("fp32", 2 * half))
        for first in cutlass.range_constexpr(0, 2 * half // 4, self.threads):
            vector = first + thread
            if vector < 2 * half // 4:
                words = load_global_vector_if(Int32(1), raw[(token, None)].iterator.toint() + Int64(vector) * 16, 4)
                values = [from_bits(word) for word in words]
                column = vector * 4 - half
                if column >= 0:
                    for element in cutlass.range_constexpr(4):
                        values[element] = add(values[element], Float32(ape[position % config.ratio, column + element]))
                store_global_vector(data + Int64(vector) * 16, *[bits_of(value) for value in values])

    @cute.jit
    def write_entry(
        self,
        raw,
        ape,
        weight,
        state,
        entries,
        token: Int32,
        position: Int32,
        request: Int32,
        first_of_request: Int32,
        tables,
        entry: Int32,
        inv_freq,
        state_rows: Int32,
        entry_rows: Int32,
        eps: Float32,
        thread: Int32,
        sums,
        joined,
    ):
        """Pool the rows of a block of tokens, norm, rotate and store."""
        config = self.config
        half = config.width * (2 if config.overlap else 1)
        lane, part = thread % config.lanes, thread // config.lanes
        top = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
        total = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
        pooled = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
        top.fill(LOWEST)
        total.fill(0.0)
        pooled.fill(0.0)
        rows_of_part = config.num_rows // config.parts
        if part < config.parts:
            for index in cutlass.range(rows_of_part, unroll=1):
                number = part * rows_of_part + index
                back = config.num_rows - 1 - number
                row_position, row_token = position - back, token - back
                column = lane * VECTOR
                if cutlass.const_expr(config.overlap):
                    if number >= config.ratio:
                        column = column + config.width
                if row_position >= 0:
                    source = raw[(token, None)].iterator.toint()
                    is_new = row_token >= first_of_request
                    if is_new:
                        source = raw[(cutlass.max(row_token, 0), None)].iterator.toint()
                    else:
                        slot = ring_slot(tables, state_rows, request, row_position)
                        source, _ = row_addresses(state, cutlass.max(slot, 0), state_rows, *row_bytes("fp32", 2 * half))
                    self.add_row(source, column, ape, row_position % config.ratio, is_new, top, total, pooled)
        if cutlass.const_expr(config.parts > 1):
            self.join(joined, lane, part, top, total, pooled)
        values = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
        square = Float32(0.0)
        for element in cutlass.range_constexpr(VECTOR):
            mean = Float32(0.0)
            if total[element] > 0.0:
                mean = pooled[element] / total[element]
            values[element] = mean
            square = square + mean * mean
        square = cute.arch.warp_reduction(square, lambda a, b: a + b, threads_in_group=min(WARP, config.lanes))
        if cutlass.const_expr(config.lanes > WARP):
            if cutlass.const_expr(config.parts > 1):
                cute.arch.sync_threads()
            warp = cute.arch.warp_idx()
            if (cute.arch.lane_idx() == 0) & (part == 0):
                sums[warp] = square
            cute.arch.sync_threads()
            square = sums[0]
            for other in cutlass.range_constexpr(1, config.lanes // WARP):
                square = square + sums[other]
        factor = cute.math.rsqrt(square / config.width + eps)
        for element in cutlass.range_constexpr(VECTOR):
            values[element] = values[element] * factor * Float32(weight[lane * VECTOR + element])
        first = (config.width - config.rope) // VECTOR
        rotate_vector(values, lane, first, Float32(position + 1 - config.ratio), inv_freq, False)
        if cutlass.const_expr(config.rounded):
            round_vector(values)
        if cutlass.const_expr(config.rotate):
            hadamard([values], config.lanes)
            if cutlass.const_expr(config.rounded):
                round_vector(values)
        data, scales = row_addresses(entries, entry, entry_rows, *row_bytes(config.row_format, config.width))
        store_row([values], [lane], config.lanes, part == 0, config.row_format, config.width, data, scales)

    @cute.jit
    def add_row(self, source: Int64, column: Int32, ape, ape_row: Int32, is_new, top, total, pooled):
        """Add a row's values by their scores to the running means."""
        config = self.config
        half = config.width * (2 if config.overlap else 1)
        address = source + Int64(column) * 4
        words = load_global_vector_if(Int32(1), address, 4) + load_global_vector_if(Int32(1), address + 16, 4)
        address = address + half * 4
        scores = load_global_vector_if(Int32(1), address, 4) + load_global_vector_if(Int32(1), address + 16, 4)
        for element in cutlass.range_constexpr(VECTOR):
            score = from_bits(scores[element])
            if is_new:
                score = add(score, Float32(ape[ape_row, column + element]))
            highest = cutlass.max(top[element], score)
            before = cute.math.exp(top[element] - highest)
            own = cute.math.exp(score - highest)
            total[element] = total[element] * before + own
            pooled[element] = pooled[element] * before + own * from_bits(words[element])
            top[element] = highest

    @cute.jit
    def join(self, joined, lane: Int32, part: Int32, top, total, pooled):
        """Join the parts of all rows, in their order; every part gets the result."""
        config = self.config
        for element in cutlass.range_constexpr(VECTOR):
            joined[0, element, lane, part] = top[element]
            joined[1, element, lane, part] = total[element]
            joined[2, element, lane, part] = pooled[element]
        cute.arch.sync_threads()
        for element in cutlass.range_constexpr(VECTOR):
            highest = joined[0, element, lane, 0]
            for other in cutlass.range_constexpr(1, config.parts):
                highest = cutlass.max(highest, joined[0, element, lane, other])
            weights, values = Float32(0.0), Float32(0.0)
            for other in cutlass.range_constexpr(config.parts):
                share = cute.math.exp(joined[0, element, lane, other] - highest)
                weights = weights + joined[1, element, lane, other] * share
                values = values + joined[2, element, lane, other] * share
            total[element] = weights
            pooled[element] = values
