# SPDX-License-Identifier: Apache-2.0
"""Device half of round_index_query.

The bits of a channel c before the Hadamard rotation and of a channel n behind it:

    c    1 of a pair   2 pair p of a vector   2 lane of four   2 load s        (a lane holds vectors 4 s + lane)
    n    1 of a pair   2 j, lower half        2 j, upper half  2 lane of four  (a lane holds the 32 values of a block)

The sign of (c, n) is the parity of c & n, the product of one sign for each of these four places. The bits of p and of
the lower half of j meet in the registers of a lane: their factor is two steps of butterflies. The matrix unit sums over
the rest, for every p apart, and its matrix is one of 16 words of signs for each s and upper half of j.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.arch import inline_ptx

from megamoe.kernels.parts.mma_device import bf16_pair, mma
from megamoe.kernels.parts.nvfp4_device import pair_signs
from megamoe.kernels.parts.ptx_device import (
    add,
    bf16_word,
    bits_of,
    gather_bytes,
    max_keeping_nan,
    max_of_pairs,
    multiply,
    subtract,
)
from megamoe.kernels.parts.rope_device import sine_and_cosine
from megamoe.kernels.parts.rows import VECTOR, WARP
from megamoe.kernels.parts.rows_device import (
    current_stream,
    overlap_launches,
    symbolic_heads,
    symbolic_rows,
    symbolic_vector,
)
from megamoe.kernels.rows.round_index_query_config import TILE, WIDTH, Config

LANES = 4  # that share a head
GROUPS = 4  # of 32 channels: loads of a lane, blocks of a head
PAIRS = 4  # of a vector of 8 channels
ONES = 0x3F803F80  # a pair of bf16
SIGNS = 0x80008000
HIGH_SIGN = 0x80000000
MAGNITUDES = 0x7FFF7FFF
FLOOR_BITS = 0x01C00000  # of 6 * 2^-126


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, num_rows = cute.sym_int32(), cute.sym_int32()
    q = symbolic_heads(cutlass.BFloat16, num_tokens, config.heads, WIDTH)
    head_weights = symbolic_rows(Float32, num_tokens, config.heads, 4)
    positions = symbolic_vector(Int64, num_tokens)
    inv_freq = symbolic_vector(Float32, config.rope_dim // 2)
    codes = symbolic_rows(Uint32, num_rows, WIDTH // 8)
    scales = symbolic_rows(Uint8, num_rows, GROUPS, 1)
    weights = symbolic_rows(Float32, num_tokens, config.heads, 4)
    tensors = (q, head_weights, positions, inv_freq, codes, scales, weights)
    return RoundIndexQuery(config), (*tensors, Int32(0), Float32(0.0), current_stream())


class RoundIndexQuery:
    """y = mxfp4(hadamard(rope(q))), rounded to bf16 after each rotation; w = head_weights * head_scale."""

    def __init__(self, config: Config):
        self.config = config

    @cute.jit
    def __call__(
        self,
        q,
        head_weights,
        positions,
        inv_freq,
        codes,
        scales,
        weights,
        num_blocks: Int32,
        head_scale: Float32,
        stream,
    ):
        self.kernel(q, head_weights, positions, inv_freq, codes, scales, weights, num_blocks, head_scale).launch(
            grid=(num_blocks, 1, 1), block=(WARP * self.config.warps, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self,
        q: cute.Tensor,
        head_weights: cute.Tensor,
        positions: cute.Tensor,
        inv_freq: cute.Tensor,
        codes: cute.Tensor,
        scales: cute.Tensor,
        weights: cute.Tensor,
        num_blocks: Int32,
        head_scale: Float32,
    ):
        config = self.config
        block, _, _ = cute.arch.block_idx()
        first, stride = block * config.warps + cute.arch.warp_idx(), num_blocks * config.warps
        num_units = positions.shape[0] * config.tiles
        lane = cute.arch.lane_idx()
        quarter, group = lane % LANES, lane // LANES
        overlap_launches()
        frequency = inv_freq[cutlass.min(lane, config.rope_dim // 2 - 1)]
        held = cute.make_rmem_tensor(cute.make_layout((VECTOR, GROUPS, 2)), q.element_type)
        begin = cutlass.min(first, num_units - 1)
        load_heads(q, held, begin, config.tiles, config.heads, quarter, group)
        position = Float32(positions[begin // config.tiles])
        for unit in cutlass.range(first, num_units, stride, unroll=1):
            token, tile = unit // config.tiles, unit % config.tiles
            words = [
                [
                    [cute.recast_tensor(held[None, load, half], Uint32)[pair] for pair in range(PAIRS)]
                    for load in range(4)
                ]
                for half in range(2)
            ]
            here = position
            following = cutlass.min(unit + stride, num_units - 1)
            load_heads(q, held, following, config.tiles, config.heads, quarter, group)
            position = Float32(positions[following // config.tiles])
            rotate(words, quarter, multiply(here, frequency), config.rope_dim)
            pairs = hadamard(words, quarter, group)
            for half in cutlass.range_constexpr(2):
                head = tile * TILE + half * VECTOR + group
                block_words, exponent = quantize(pairs[half])
                store_block(
                    head < config.heads, token * config.heads + head, quarter, block_words, exponent, codes, scales
                )
            head = tile * TILE + lane
            store_weight((lane < TILE) & (head < config.heads), token, head, head_weights, head_scale, weights)


@cute.jit
def load_heads(
    q: cute.Tensor,
    held: cute.Tensor,
    unit: Int32,
    tiles: cutlass.Constexpr,
    num_heads: cutlass.Constexpr,
    quarter: Int32,
    group: Int32,
):
    """Start loading a lane's share of 16 heads; heads past the last one repeat it."""
    token, tile = unit // tiles, unit % tiles
    for half in cutlass.range_constexpr(2):
        head = cutlass.min(tile * TILE + half * VECTOR + group, num_heads - 1)
        source = cute.zipped_divide(q[(token, head, None)], (VECTOR,))
        for load in cutlass.range_constexpr(GROUPS):
            cute.autovec_copy(source[(None,), load * LANES + quarter], held[None, load, half])


