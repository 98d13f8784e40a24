# SPDX-License-Identifier: Apache-2.0
"""A row of registers to NVFP4: the rules of formats/nvfp4.py, bit by bit.

Two neighbouring threads hold a block of 16. NaN and infinity are never turned into numbers: a block that holds one
gets the scale byte 0x7F, which dequantize refuses by name.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8, Uint32

from megamoe.kernels.parts.ptx_device import (
    bits_of,
    divide,
    e2m1_magnitude,
    e4m3_of,
    fma,
    magnitude,
    max_keeping_nan,
    multiply,
    reciprocal,
)
from megamoe.kernels.parts.rows import VECTOR, tiled_place
from megamoe.kernels.parts.rows_device import RowThread, both

AMAX_FLOOR = 1e-12
TENSOR_SCALE_DIVISOR = 2688.0
SMALLEST_SCALE = 2.0**-9
E2M1_MAX = 6.0
FAST_STEP_MIN = 2.0**-96
FAST_STEP_MAX = 2.0**96
FAST_QUOTIENT_MAX = 2.0**20


def block_amax(registers, index: int):
    """Return the largest magnitude of the block that vector `index` is half of; NaN wins."""
    values = registers[None, index].load().to(Float32)
    amax = magnitude(values[0])
    for element in range(1, VECTOR):
        amax = max_keeping_nan(amax, magnitude(values[element]))
    return max_keeping_nan(amax, cute.arch.shuffle_sync_bfly(amax, offset=1))


def row_tensor_scale(thread: RowThread, amaxes, scratch):
    """Return max(amax of the row, 1e-12) / 2688."""
    amax = amaxes[0]
    for one in amaxes[1:]:
        amax = max_keeping_nan(amax, one)
    amax = thread.max(amax, scratch)
    return divide(max_keeping_nan(amax, Float32(AMAX_FLOOR)), Float32(TENSOR_SCALE_DIVISOR))


def store_nvfp4(
    thread: RowThread, registers, amaxes, tensor_scale, codes: cute.Tensor, scales: cute.Tensor, exact, tiled=False
):
    """Quantize a thread's vectors and store their codes and scales.

    Args:
        thread, registers: a row in registers, as RowThread.load gives it.
        amaxes: block_amax of every vector.
        tensor_scale: g.
        codes: [rows, K/8] uint32, eight codes a word.
        scales: [rows, K/16] uint8, or all tiles of 128x4 as one run.
        exact: the values have 8 significant bits (bf16), so that one refinement step divides exactly; see below.
        tiled: the scales are in 128x4 tiles (formats/scale_layout.py).
    """
    six_scales = multiply(Float32(6.0), tensor_scale)
    for index in range(thread.tile.vectors):
        # wanted = block_amax / (6 g); an infinite amax must not become the largest finite scale
        quotient = divide(amaxes[index], six_scales)
        quotient = fma(amaxes[index], Float32(0.0), quotient)
        byte, scale = e4m3_of(max_keeping_nan(quotient, Float32(SMALLEST_SCALE)))
        step = multiply(tensor_scale, scale)
        word = quantize_vector(registers[None, index], step, amaxes[index], exact)
        wanted = both(thread.live, thread.has(index))
        if tiled:
            place = tiled_place(thread.row, thread.vector(index) // 2, thread.tile.width // 16)
            store_words_tiled(wanted, thread.row, thread.vector(index), place, word, byte, codes, scales)
        else:
            store_words(wanted, thread.row, thread.vector(index), word, byte, codes, scales)


@cute.jit
def store_words(wanted, row: Int32, vector: Int32, word: Uint32, byte: Uint32, codes: cute.Tensor, scales: cute.Tensor):
    """Store eight codes, and the scale of their block if the vector is its first half."""
    if wanted:
        codes[row, vector] = word
        if vector % 2 == 0:
            scales[row, vector // 2] = Uint8(byte)


@cute.jit
def store_words_tiled(
    wanted,
    row: Int32,
    vector: Int32,
    place: Int32,
    word: Uint32,
    byte: Uint32,
    codes: cute.Tensor,
    scales: cute.Tensor,
):
    """The same with the block's scale at a place in a run of tiles."""
    if wanted:
        codes[row, vector] = word
        if vector % 2 == 0:
            scales[place] = Uint8(byte)


@cute.jit
def quantize_vector(vector: cute.Tensor, step: Float32, amax: Float32, exact: cutlass.Constexpr) -> Uint32:
    """Return the E2M1 codes of eight values divided by `step`, in one word.

    codes = e2m1(x / step). A division costs more than the memory traffic of the value. With r = 1 / step rounded,
    q = x * r and q' = q + (x - q * step) * r is the rounded quotient wherever it decides a code, if x has at most 8
    significant bits: tests/kernels/test_nvfp4_rounding.py enumerates every case near a threshold. Where an
    intermediate could leave the range of fp32, and for fp32 values, the hardware divides.
    """
    loaded = vector.load().to(Float32)
    values = [loaded[element] for element in range(VECTOR)]  # taken apart here: branches below share them
    quotients = cute.make_rmem_tensor(cute.make_layout(VECTOR), Float32)
    if cutlass.const_expr(exact):
        inverse = reciprocal(step)
        in_range = (step > FAST_STEP_MIN) & (step < FAST_STEP_MAX) & (amax * inverse < FAST_QUOTIENT_MAX)
        if in_range:
            for element in cutlass.range_constexpr(VECTOR):
                value = magnitude(values[element])
                quotient = multiply(value, inverse)
                quotients[element] = fma(fma(-quotient, step, value), inverse, quotient)
        else:
            for element in cutlass.range_constexpr(VECTOR):
                quotients[element] = divide(magnitude(values[element]), step)
    else:
        for element in cutlass.range_constexpr(VECTOR):
            quotients[element] = divide(magnitude(values[element]), step)
    word = Uint32(0)
    for element in cutlass.range_constexpr(VECTOR):
        code = Uint32(e2m1_magnitude(cute.arch.fmin(quotients[element], Float32(E2M1_MAX))))
        sign = (bits_of(values[element]) >> 28) & 8  # of x, so that -0 and what rounds to it keep theirs
        word = word | ((code | sign) << (4 * element))
    return word
