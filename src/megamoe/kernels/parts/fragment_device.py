# SPDX-License-Identifier: Apache-2.0
"""NVFP4 codes and scales in fragment order to the bf16 registers of a matrix instruction (formats/fragment_layout.py).

A pair of E2M1 magnitudes on the lowest exponent bits of two bf16 numbers, read as bf16, is the pair's value times
2^-126: exponent 0 is a subnormal in both formats. An E4M3 scale moved by four bits is likewise its value times 2^-120.
No single bf16 factor takes the product back (2^246), so the scale is brought to scale * 2^119 by two exact products;
one product with the code then gives code * scale * 2^-7: six significant bits and exponents -17 to 5, exact. The 2^7
joins the tensor scale in fp32. Everything is two values to an instruction; `kernels/parts/fragment.py` has the
constants, and the tests repeat the arithmetic for every code and scale.
"""

from cutlass import Float32, Uint32
from cutlass.cute.arch import inline_ptx

from megamoe.kernels.parts.fragment import SCALE_BITS, TWO_TO_112, TWO_TO_127, code_pairs


def multiply_bf16x2(a, b):
    """Return the products of two pairs of bf16 numbers."""
    return inline_ptx("mul.rn.bf16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


def times_two_to_239(scales):
    """Return a pair of bf16 numbers times 2^127, times 2^112."""
    return inline_ptx(
        f"{{ .reg .b32 first, second; mov.b32 first, {TWO_TO_127}; mov.b32 second, {TWO_TO_112}; "
        "mul.rn.bf16x2 {$w0}, {$r0}, first; mul.rn.bf16x2 {$w0}, {$w0}, second; }",
        write_only_types=[Uint32],
        read_only_args=[scales],
    )


def low_twice(pair):
    """Return the low half of a register in both halves."""
    return inline_ptx(
        "{ .reg .b16 l, h; mov.b32 {l, h}, {$r0}; mov.b32 {$w0}, {l, l}; }",
        write_only_types=[Uint32],
        read_only_args=[pair],
    )


def high_twice(pair):
    """Return the high half of a register in both halves."""
    return inline_ptx(
        "{ .reg .b16 l, h; mov.b32 {l, h}, {$r0}; mov.b32 {$w0}, {h, h}; }",
        write_only_types=[Uint32],
        read_only_args=[pair],
    )


def block_scales(word):
    """Return the scales of a word's four bytes, each twice in a register, times 2^119."""
    even, odd = (word << 4) & Uint32(SCALE_BITS), (word >> 4) & Uint32(SCALE_BITS)  # bytes 0 and 2, bytes 1 and 3
    even, odd = times_two_to_239(even), times_two_to_239(odd)
    return low_twice(even), low_twice(odd), high_twice(even), high_twice(odd)


def weight_fragment(word, upper_scale, lower_scale):
    """Return the four registers of an m16n8k16 A operand, times 2^-7: rows g and g + 8 have their own scales."""
    pairs = code_pairs(word, Uint32)
    return (
        multiply_bf16x2(pairs[0], upper_scale),
        multiply_bf16x2(pairs[1], lower_scale),
        multiply_bf16x2(pairs[2], upper_scale),
        multiply_bf16x2(pairs[3], lower_scale),
    )


def select(condition, a, b):
    """Return a where the condition is not zero, else b."""
    return inline_ptx(
        "{ .reg .pred p; setp.ne.b32 p, {$r0}, 0; selp.b32 {$w0}, {$r1}, {$r2}, p; }",
        write_only_types=[Uint32],
        read_only_args=[condition, a, b],
    )


def swap_lanes(word, distance: int):
    """Return the word of the lane whose number differs in one bit."""
    return inline_ptx(
        f"shfl.sync.bfly.b32 {{$w0}}, {{$r0}}, {distance}, 0x1f, 0xffffffff;",
        write_only_types=[Uint32],
        read_only_args=[word],
    )


def word_of_quad(word, lane: int):
    """Return the word of lane 0 to 3 of the four lanes that share a row."""
    return inline_ptx(
        f"shfl.sync.idx.b32 {{$w0}}, {{$r0}}, {lane}, 0x1c1f, 0xffffffff;",
        write_only_types=[Uint32],
        read_only_args=[word],
    )


def mma(accumulators, a, b0, b1):
    """Return accumulators + A B for m16n8k16 in bf16 with fp32 sums."""
    return inline_ptx(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, "
        "{{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
        write_only_types=[Float32] * 4,
        read_only_args=[*a, b0, b1, *accumulators],
    )