def rotate(words, quarter, angle, rope_dim: int):
    """Rotate the last channels of two heads, given as words[head][load][pair] of bf16 pairs, in place.

    Lane l has the angle of pair l, makes its sine and cosine, and the others fetch them.
    """
    mine = sine_and_cosine(angle)
    first = GROUPS - rope_dim // (WIDTH // GROUPS)
    for load in range(first, GROUPS):
        for pair in range(PAIRS):
            source = ((load - first) * LANES + quarter) * PAIRS + pair
            sine, cosine = (cute.arch.shuffle_sync(one, offset=source) for one in mine)
            for head in words:
                even, odd = bf16_pair(head[load][pair])
                head[load][pair] = bf16_word(
                    subtract(multiply(even, cosine), multiply(odd, sine)),
                    add(multiply(odd, cosine), multiply(even, sine)),
                )


def parity_sign(value):
    """Return the signs of a pair of bf16, both negative where an odd number of the two bits of a value is set."""
    return ((value ^ (value >> 1)) & 1) * Uint32(SIGNS)


def hadamard(words, quarter, group):
    """Return two heads' channels of this lane's block: [head][j], channels 2 j and 2 j + 1 as a pair of bf16.

    Args:
        words: [head][load][pair] of bf16 pairs.
        quarter: lane of the four that share a head.
        group: which head; as a column of the matrix, one of a pair and, in its upper bits, a block.
    """
    quarter, group, factor = Uint32(quarter), Uint32(group), Float32(WIDTH**-0.5)
    base = Uint32(ONES) ^ ((group & 1) * Uint32(HIGH_SIGN))
    of_load = [base ^ parity_sign((group >> 1) & load) for load in range(GROUPS)]
    result = [[], []]
    for upper in range(4):
        matrix = [one ^ parity_sign(quarter & upper) for one in of_load]
        partial = []
        for pair in range(PAIRS):
            totals = [Float32(0.0)] * 4
            for step in range(2):
                a = [words[head][load][pair] for load in (2 * step, 2 * step + 1) for head in range(2)]
                totals = mma(totals, a, matrix[2 * step : 2 * step + 2])
            partial.append(totals)
        columns = []
        for value in range(4):
            a, b, c, d = (partial[pair][value] for pair in range(PAIRS))
            ab, a_b, cd, c_d = add(a, b), subtract(a, b), add(c, d), subtract(c, d)
            columns.append((add(ab, cd), add(a_b, c_d), subtract(ab, cd), subtract(a_b, c_d)))
        for head in range(2):
            for lower in range(4):
                low, high = (columns[2 * head + value][lower] for value in range(2))
                result[head].append(bf16_word(multiply(low, factor), multiply(high, factor)))
    return result


