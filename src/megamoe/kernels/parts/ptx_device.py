# SPDX-License-Identifier: Apache-2.0
"""Single PTX instructions whose rounding is part of an operation's meaning, spelled out so that no compiler chooses.

The DSL may contract a product and a sum into one FMA and may turn a division by a constant into a product. Where every
bit counts, these are used instead of operators.
"""

from cutlass import Float32, Uint32
from cutlass.cute.arch import inline_ptx


def divide(a, b):
    """Return a / b, rounded to nearest even as IEEE 754 says; subnormals are kept."""
    return inline_ptx("div.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def reciprocal(a):
    """Return 1 / a, rounded to nearest even."""
    return inline_ptx("rcp.rn.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[a])


def quick_reciprocal(a):
    """Return 1 / a within one unit in the last place: one instruction where reciprocal() is a dozen.

    Subnormals count as zero, of a and of the result.
    """
    return inline_ptx("rcp.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[a])


def multiply(a, b):
    """Return a * b, rounded to nearest even and never contracted with an addition."""
    return inline_ptx("mul.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def add(a, b):
    """Return a + b, rounded to nearest even and never contracted with a product."""
    return inline_ptx("add.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def subtract(a, b):
    """Return a - b, rounded to nearest even and never contracted with a product."""
    return inline_ptx("sub.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


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


def e2m1_bits(a):
    """Return 0x4B400000 + the E2M1 code 0..7 of an fp32 value from 0 on, nearest even, saturating; NaN gives 7.

    The code is the least of three lines, rounded to integers: 2 a below 2, a + 2 up to 4, a / 2 + 4 above. To round,
    1.5 * 2^23 is added, in the same operation that makes the line: there the unit of the last place is 1.
    """
    return inline_ptx(
        """{
        .reg .f32 low, middle, high;
        fma.rn.f32 low, {$r0}, 0f40000000, 0f4B400000;
        add.rn.f32 middle, {$r0}, 0f4B400002;
        fma.rn.f32 high, {$r0}, 0f3F000000, 0f4B400004;
        min.f32 high, high, 0f4B400007;
        min.f32 low, low, middle;
        min.f32 low, low, high;
        mov.b32 {$w0}, low;
        }""",
        write_only_types=[Uint32],
        read_only_args=[a],
    )


def max_of_pairs(a, b):
    """Return the larger of two pairs of bf16, each half NaN if either is."""
    return inline_ptx("max.NaN.bf16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


def gather_bytes(a, b, selector: int):
    """Return four of the eight bytes of a (0 to 3) and b (4 to 7): nibble i of `selector` says which becomes byte i."""
    return inline_ptx(
        f"prmt.b32 {{$w0}}, {{$r0}}, {{$r1}}, {selector};", write_only_types=[Uint32], read_only_args=[a, b]
    )


def bf16_word(low, high):
    """Return two fp32 values as bf16 in one word, each rounded to nearest even."""
    return inline_ptx("cvt.rn.bf16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Uint32], read_only_args=[low, high])


def square_root(a):
    """Return the square root, rounded to nearest even."""
    return inline_ptx("sqrt.rn.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[a])
