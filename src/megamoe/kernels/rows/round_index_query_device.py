# SPDX-License-Identifier: Apache-2.0
"""Device half of round_index_query."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32

from megamoe.kernels.parts.nvfp4_device import word_of
from megamoe.kernels.parts.ptx_device import (
    bits_of,
    divide,
    e4m3_word,
    fma,
    from_bits,
    magnitude,
    max_keeping_nan,
    multiply,
)
from megamoe.kernels.parts.rope_device import HeadThread, Rotation, head_blocks
from megamoe.kernels.parts.rows import VECTOR, row_tile
from megamoe.kernels.parts.rows_device import (
    DTYPES,
    current_stream,
    overlap_launches,
    store_if,
    store_scalar_if,
    symbolic_heads,
    symbolic_rows,
    symbolic_vector,
)
from megamoe.kernels.rows.round_index_query_config import Config

MXFP4_BLOCK = 32
BLOCK_LANES = MXFP4_BLOCK // VECTOR
E2M1_MAX, E4M3_MAX = 6.0, 448.0
MXFP4_FLOOR = 6.0 * 2.0**-126
FP8_FLOOR = 1e-4
MANTISSA = 0x7FFFFF


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, num_rows, width = cute.sym_int32(), cute.sym_int32(), config.width
    q = symbolic_heads(DTYPES[config.q], num_tokens, config.heads, width)
    head_weights = symbolic_rows(Float32, num_tokens, config.heads, 4)
    positions = symbolic_vector(Int64, num_tokens)
    inv_freq = symbolic_vector(Float32, config.rope_dim // 2)
    weights = symbolic_rows(Float32, num_tokens, config.heads, 4)
    inputs, rest = (q, head_weights, positions, inv_freq), (weights, Float32(0.0), current_stream())
    rounded = RoundIndexQuery(config)
    if config.rounding is None:
        return rounded.plain, (*inputs, symbolic_rows(DTYPES[config.q], num_rows, width), *rest)
    per_word = 8 if config.rounding == "mxfp4" else 4
    num_scales = width // MXFP4_BLOCK if config.rounding == "mxfp4" else 1
    codes = symbolic_rows(Int32, num_rows, width // per_word, 32 // per_word)
    return rounded.quantized, (*inputs, codes, symbolic_rows(Uint8, num_rows, num_scales, 1), *rest)


class RoundIndexQuery:
    """y = round(hadamard(rope(q))), rounded to the dtype of q after each rotation; w = head_weights * head_scale."""

    def __init__(self, config: Config):
        self.config = config
        self.tile = row_tile(config.width)
        self.blocks = head_blocks(self.tile, config.passes, config.heads)

    @cute.jit
    def plain(self, q, head_weights, positions, inv_freq, y, weights, head_scale: Float32, stream):
        self._launch(q, head_weights, positions, inv_freq, y, None, weights, head_scale, stream)

    @cute.jit
    def quantized(self, q, head_weights, positions, inv_freq, codes, scales, weights, head_scale: Float32, stream):
        self._launch(q, head_weights, positions, inv_freq, codes, scales, weights, head_scale, stream)

    def _launch(self, q, head_weights, positions, inv_freq, y, scales, weights, head_scale, stream):
        self.kernel(q, head_weights, positions, inv_freq, y, scales, weights, head_scale).launch(
            grid=(self.blocks * positions.shape[0], 1, 1), block=(self.tile.threads, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self,
        q: cute.Tensor,
        head_weights: cute.Tensor,
        positions: cute.Tensor,
        inv_freq: cute.Tensor,
        y: cute.Tensor,
        scales,
        weights: cute.Tensor,
        head_scale: Float32,
    ):
        config, tile = self.config, self.tile
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        token, part = bidx // self.blocks, bidx % self.blocks
        overlap_launches()
        threads = [HeadThread(tile, part, tidx, index, config.passes, config.heads) for index in range(config.passes)]
        heads = q[(token, None, None)]
        loaded = [thread.load(heads) for thread in threads]
        rotation = Rotation(threads[0], inv_freq, Float32(positions[token]), config.rope_dim)
        for one in cutlass.range_constexpr(config.passes):
            thread, registers = threads[one], loaded[one]
            row = token * config.heads + thread.row
            vectors = []
            for index in cutlass.range_constexpr(tile.vectors):
                values = registers[None, index].load().to(Float32)
                turned = rotation.turned(thread, index, [values[element] for element in range(VECTOR)])
                vectors.append(as_rounded(turned, q.element_type))
            if cutlass.const_expr(config.hadamard):
                vectors = [as_rounded(values, q.element_type) for values in hadamard(thread, vectors)]
            if cutlass.const_expr(config.rounding is None):
                store_values(thread, row, vectors, y)
            elif cutlass.const_expr(config.rounding == "mxfp4"):
                store_mxfp4(thread, row, vectors, y, scales)
            else:
                store_fp8(thread, row, vectors, y, scales)
            weight = multiply(head_weights[token, thread.row], head_scale)
            store_scalar_if(thread.live, thread.lane, weight, weights[(token, None)], thread.row)


def as_rounded(values, dtype):
    """Return eight fp32 values rounded to a dtype, as fp32."""
    exact = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
    for element in range(VECTOR):
        exact[element] = values[element]
    rounded = cute.make_rmem_tensor(cute.make_layout(VECTOR), dtype)
    rounded.store(exact.load().to(dtype))
    again = rounded.load().to(Float32)
    return [again[element] for element in range(VECTOR)]


def hadamard(thread: HeadThread, vectors):
    """Return a head rotated by the orthonormal Hadamard matrix: butterflies of channels K/2 apart first.

    Channel c of a head is value c % 8 of vector c / 8, and vector v lies in thread v % lanes at v / lanes.
    """
    tile = thread.tile
    half = tile.vectors // 2
    while half:
        pairs = [
            butterflies(vectors[index], vectors[index + half]) for index in range(tile.vectors) if not index & half
        ]
        lows, highs = iter([low for low, _ in pairs]), iter([high for _, high in pairs])
        vectors = [next(highs if index & half else lows) for index in range(tile.vectors)]
        half //= 2
    half = tile.lanes // 2
    while half:
        sign = from_bits(Uint32(0x3F800000) | (Uint32(thread.lane & half) << (31 - (half.bit_length() - 1))))
        vectors = [
            [fma(value, sign, cute.arch.shuffle_sync_bfly(value, offset=half)) for value in values]
            for values in vectors
        ]
        half //= 2
    factor = Float32(tile.width**-0.5)
    result = []
    for values in vectors:
        half = VECTOR // 2
        while half:
            values = [
                values[element - half] - values[element] if element & half else values[element] + values[element + half]
                for element in range(VECTOR)
            ]
            half //= 2
        result.append([multiply(value, factor) for value in values])
    return result


def butterflies(first, second):
    """Return the sums and the differences of two vectors."""
    both = list(zip(first, second, strict=True))
    return [a + b for a, b in both], [a - b for a, b in both]


def largest(values):
    """Return the largest magnitude; NaN wins."""
    amax = magnitude(values[0])
    for value in values[1:]:
        amax = max_keeping_nan(amax, magnitude(value))
    return amax


def power_of_two_scale(amax, floor: float, code_max: float):
    """Return the E8M0 byte of 2^ceil(log2(max(amax, floor) / code_max)), and the inverse of that power, exactly."""
    bits = bits_of(divide(max_keeping_nan(amax, Float32(floor)), Float32(code_max)))
    exponent = cutlass.min((bits + MANTISSA) >> 23, Uint32(255))  # 255: infinity and NaN
    return exponent, from_bits((254 - exponent) << 23)


def store_values(thread: HeadThread, row, vectors, y):
    """Store a head as it is."""
    target = cute.zipped_divide(y[(row, None)], (VECTOR,))
    for index in range(thread.tile.vectors):
        exact = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
        for element in range(VECTOR):
            exact[element] = vectors[index][element]
        values = cute.make_rmem_tensor(cute.make_layout(VECTOR), y.element_type)
        values.store(exact.load().to(y.element_type))
        store_if(thread.live, values, target[(None,), thread.vector(index)])


def store_mxfp4(thread: HeadThread, row, vectors, codes, scales):
    """Quantize a head to MXFP4; four threads hold a block of 32."""
    for index in range(thread.tile.vectors):
        values = vectors[index]
        amax = cute.arch.warp_reduction(largest(values), max_keeping_nan, threads_in_group=BLOCK_LANES)
        exponent, inverse = power_of_two_scale(amax, MXFP4_FLOOR, E2M1_MAX)
        word = word_of([multiply(magnitude(value), inverse) for value in values])
        for element in range(VECTOR):
            word = word | ((bits_of(values[element]) >> 28) & Uint32(8)) << (4 * element)
        vector = thread.vector(index)
        store_word(thread.live, row, vector, word, codes)
        store_scale(thread.live, vector % BLOCK_LANES, row, vector // BLOCK_LANES, exponent, scales)


def store_fp8(thread: HeadThread, row, vectors, codes, scales):
    """Quantize a head to E4M3 with one scale."""
    amax = largest([value for values in vectors for value in values])
    amax = cute.arch.warp_reduction(amax, max_keeping_nan, threads_in_group=thread.tile.lanes)
    exponent, inverse = power_of_two_scale(amax, FP8_FLOOR, E4M3_MAX)
    target = cute.zipped_divide(codes[(row, None)], (2,))
    for index in range(thread.tile.vectors):
        words = cute.make_rmem_tensor(cute.make_layout(2), Int32)
        for half in range(2):
            scaled = [multiply(vectors[index][4 * half + element], inverse) for element in range(4)]
            words[half] = Int32(e4m3_word(*scaled))
        store_if(thread.live, words, target[(None,), thread.vector(index)])
    store_scale(thread.live, thread.lane, row, 0, exponent, scales)


@cute.jit
def store_word(wanted, row: Int32, column: Int32, word: Uint32, codes: cute.Tensor):
    """Store eight codes if `wanted`."""
    if wanted:
        codes[row, column] = Int32(word)


@cute.jit
def store_scale(wanted, lane: Int32, row: Int32, column: Int32, exponent: Uint32, scales: cute.Tensor):
    """Let the first thread of a block store its scale if `wanted`."""
    if wanted & (lane == 0):
        scales[row, column] = Uint8(exponent)
