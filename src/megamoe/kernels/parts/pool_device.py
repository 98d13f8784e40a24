# SPDX-License-Identifier: Apache-2.0
"""Rows of cache pools in device halves: where they lie, and how values become their bytes (formats/cache_rows.py)."""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32
from cutlass.cute.arch import inline_ptx
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.parts.memory_device import pack_bf16, store_global_vector
from megamoe.kernels.parts.mma_device import bf16_pair
from megamoe.kernels.parts.ptx_device import (
    add,
    bits_of,
    e2m1_bits,
    e4m3_word,
    from_bits,
    magnitude,
    max_keeping_nan,
    min_keeping_nan,
    multiply,
    subtract,
)
from megamoe.kernels.parts.rows import VECTOR

AMAX_FLOOR = 1e-4
E4M3_MAX = 448.0
MAX_LATENT = 57344.0
FP4_FLOOR = 6.0 * 2.0**-126
MAX_EXPONENT = 127 + 7  # of the scale of MAX_LATENT
MANTISSA = 0x7FFFFF
INFINITY = 0x7F800000
ROPE_WIDTH = 64


def row_bytes(row_format: str, width: int) -> tuple[int, int]:
    """Return the bytes of a row's data and of its scales, by the format's name."""
    return {
        "fp8_rope_bf16": (width + ROPE_WIDTH, width // 64),
        "bf16": (2 * width, 0),
        "fp32": (4 * width, 0),
        "index_fp8": (width, 4),
        "index_fp4": (width // 2, width // 32),
    }[row_format]


def symbolic_pool():
    """Return the argument of a pool's storage: [blocks, page bytes] of any block stride that is a multiple of 16."""
    shape = (cute.sym_int32(), cute.sym_int32())
    return make_fake_tensor(Uint8, shape, (cute.sym_int64(divisibility=16), 1), assumed_align=16)


def symbolic_integers(dtype, *shape):
    """Return an argument of integers, contiguous but for the stride of its rows."""
    if len(shape) == 1:
        return make_fake_tensor(dtype, shape, (1,))
    return make_fake_tensor(dtype, shape, (cute.sym_int64(), 1))


def row_addresses(pool, slot, rows_per_block, data_bytes: int, scale_bytes: int):
    """Return the addresses of a row's data and scales, 64 bits each.

    Args:
        pool: the storage.
        slot: int32, not negative.
        rows_per_block: int32.
        data_bytes, scale_bytes: of a row.
    """
    block = slot // rows_per_block
    row = slot - block * rows_per_block
    page = pool[(block, None)].iterator.toint()
    data = page + Int64(row) * data_bytes
    return data, page + Int64(rows_per_block) * data_bytes + Int64(row) * scale_bytes


@cute.jit
def ring_slot(tables: cute.Tensor, rows_per_block: Int32, request: Int32, row: Int32) -> Int32:
    """Return the slot of a row of a request (ops/row_slots.py), -1 where either is nobody's or there is no block."""
    slot = Int32(-1)
    num_blocks = tables.shape[1]
    if (row >= 0) & (request >= 0) & (num_blocks > 0):
        place = row // rows_per_block
        block = tables[request, place % num_blocks]
        if block >= 0:
            slot = block * rows_per_block + (row - place * rows_per_block)
    return slot


def store_bytes(address, word, num_bytes: int):
    """Store the low 1, 2 or 4 bytes of a word."""
    kind = {1: "u8", 2: "u16", 4: "u32"}[num_bytes]
    inline_ptx(f"st.global.{kind} [{{$r0}}], {{$r1}};", read_only_args=[address, word])


def store_pair(address, a, b):
    """Store two words."""
    inline_ptx("st.global.v2.b32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[address, a, b])


def power_of_two_scale(amax, floor: float, largest: float):
    """Return the exponent byte of 2^ceil(log2(max(amax, floor) / largest)); 255 for infinity and NaN.

    For `largest` of 448 and 6 the quotient rounds to a power of two only if it is one, so nothing is divided: the
    exponents are subtracted, and one is added where the mantissa is above that of `largest`
    (tests/kernels/test_cache_rows.py has all mantissas).
    """
    fraction, exponent = math.frexp(largest)
    mantissa = int((2.0 * fraction - 1.0) * 2.0**23)
    bits = bits_of(max_keeping_nan(amax, Float32(floor)))
    byte = ((bits + (MANTISSA - mantissa)) >> 23) - (exponent - 1)
    return choose_word(bits >= Uint32(INFINITY), Uint32(255), byte)


def choose_word(wanted, a, b):
    """Return a if `wanted`, else b."""
    return inline_ptx(
        "{ .reg .pred p; .reg .b32 flag; mov.b32 flag, {$r0}; setp.ne.b32 p, flag, 0; "
        "selp.b32 {$w0}, {$r1}, {$r2}, p; }",
        write_only_types=[Uint32],
        read_only_args=[Int32(wanted), a, b],
    )


def largest_magnitude(values, lanes: int):
    """Return the largest magnitude of vectors of 8 values over groups of neighbouring lanes; NaN wins.

    Args:
        values: vectors, each indexable by 0 to 7.
        lanes: threads of a group.
    """
    amax = magnitude(values[0][0])
    for vector in values:
        for element in range(VECTOR):
            amax = max_keeping_nan(amax, magnitude(vector[element]))
    return amax if lanes == 1 else cute.arch.warp_reduction(amax, max_keeping_nan, threads_in_group=lanes)


def round_to_bf16(value):
    """Return an fp32 value rounded to bf16."""
    return from_bits(pack_bf16(Float32(0.0), value) & Uint32(0xFFFF0000))


def round_vector(values):
    """Round 8 fp32 values in registers to bf16, in place."""
    for pair in range(VECTOR // 2):
        values[2 * pair], values[2 * pair + 1] = bf16_pair(pack_bf16(values[2 * pair], values[2 * pair + 1]))


def hadamard(values, lanes: int):
    """Rotate a row by the Sylvester matrix times n^-0.5, in place: largest stride first, fp32 sums.

    Args:
        values: [vectors][8] fp32 register tensors; vector i of lane l is vector i * lanes + l of the row.
        lanes: neighbouring threads that share the row, a power of two.
    """
    num_vectors = len(values)
    width = num_vectors * lanes * VECTOR
    half = num_vectors // 2
    while half:  # between vectors of a thread
        for first in range(0, num_vectors, 2 * half):
            for index in range(first, first + half):
                for element in range(VECTOR):
                    a, b = values[index][element], values[index + half][element]
                    values[index][element] = add(a, b)
                    values[index + half][element] = subtract(a, b)
        half //= 2
    lane = cute.arch.lane_idx()
    distance = lanes // 2
    while distance:  # between lanes
        sign = Uint32((lane & distance) != 0) << 31  # the upper of two lanes subtracts its own
        for vector in values:
            for element in range(VECTOR):
                other = cute.arch.shuffle_sync_bfly(vector[element], offset=distance)
                vector[element] = add(other, from_bits(bits_of(vector[element]) ^ sign))
        distance //= 2
    half = VECTOR // 2
    while half:  # inside a vector
        for vector in values:
            for first in range(0, VECTOR, 2 * half):
                for element in range(first, first + half):
                    a, b = vector[element], vector[element + half]
                    vector[element] = add(a, b)
                    vector[element + half] = subtract(a, b)
        half //= 2
    for vector in values:
        for element in range(VECTOR):
            vector[element] = multiply(vector[element], Float32(width**-0.5))


def store_row(values, vectors, lanes: int, wanted, row_format: str, width: int, data, scales):
    """Store a row of fp32 values as a row of a pool.

    Args:
        values: [vectors][8] fp32 in registers; all lanes of a warp come here together.
        vectors: the numbers of these vectors in the row: i * lanes + lane.
        lanes: neighbouring threads that share the row.
        wanted: whether this thread stores.
        row_format, width: of the pool.
        data, scales: addresses of the row.
    """
    if row_format == "fp32":
        for one, vector in zip(values, vectors, strict=True):
            store_fp32(wanted, one, data + Int64(vector) * 32)
    elif row_format == "bf16":
        for one, vector in zip(values, vectors, strict=True):
            store_bf16(wanted, one, data + Int64(vector) * 16)
    elif row_format == "index_fp4":
        for one, vector in zip(values, vectors, strict=True):
            exponent = power_of_two_scale(largest_magnitude([one], 4), FP4_FLOOR, 6.0)
            store_fp4(wanted, one, vector, exponent, data, scales)
    elif row_format == "index_fp8":
        exponent = store_fp8_row(values, vectors, lanes, wanted, data)
        store_word_if(both_true(wanted, vectors[0] == 0), scales, exponent << 23)
    else:
        latent_vectors = (width - ROPE_WIDTH) // VECTOR
        for one, vector in zip(values, vectors, strict=True):
            # Codes saturate: with its scale at the largest, a group is that of values cut off at MAX_LATENT.
            exponent = power_of_two_scale(largest_magnitude([one], 8), AMAX_FLOOR, E4M3_MAX)
            exponent = choose_word(exponent == Uint32(255), exponent, cutlass.min(exponent, Uint32(MAX_EXPONENT)))
            store_latent(wanted, one, vector, latent_vectors, exponent, data, scales)


def store_fp8_row(values, vectors, lanes: int, wanted, data):
    """Store the E4M3 codes of a row under one scale; returns the scale's exponent byte."""
    exponent = power_of_two_scale(largest_magnitude(values, lanes), AMAX_FLOOR, E4M3_MAX)
    for one, vector in zip(values, vectors, strict=True):
        store_fp8(wanted, one, exponent, data + Int64(vector) * VECTOR)
    return exponent


@cute.jit
def both_true(a, b):
    """Return a and b."""
    return a & b


@cute.jit
def store_fp32(wanted, values: cute.Tensor, address: Int64):
    """Store 8 fp32 values."""
    if wanted:
        words = [bits_of(values[element]) for element in range(VECTOR)]
        store_global_vector(address, *words[:4])
        store_global_vector(address + 16, *words[4:])


@cute.jit
def store_bf16(wanted, values: cute.Tensor, address: Int64):
    """Store 8 values rounded to bf16."""
    if wanted:
        store_global_vector(address, *[pack_bf16(values[2 * pair], values[2 * pair + 1]) for pair in range(4)])


@cute.jit
def store_word_if(wanted, address: Int64, word: Uint32, num_bytes: cutlass.Constexpr = 4):
    """Store the low bytes of a word."""
    if wanted:
        store_bytes(address, word, num_bytes)


def fp8_words(values, exponent):
    """Return 8 E4M3 codes in two words."""
    inverse = from_bits((Uint32(254) - exponent) << 23)  # a power of two, so x * inverse is x / scale
    codes = [multiply(values[element], inverse) for element in range(VECTOR)]
    return e4m3_word(*codes[:4]), e4m3_word(*codes[4:])


@cute.jit
def store_fp8(wanted, values: cute.Tensor, exponent: Uint32, address: Int64):
    """Store 8 E4M3 codes."""
    if wanted:
        store_pair(address, *fp8_words(values, exponent))


def fp4_word(values, exponent):
    """Return 8 E2M1 codes in a word, the first in the low nibble; the sign of a value is the sign of its code."""
    inverse = from_bits((Uint32(254) - exponent) << 23)  # a power of two, so x * inverse is x / scale
    word = Uint32(0)
    for element in range(VECTOR):
        code = (e2m1_bits(multiply(magnitude(values[element]), inverse)) & Uint32(7)) | (
            (bits_of(values[element]) >> 28) & Uint32(8)
        )
        word = word | (code << (4 * element))
    return word


@cute.jit
def store_fp4(wanted, values: cute.Tensor, vector: Int32, exponent: Uint32, data: Int64, scales: Int64):
    """Store 8 E2M1 codes; the first lane of four also their scale."""
    if wanted:
        store_bytes(data + Int64(vector) * 4, fp4_word(values, exponent), 4)
        if vector % 4 == 0:
            store_bytes(scales + Int64(vector // 4), exponent, 1)


def cut_off(value):
    """Return a value within MAX_LATENT; NaN and infinity stay what they are."""
    inside = min_keeping_nan(max_keeping_nan(value, Float32(-MAX_LATENT)), Float32(MAX_LATENT))
    return from_bits(choose_word(bits_of(magnitude(value)) == Uint32(INFINITY), bits_of(value), bits_of(inside)))


@cute.jit
def store_latent(
    wanted, values: cute.Tensor, vector: Int32, latent_vectors: Int32, exponent: Uint32, data: Int64, scales: Int64
):
    """Store 8 E4M3 codes and, the first lane of eight, their scale; or 8 rotary values in bf16 and the pad byte."""
    if wanted:
        if vector < latent_vectors:
            store_pair(data + Int64(vector) * VECTOR, *fp8_words(values, exponent))
            if vector % 8 == 0:
                store_bytes(scales + Int64(vector // 8), exponent, 1)
        else:
            rotary = data + Int64(latent_vectors) * VECTOR + Int64(vector - latent_vectors) * 16
            kept = [cut_off(values[element]) for element in range(VECTOR)]
            store_global_vector(rotary, *[pack_bf16(kept[2 * pair], kept[2 * pair + 1]) for pair in range(4)])
            if vector == latent_vectors:
                store_bytes(scales + Int64(vector // 8), Uint32(0), 1)
