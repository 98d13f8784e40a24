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


def mma_tf32(accumulators, a, b):
    """Return accumulators + a @ b, 16 x 8 by 8 x 8: 4 fp32 accumulators, 4 words of a and 2 of b, each a tf32 value."""
    return inline_ptx(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
        write_only_types=[Float32] * 4,
        read_only_args=[*a, *b, *accumulators],
    )


def split_in_two(word):
    """Return two tf32 values whose sum is an fp32 value, given as its bits, but for its last two of 24 bits at most.

    The first is the value's upper 11 significant bits, the second what is left: 13 bits, of which the matrix unit takes 11.
    """
    return inline_ptx(
        """{
        .reg .f32 value, upper, rest;
        and.b32 {$w0}, {$r0}, 0xFFFFE000;
        mov.b32 value, {$r0};
        mov.b32 upper, {$w0};
        sub.rn.f32 rest, value, upper;
        mov.b32 {$w1}, rest;
        }""",
        write_only_types=[Uint32] * 2,
        read_only_args=[word],
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
