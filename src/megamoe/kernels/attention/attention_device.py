# SPDX-License-Identifier: Apache-2.0
"""What attention kernels share on the device: fp16 pairs, powers of two, matrices of shared memory.

A tile is [column block][row][64] fp16: rows of 128 bytes, whose 16-byte chunks change places by the row's number, so
that eight rows of a column of chunks meet all banks. `chunk_of` says where a chunk is.
"""

from cutlass import Float32, Uint32
from cutlass.cute.arch import inline_ptx

from megamoe.kernels.parts.memory_device import predicated

ROW_BYTES = 128
LOG2_E = 1.4426950408889634
HEADROOM = 15.0
"""The largest fp16 weight is 2^15 (ops/sparse_attention.py)."""
LOWEST = -1e30
"""Where the running power of two starts: below every logit, and finite, so that differences are."""


def chunk_of(row, chunk):
    """Return the byte in a column block where a chunk of 16 bytes of a row lies."""
    return row * ROW_BYTES + (chunk ^ (row % 8)) * 16


def load_matrices_transposed(address):
    """Return four 8 x 8 matrices of 16-bit values, transposed; lane l gives row l % 8 of matrix l / 8."""
    return inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Uint32] * 4,
        read_only_args=[address],
    )


def fp16_word(low, high):
    """Return two fp32 values as fp16 in one word, each rounded to nearest even; beyond 65504 infinity."""
    return inline_ptx("cvt.rn.f16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Uint32], read_only_args=[low, high])


def multiply_pairs(a, b):
    """Return the products of two pairs of fp16, subnormals kept."""
    return inline_ptx("mul.rn.f16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


def fp16_of_bf16(word):
    """Return a pair of bf16 as a pair of fp16."""
    return inline_ptx(
        """{
        .reg .b32 low, high;
        .reg .f32 first, second;
        shl.b32 low, {$r0}, 16;
        and.b32 high, {$r0}, 0xFFFF0000;
        mov.b32 first, low;
        mov.b32 second, high;
        cvt.rn.f16x2.f32 {$w0}, second, first;
        }""",
        write_only_types=[Uint32],
        read_only_args=[word],
    )


def exp2(a):
    """Return 2^a within two units in the last place; results below 2^-126 are zero."""
    return inline_ptx("ex2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[a])


def ceiling(a):
    """Return the least integer that is not below an fp32 value; infinities and NaN stay."""
    return inline_ptx("cvt.rpi.f32.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[a])


def power_of_two(difference):
    """Return 2^difference of an integer up to 0 in fp32, exact; 0 from -127 down and for NaN."""
    return inline_ptx(
        """{
        .reg .f32 bounded;
        .reg .s32 exponent;
        max.f32 bounded, {$r0}, 0fC2FE0000;
        cvt.rzi.s32.f32 exponent, bounded;
        add.s32 exponent, exponent, 127;
        shl.b32 exponent, exponent, 23;
        mov.b32 {$w0}, exponent;
        }""",
        write_only_types=[Float32],
        read_only_args=[difference],
    )


def load_two_words(address):
    """Return two neighbouring words of shared memory."""
    return inline_ptx(
        "ld.shared.v2.b32 {{$w0}, {$w1}}, [{$r0}];", write_only_types=[Uint32, Uint32], read_only_args=[address]
    )


def store_two_floats(address, a, b):
    """Store two floats to shared memory."""
    inline_ptx("st.shared.v2.f32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[address, a, b])


def store_shared_float_if(wanted, address, value):
    """Store a float to shared memory if `wanted`."""
    predicated(wanted, "st.shared.f32 [{$r1}], {$r2};", address, value)
