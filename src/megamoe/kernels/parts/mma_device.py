# SPDX-License-Identifier: Apache-2.0
"""Skinny products on the warp's matrix unit, operands straight from global memory.

mma.m16n8k16: 16 weight rows, 8 tokens, 16 of K. Which k an operand calls its third is nobody's business but the other
operand's, so K is dealt out such that a lane reads 16 bytes in a row: lane l holds token (or weight row) l // 4, and
of every 32 values those from 8 * (l % 4) on, four for each of two steps.
"""

import cutlass.cute as cute
from cutlass import Float32, Uint32
from cutlass.cute.arch import inline_ptx

STEP_VALUES = 32  # values of K that one 16-byte load a lane covers: two steps of 16
LANE_VALUES = 8


def mma(accumulators, a, b):
    """Return accumulators + a @ b for 4 fp32 accumulators, 4 registers of a and 2 of b, all bf16 pairs."""
    return inline_ptx(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
        write_only_types=[Float32] * 4,
        read_only_args=[*a, *b, *accumulators],
    )


def split_in_two(low, high):
    """Return two bf16 pairs, each part rounded to nearest, that add up to two fp32 values within 2^-17 of each."""
    return inline_ptx(
        """{
        .reg .b32 lowbits, highbits;
        .reg .f32 lowpart, highpart;
        cvt.rn.bf16x2.f32 {$w0}, {$r1}, {$r0};
        shl.b32 lowbits, {$w0}, 16;
        and.b32 highbits, {$w0}, 0xFFFF0000;
        mov.b32 lowpart, lowbits;
        mov.b32 highpart, highbits;
        sub.rn.f32 lowpart, {$r0}, lowpart;
        sub.rn.f32 highpart, {$r1}, highpart;
        cvt.rn.bf16x2.f32 {$w1}, highpart, lowpart;
        }""",
        write_only_types=[Uint32] * 2,
        read_only_args=[low, high],
    )


def bf16_pair(word):
    """Return the two bf16 values of a word in fp32, the low half first."""
    return inline_ptx(
        """{
        .reg .b32 low, high;
        shl.b32 low, {$r0}, 16;
        and.b32 high, {$r0}, 0xFFFF0000;
        mov.b32 {$w0}, low;
        mov.b32 {$w1}, high;
        }""",
        write_only_types=[Float32, Float32],
        read_only_args=[word],
    )


def zeros(*shape: int):
    """Return a register tensor of fp32 zeros."""
    registers = cute.make_rmem_tensor(cute.make_layout(shape), Float32)
    registers.fill(0.0)
    return registers
