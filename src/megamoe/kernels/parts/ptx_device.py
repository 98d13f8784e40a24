# SPDX-License-Identifier: Apache-2.0
"""Single PTX instructions whose rounding is part of an operation's meaning, spelled out so that no compiler chooses.

The DSL may contract a product and a sum into one FMA and may turn a division by a constant into a product. Where every
bit counts, these are used instead of operators.
"""

from cutlass import Float32, Int32, Uint32
from cutlass.cute.arch import inline_ptx


def divide(a, b):
    """Return a / b, rounded to nearest even as IEEE 754 says; subnormals are kept."""
    return inline_ptx("div.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def reciprocal(a):
    """Return 1 / a, rounded to nearest even."""
    return inline_ptx("rcp.rn.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[a])


def quick_reciprocal(a):
    """Return 1 / a within one unit in the last place: one instruction where reciprocal() is a dozen."""
    return inline_ptx("rcp.approx.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[a])


def multiply(a, b):
    """Return a * b, rounded to nearest even and never contracted with an addition."""
    return inline_ptx("mul.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def fma(a, b, c):
    """Return a * b + c, rounded once."""
    return inline_ptx("fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Float32], read_only_args=[a, b, c])


def max_keeping_nan(a, b):
    """Return the larger, or NaN if either is."""
    return inline_ptx("max.NaN.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def min_keeping_nan(a, b):
    """Return the smaller, or NaN if either is."""
    return inline_ptx("min.NaN.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def magnitude(a):
    """Return |a|."""
    return inline_ptx("abs.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[a])


def bits_of(a):
    """Return the bits of an fp32 value."""
    return inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[a])


def from_bits(bits):
    """Return the fp32 value of some bits."""
    return inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[bits])


def e4m3_of(a):
    """Return the E4M3 byte of an fp32 value (nearest even, saturating, NaN stays NaN) and that byte's value."""
    return inline_ptx(
        """{
        .reg .b16 code, half;
        .reg .b32 pair;
        cvt.rn.satfinite.e4m3x2.f32 code, 0f00000000, {$r0};
        cvt.rn.f16x2.e4m3x2 pair, code;
        cvt.u16.u32 half, pair;
        cvt.f32.f16 {$w1}, half;
        cvt.u32.u16 {$w0}, code;
        }""",
        write_only_types=[Uint32, Float32],
        read_only_args=[a],
    )


def e4m3_word(a, b, c, d):
    """Return four E4M3 bytes in one word, the first in the low byte."""
    return inline_ptx(
        """{
        .reg .b16 low, high;
        .reg .b32 low32, high32;
        cvt.rn.satfinite.e4m3x2.f32 low, {$r1}, {$r0};
        cvt.rn.satfinite.e4m3x2.f32 high, {$r3}, {$r2};
        cvt.u32.u16 low32, low;
        cvt.u32.u16 high32, high;
        shl.b32 high32, high32, 16;
        or.b32 {$w0}, low32, high32;
        }""",
        write_only_types=[Uint32],
        read_only_args=[a, b, c, d],
    )


def e2m1_magnitude(a):
    """Return the E2M1 code 0..7 of an fp32 value in [0, 6], nearest even.

    Adding 1.5 * 2^(22 + e) makes the unit of the last place 2^(e - 1), which is E2M1's spacing in the binade of a
    (e = 0 below 2): the hardware rounds, and the code is what is left in the low bits plus two for each binade.
    """
    return inline_ptx(
        """{
        .reg .b32 binade, magic, sum;
        .reg .f32 value, shifted;
        mov.b32 binade, {$r0};
        and.b32 binade, binade, 0x7F800000;
        max.s32 binade, binade, 0x3F800000;
        add.s32 magic, binade, 0x0B400000;
        mov.b32 value, magic;
        add.rn.f32 shifted, value, {$r0};
        mov.b32 sum, shifted;
        sub.s32 sum, sum, magic;
        shr.u32 binade, binade, 22;
        add.s32 sum, sum, binade;
        sub.s32 {$w0}, sum, 254;
        }""",
        write_only_types=[Int32],
        read_only_args=[a],
    )


def bf16_word(low, high):
    """Return two fp32 values as bf16 in one word, each rounded to nearest even."""
    return inline_ptx("cvt.rn.bf16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Uint32], read_only_args=[low, high])


def square_root(a):
    """Return the square root, rounded to nearest even."""
    return inline_ptx("sqrt.rn.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[a])
