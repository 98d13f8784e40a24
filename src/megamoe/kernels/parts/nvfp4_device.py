# SPDX-License-Identifier: Apache-2.0
"""A row of registers to NVFP4: the rules of formats/nvfp4.py, bit by bit.

A thread holds whole blocks of 16, so that what a block needs once is computed once. NaN and infinity are never turned
into numbers: a block that holds one gets the scale byte 0x7F, which dequantize refuses by name.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Uint8, Uint32

from megamoe.kernels.parts.mma_device import bf16_pair
from megamoe.kernels.parts.ptx_device import (
    bits_of,
    divide,
    e2m1_bits,
    e4m3_of,
    fma,
    gather_bytes,
    magnitude,
    max_keeping_nan,
    max_of_pairs,
    multiply,
    reciprocal,
)
from megamoe.kernels.parts.rows import tiled_place
from megamoe.kernels.parts.rows_device import RowThread, both

BLOCK = 16
AMAX_FLOOR = 1e-12
TENSOR_SCALE_DIVISOR = 2688.0
SMALLEST_SCALE = 2.0**-9
SMALLEST_FAST_STEP = 2.0**-96
PAIR_MAGNITUDE = 0x7FFF7FFF
CODE_BASES = sum(0x4B400000 << 4 * element for element in range(8)) % 2**32  # what e2m1_bits leaves in eight codes


def block_amax(registers, index: int):
    """Return the largest magnitude of the block at `index`; NaN wins."""
    if registers.element_type is BFloat16:
        words = block_words(registers, index)
        pairs = [words[word] & Uint32(PAIR_MAGNITUDE) for word in range(BLOCK // 2)]
        while len(pairs) > 1:
            pairs = [max_of_pairs(a, b) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
        return max_keeping_nan(*bf16_pair(pairs[0]))
    values = registers[None, index].load()
    amax = magnitude(values[0])
    for element in range(1, BLOCK):
        amax = max_keeping_nan(amax, magnitude(values[element]))
    return amax


def block_words(registers, index: int):
    """Return a block of bf16 values as eight words."""
    return cute.recast_tensor(registers[None, index], Uint32)


def row_tensor_scale(thread: RowThread, amaxes, scratch):
    """Return max(amax of the row, 1e-12) / 2688."""
    amax = amaxes[0]
    for one in amaxes[1:]:
        amax = max_keeping_nan(amax, one)
    amax = thread.max(amax, scratch)
    return divide(max_keeping_nan(amax, Float32(AMAX_FLOOR)), Float32(TENSOR_SCALE_DIVISOR))


def store_nvfp4(
    thread: RowThread, registers, amaxes, tensor_scale, codes: cute.Tensor, scales: cute.Tensor, tiled=False
):
    """Quantize a thread's blocks and store their codes and scales.

    Args:
        thread, registers: a row in registers, as RowThread.load gives it, in vectors of 16.
        amaxes: block_amax of every block.
        tensor_scale: g.
        codes: [rows, K/8] uint32, eight codes a word.
        scales: [rows, K/16] uint8, or all tiles of 128x4 as one run.
        tiled: the scales are in 128x4 tiles (formats/scale_layout.py).
    """
    six_scales = multiply(Float32(6.0), tensor_scale)
    for index in range(thread.tile.vectors):
        # wanted = block_amax / (6 g); an infinite amax must not become the largest finite scale
        quotient = divide(amaxes[index], six_scales)
        quotient = fma(amaxes[index], Float32(0.0), quotient)
        byte, scale = e4m3_of(max_keeping_nan(quotient, Float32(SMALLEST_SCALE)))
        step = multiply(tensor_scale, scale)
        words = cute.make_rmem_tensor(cute.make_layout(2), Uint32)
        if registers.element_type is BFloat16:
            quantize_bf16(block_words(registers, index), step, words)
        else:
            quantize_f32(registers[None, index], step, words)
        block = thread.vector(index)
        place = tiled_place(thread.row, block, thread.tile.width // BLOCK) if tiled else None
        store_block(both(thread.live, thread.has(index)), thread.row, block, place, words, byte, codes, scales)


@cute.jit
def store_block(
    wanted, row: Int32, block: Int32, place, words: cute.Tensor, byte: Uint32, codes: cute.Tensor, scales: cute.Tensor
):
    """Store 16 codes and their scale, at a place in a run of tiles or in its row."""
    if wanted:
        cute.autovec_copy(words, cute.zipped_divide(codes[(row, None)], (2,))[(None,), block])
        if cutlass.const_expr(place is not None):
            scales[place] = Uint8(byte)
        else:
            scales[row, block] = Uint8(byte)


@cute.jit
def quantize_bf16(block: cute.Tensor, step: Float32, words: cute.Tensor):
    """Write the E2M1 codes of 16 bf16 values divided by `step` to two words.

    codes = e2m1(x / step). A division costs more than the memory traffic of the value. With r = 1 / step rounded,
    q = x * r and q' = q + (x - q * step) * r is the rounded quotient wherever it decides a code, since x has 8
    significant bits: tests/kernels/test_nvfp4_rounding.py enumerates every case near a threshold. Where the rest could
    leave the range of fp32, which takes a step that no finite block of ordinary size has, the hardware divides. A
    quotient that overflows makes the rest NaN, and NaN is code 7, as every quotient above 5 is.
    """
    inverse = reciprocal(step)
    if step > SMALLEST_FAST_STEP:
        for half in cutlass.range_constexpr(2):
            quotients = []
            for word in cutlass.range_constexpr(4):
                for value in bf16_pair(block[4 * half + word] & Uint32(PAIR_MAGNITUDE)):
                    quotient = multiply(value, inverse)
                    quotients.append(fma(fma(-quotient, step, value), inverse, quotient))
            words[half] = word_of(quotients) | pair_signs([block[4 * half + word] for word in range(4)])
    else:
        for half in cutlass.range_constexpr(2):
            quotients = []
            for word in cutlass.range_constexpr(4):
                quotients += [
                    divide(value, step) for value in bf16_pair(block[4 * half + word] & Uint32(PAIR_MAGNITUDE))
                ]
            words[half] = word_of(quotients) | pair_signs([block[4 * half + word] for word in range(4)])


def quantize_f32(block, step, words):
    """Write the E2M1 codes of 16 fp32 values divided by `step` to two words."""
    for half in range(2):
        values = [block[8 * half + element] for element in range(8)]
        word = word_of([divide(magnitude(value), step) for value in values])
        for element in range(8):
            word = word | ((bits_of(values[element]) >> 28) & Uint32(8)) << (4 * element)
        words[half] = word


def word_of(quotients):
    """Return eight E2M1 codes of magnitudes in one word: their bits added up, less what is above the codes."""
    word = Uint32(2**32 - CODE_BASES)
    for element in range(8):
        word = word + (e2m1_bits(quotients[element]) << (4 * element))
    return word


def pair_signs(pairs):
    """Return the signs of four pairs of bf16 at bit 3 of each code; -0, and what rounds to it, keep theirs.

    The upper byte of a value has its sign at the top: those of second values are where the word of codes wants them.
    """
    first, second = gather_bytes(pairs[0], pairs[1], 0x7351), gather_bytes(pairs[2], pairs[3], 0x7351)
    low, high = gather_bytes(first, second, 0x5410), gather_bytes(first, second, 0x7632)
    return ((low >> 4) & Uint32(0x08080808)) | (high & Uint32(0x80808080))