def quantize(pairs):
    """Return four words of codes of a block of 32 bf16 values, 16 pairs, and the byte of their scale.

    The codes are those of e2m1_bits (parts/ptx_device.py), two at a time: with a = |x| / scale, the least of 2 a, a + 2
    and a / 2 + 4, rounded to integers. To round, 192 is added, where bf16 counts in ones, in the same operation that
    makes the line; the scale is a power of two, so that its products are exact.
    """
    magnitudes = [pair & Uint32(MAGNITUDES) for pair in pairs]
    largest = magnitudes
    while len(largest) > 1:
        largest = [max_of_pairs(a, b) for a, b in zip(largest[::2], largest[1::2], strict=True)]
    exponent = block_exponent(bits_of(max_keeping_nan(*bf16_pair(largest[0]))))
    inverse = ((Uint32(254) - exponent) << 7) * Uint32(0x00010001)
    factors = inverse, times_power_of_two(inverse, 1), times_power_of_two(inverse, -1)
    codes = [e2m1_pair(one, factors) for one in magnitudes]
    words = []
    for first in range(0, len(pairs), 4):
        halves = []
        for low in (first, first + 2):
            spread = (codes[low] & Uint32(0x00070007)) | ((codes[low + 1] & Uint32(0x00070007)) << 8)
            halves.append(spread | (spread >> 12))
        words.append(gather_bytes(halves[0], halves[1], 0x5410) | pair_signs(pairs[first : first + 4]))
    return words, exponent


def block_exponent(bits):
    """Return the E8M0 byte of a block whose largest magnitude has these bits; 255 for infinity and NaN.

    The scale is the least power of two with amax <= 6 scale, or 1.5 * 2^2 scale: the exponent of amax less 2, and one
    more where its fraction is above a half. The floor of amax is 6 * 2^-126. A division by 6 gives the same for every
    bf16 number: rounded or not, its quotient lies on the same side of the power.
    """
    raised = (cutlass.max(bits, Uint32(FLOOR_BITS)) + Uint32(0x3FFFFF)) >> 23
    is_finite = cutlass.min(Uint32(255) - (bits >> 23), Uint32(1))
    return cutlass.min(raised, Uint32(255)) - 2 * is_finite


def e2m1_pair(magnitudes, factors):
    """Return two E2M1 codes in the low bits of the halves of a word, of magnitudes times a power of two.

    Args:
        magnitudes: a pair of bf16.
        factors: the power of two, twice it, and half of it, as pairs.
    """
    return inline_ptx(
        """{
        .reg .b32 low, middle, high;
        mov.b32 low, 0x43404340;
        mov.b32 middle, 0x43424342;
        mov.b32 high, 0x43444344;
        fma.rn.bf16x2 middle, {$r0}, {$r1}, middle;
        fma.rn.bf16x2 low, {$r0}, {$r2}, low;
        fma.rn.bf16x2 high, {$r0}, {$r3}, high;
        min.bf16x2 low, low, middle;
        mov.b32 middle, 0x43474347;
        min.bf16x2 high, high, middle;
        min.bf16x2 {$w0}, low, high;
        }""",
        write_only_types=[Uint32],
        read_only_args=[magnitudes, *factors],
    )


def times_power_of_two(pair, exponent: int):
    """Return a pair of bf16 times 2^exponent, exponent 1 or -1."""
    return inline_ptx(
        f"{{ .reg .b32 factor; mov.b32 factor, {0x40004000 if exponent > 0 else 0x3F003F00}; "
        "mul.rn.bf16x2 {$w0}, {$r0}, factor; }",
        write_only_types=[Uint32],
        read_only_args=[pair],
    )


@cute.jit
def store_block(wanted, row: Int32, block: Int32, words, exponent: Uint32, codes: cute.Tensor, scales: cute.Tensor):
    """Store 32 codes and their scale if `wanted`."""
    if wanted:
        registers = cute.make_rmem_tensor(cute.make_layout(4), Uint32)
        for index in cutlass.range_constexpr(4):
            registers[index] = words[index]
        cute.autovec_copy(registers, cute.zipped_divide(codes[(row, None)], (4,))[(None,), block])
        scales[row, block] = Uint8(exponent)


@cute.jit
def store_weight(
    wanted, token: Int32, head: Int32, head_weights: cute.Tensor, head_scale: Float32, weights: cute.Tensor
):
    """Scale and store the weight of a head if `wanted`."""
    if wanted:
        weights[token, head] = multiply(head_weights[token, head], head_scale)
