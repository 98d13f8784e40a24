# SPDX-License-Identifier: Apache-2.0
"""Device half of round_index_query."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.parts.pool_device import (
    both_true,
    hadamard,
    round_vector,
    store_bf16,
    store_fp8_row,
    store_fp32,
    store_row,
    store_word_if,
)
from megamoe.kernels.parts.ptx_device import multiply
from megamoe.kernels.parts.rope_device import rotate_vector
from megamoe.kernels.parts.rows import VECTOR
from megamoe.kernels.parts.rows_device import (
    DTYPES,
    current_stream,
    overlap_launches,
    symbolic_heads,
    symbolic_vector,
)
from megamoe.kernels.rows.round_index_query_config import LANES, THREADS, Config

HEADS = THREADS // LANES
DATA_BYTES = {"index_fp4": 64, "index_fp8": 128}


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, num_rows = cute.sym_int32(), cute.sym_int32()
    q = symbolic_heads(DTYPES[config.q], num_tokens, config.heads, config.width)
    weights = make_fake_tensor(Float32, (num_tokens, config.heads), (cute.sym_int64(), 1))
    pos = make_fake_tensor(Int64, (num_tokens,), (1,))
    inv_freq = symbolic_vector(Float32, config.rope // 2)
    data = make_fake_tensor(Uint8, (num_rows, cute.sym_int32()), (cute.sym_int64(divisibility=16), 1), assumed_align=16)
    scales = make_fake_tensor(Uint8, (num_rows, cute.sym_int32()), (cute.sym_int64(), 1))
    scaled = make_fake_tensor(Float32, (num_rows,), (1,))
    arguments = (q, weights, pos, inv_freq, data, scales, scaled, Float32(0.0), current_stream())
    return RoundIndexQuery(config), arguments


class RoundIndexQuery:
    """Codes of hadamard(rope(q)), and weights * head_scale."""

    def __init__(self, config: Config):
        self.config = config

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        weights: cute.Tensor,
        pos: cute.Tensor,
        inv_freq: cute.Tensor,
        data: cute.Tensor,
        scales: cute.Tensor,
        scaled: cute.Tensor,
        head_scale: Float32,
        stream,
    ):
        self.kernel(q, weights, pos, inv_freq, data, scales, scaled, head_scale).launch(
            grid=((scaled.shape[0] + HEADS - 1) // HEADS, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self,
        q: cute.Tensor,
        weights: cute.Tensor,
        pos: cute.Tensor,
        inv_freq: cute.Tensor,
        data: cute.Tensor,
        scales: cute.Tensor,
        scaled: cute.Tensor,
        head_scale: Float32,
    ):
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = thread % LANES
        wanted = block * HEADS + thread // LANES < scaled.shape[0]
        row = cutlass.min(block * HEADS + thread // LANES, scaled.shape[0] - 1)
        overlap_launches()
        token, head = row // config.heads, row % config.heads
        position = Float32(Int32(pos[token]))
        source = cute.zipped_divide(q[(token, head, None)], (VECTOR,))
        first = (config.width - config.rope) // VECTOR
        values, vectors = [], []
        for index in cutlass.range_constexpr(config.width // (VECTOR * LANES)):
            vector = index * LANES + lane
            registers = cute.make_rmem_tensor(cute.make_layout(VECTOR), q.element_type)
            cute.autovec_copy(source[(None,), vector], registers)
            one = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
            one.store(registers.load().to(Float32))
            if cutlass.const_expr((index + 1) * LANES > first):
                rotate_vector(one, vector, first, position, inv_freq, False)
            values.append(one)
            vectors.append(vector)
        for one in values:
            if cutlass.const_expr(config.q == "bf16"):
                round_vector(one)
        if cutlass.const_expr(config.rotate):
            hadamard(values, LANES)
            for one in values:
                if cutlass.const_expr(config.q == "bf16"):
                    round_vector(one)
        address = data[(row, None)].iterator.toint()
        scale_address = scales[(row, None)].iterator.toint()
        if cutlass.const_expr(config.rounding == "index_fp8"):
            exponent = store_fp8_row(values, vectors, LANES, wanted, address)
            store_word_if(both_true(wanted, lane == 0), scale_address, exponent, 1)
        elif cutlass.const_expr(config.rounding == "index_fp4"):
            store_row(values, vectors, LANES, wanted, "index_fp4", config.width, address, scale_address)
        else:
            for index in cutlass.range_constexpr(len(values)):
                if cutlass.const_expr(config.q == "bf16"):
                    store_bf16(wanted, values[index], address + Int64(vectors[index]) * 16)
                else:
                    store_fp32(wanted, values[index], address + Int64(vectors[index]) * 32)
        if both_true(wanted, lane == 0):
            scaled[row] = multiply(weights[token, head], head_scale)
