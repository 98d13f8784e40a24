# SPDX-License-Identifier: Apache-2.0
"""Device half of quantize_fp8_rows."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8, Uint32

from megamoe.kernels.parts.ptx_device import bits_of, divide, e4m3_word, from_bits, magnitude, max_keeping_nan, multiply
from megamoe.kernels.parts.rows import VECTOR, row_tile
from megamoe.kernels.parts.rows_device import (
    DTYPES,
    RowThread,
    both,
    current_stream,
    num_blocks,
    overlap_launches,
    store_if,
    symbolic_rows,
)
from megamoe.kernels.rows.quantize_fp8_rows_config import GROUP, Config

GROUP_LANES = GROUP // VECTOR
AMAX_FLOOR = 1e-4
E4M3_MAX = 448.0
MANTISSA = 0x7FFFFF


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_rows = cute.sym_int32()
    x = symbolic_rows(DTYPES[config.x], num_rows, config.width)
    codes = symbolic_rows(Int32, num_rows, config.width // 4, 8)
    scales = symbolic_rows(Uint8, num_rows, -(-config.width // GROUP), 1)
    return QuantizeFp8Rows(config), (x, codes, scales, current_stream())


class QuantizeFp8Rows:
    """codes = e4m3(x / s), s = 2^ceil(log2(max(amax_128, 1e-4) / 448))."""

    def __init__(self, config: Config):
        self.tile = row_tile(config.width, min_lanes=GROUP_LANES)

    @cute.jit
    def __call__(self, x: cute.Tensor, codes: cute.Tensor, scales: cute.Tensor, stream):
        self.kernel(x, codes, scales).launch(
            grid=(num_blocks(self.tile, x.shape[0]), 1, 1), block=(self.tile.threads, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, codes: cute.Tensor, scales: cute.Tensor):
        overlap_launches()
        thread = RowThread(self.tile, x.shape[0])
        registers = thread.load(x)
        target = cute.zipped_divide(codes[(thread.row, None)], (2,))
        for index in cutlass.range_constexpr(self.tile.vectors):
            values = registers[None, index].load().to(Float32)
            amax = magnitude(values[0])
            for element in cutlass.range_constexpr(1, VECTOR):
                amax = max_keeping_nan(amax, magnitude(values[element]))
            amax = cute.arch.warp_reduction(amax, max_keeping_nan, threads_in_group=GROUP_LANES)

            # scale = 2^ceil(log2(max(amax, 1e-4) / 448)): up to the next power of two unless it is one
            bits = bits_of(divide(max_keeping_nan(amax, Float32(AMAX_FLOOR)), Float32(E4M3_MAX)))
            exponent = cutlass.min((bits + MANTISSA) >> 23, Uint32(255))  # 255: infinity and NaN
            inverse = from_bits((254 - exponent) << 23)  # exact, so x * inverse is x / scale

            words = cute.make_rmem_tensor(cute.make_layout(2), Int32)
            for half in cutlass.range_constexpr(2):
                scaled = [multiply(values[4 * half + element], inverse) for element in range(4)]
                words[half] = Int32(e4m3_word(*scaled))
            wanted = both(thread.live, thread.has(index))
            store_if(wanted, words, target[(None,), thread.vector(index)])
            store_scale(wanted, thread.row, thread.vector(index), exponent, scales)


@cute.jit
def store_scale(wanted, row: Int32, vector: Int32, exponent: Uint32, scales: cute.Tensor):
    """Let the first thread of a group store its scale."""
    if both(wanted, vector % GROUP_LANES == 0):
        scales[row, vector // GROUP_LANES] = Uint8(exponent)
