# SPDX-License-Identifier: Apache-2.0
"""Device half of the sum of partial attention results, in the order of items."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.attention.attention_combine_config import THREADS, Config
from megamoe.kernels.attention.attention_device import HEADROOM, LOG2_E, LOWEST, exp2, power_of_two
from megamoe.kernels.parts.memory_device import load_global_vector_if
from megamoe.kernels.parts.pool_device import round_vector
from megamoe.kernels.parts.ptx_device import fma, from_bits, max_keeping_nan, multiply, reciprocal
from megamoe.kernels.parts.rope_device import sine_and_cosine
from megamoe.kernels.parts.rows import VECTOR
from megamoe.kernels.parts.rows_device import (
    DTYPES,
    current_stream,
    overlap_launches,
    symbolic_rows,
    symbolic_vector,
)


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, splits = cute.sym_int32(), cute.sym_int32()
    sums = make_fake_tensor(
        Float32,
        (num_tokens, splits, config.heads, config.width),
        (cute.sym_int64(divisibility=4), config.heads * config.width, config.width, 1),
        assumed_align=16,
    )
    stats = make_fake_tensor(Float32, (num_tokens, splits, config.heads, 2), (cute.sym_int64(), config.heads * 2, 2, 1))
    arguments = (
        sums,
        stats,
        symbolic_vector(Float32, config.heads),
        make_fake_tensor(Int64, (num_tokens,), (1,)),
        symbolic_vector(Float32, config.rope // 2),
        symbolic_rows(DTYPES[config.out], cute.sym_int32(), config.width),
        current_stream(),
    )
    return AttentionCombine(config), arguments


class AttentionCombine:
    """y = rotated(sum of partial sums / (sum of their weights + the sink's))."""

    def __init__(self, config: Config):
        self.config = config
        self.heads = THREADS // config.lanes

    @cute.jit
    def __call__(
        self,
        sums: cute.Tensor,
        stats: cute.Tensor,
        sink: cute.Tensor,
        positions: cute.Tensor,
        inv_freq: cute.Tensor,
        out: cute.Tensor,
        stream,
    ):
        blocks = (out.shape[0] + (self.heads - 1)) // self.heads
        self.kernel(sums, stats, sink, positions, inv_freq, out).launch(
            grid=(blocks, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self,
        sums: cute.Tensor,
        stats: cute.Tensor,
        sink: cute.Tensor,
        positions: cute.Tensor,
        inv_freq: cute.Tensor,
        out: cute.Tensor,
    ):
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = thread % config.lanes
        row = cutlass.min(block * self.heads + thread // config.lanes, out.shape[0] - 1)
        overlap_launches()
        token, head = row // config.heads, row % config.heads
        splits = sums.shape[1]
        power = Float32(LOWEST)
        for split in cutlass.range(splits, unroll=4):
            power = max_keeping_nan(power, stats[token, split, head, 0])
        weights = Float32(0.0)
        values = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
        values.fill(0.0)
        for split in cutlass.range(splits, unroll=4):
            share = stats[token, split, head, 1]
            factor = power_of_two(stats[token, split, head, 0] - power)
            wanted = Int32(share != 0.0)  # NaN is not 0 either; where it is 0, there may be no sums
            source = sums[(token, split, head, None)].iterator.toint() + Int64(lane * 32)
            words = load_global_vector_if(wanted, source, 4) + load_global_vector_if(wanted, source + 16, 4)
            weights = weights + share * factor
            for element in cutlass.range_constexpr(VECTOR):
                values[element] = values[element] + from_bits(words[element]) * factor
        weights = weights + exp2(fma(sink[head], Float32(LOG2_E), Float32(HEADROOM) - power))
        if weights == 0.0:
            weights = Float32(1.0)
        inverse = reciprocal(weights)
        for element in cutlass.range_constexpr(VECTOR):
            values[element] = values[element] * inverse
        if cutlass.const_expr(config.out == "bf16"):
            round_vector(values)
        first = (config.width - config.rope) // VECTOR
        if lane >= first:
            position = Float32(Int32(positions[token]))
            for pair in cutlass.range_constexpr(VECTOR // 2):
                frequency = inv_freq[(lane - first) * (VECTOR // 2) + pair]
                sine, cosine = sine_and_cosine(multiply(position, frequency))
                even, odd = values[2 * pair], values[2 * pair + 1]
                values[2 * pair] = fma(even, cosine, multiply(odd, sine))
                values[2 * pair + 1] = fma(odd, cosine, -multiply(even, sine))
        rounded = cute.make_rmem_tensor(cute.make_layout(VECTOR), out.element_type)
        rounded.store(values.load().to(out.element_type))
        if block * self.heads + thread // config.lanes < out.shape[0]:
            cute.autovec_copy(rounded, cute.zipped_divide(out[(row, None)], (VECTOR,))[(None,), lane])
