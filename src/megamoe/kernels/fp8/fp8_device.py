# SPDX-License-Identifier: Apache-2.0
"""What the FP8 matrix kernels share on the device: copies into shared memory, E4M3 to fp16, the fp16 product, scales.

Every E4M3 number is an fp16 number, and the product of two of them has eight significant bits, so mma.f32.f16.f16.f32
adds exact products in fp32. K is dealt out as in parts/mma_device.py: lane l = 4 g + t owns 16 bytes in a row of row g,
and bytes 4 s to 4 s + 3 are its fragment of step s, on both operands alike.
"""

from cutlass import Float32, Int32, Uint32
from cutlass.cute.arch import inline_ptx


def e4m3_pairs(word):
    """Return the four E4M3 numbers of a word as two pairs of fp16 numbers, exact; NaN stays NaN."""
    return inline_ptx(
        "{ .reg .b16 low, high; mov.b32 {low, high}, {$r0}; "
        "cvt.rn.f16x2.e4m3x2 {$w0}, low; cvt.rn.f16x2.e4m3x2 {$w1}, high; }",
        write_only_types=[Uint32, Uint32],
        read_only_args=[word],
    )


def mma_fp16(accumulators, a, b):
    """Return accumulators + a @ b for 4 fp32 accumulators, 4 registers of a and 2 of b, all fp16 pairs."""
    return inline_ptx(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
        write_only_types=[Float32] * 4,
        read_only_args=[*a, *b, *accumulators],
    )


def copy_async_if(wanted, shared_address, global_address):
    """Start copying 16 bytes to shared memory if `wanted`."""
    inline_ptx(
        "{ .reg .pred wanted; .reg .b32 flag; mov.b32 flag, {$r0}; setp.ne.b32 wanted, flag, 0; "
        "@wanted cp.async.cg.shared.global.L2::128B [{$r1}], [{$r2}], 16; }",
        read_only_args=[Int32(wanted), shared_address, global_address],
    )


def copy_async_or_zero(wanted, shared_address, global_address):
    """Start copying 16 bytes to shared memory, or write 16 zeros if `wanted` is 0; the address must be valid."""
    inline_ptx(
        "cp.async.cg.shared.global [{$r1}], [{$r2}], 16, {$r0};",
        read_only_args=[Int32(wanted) * 16, shared_address, global_address],
    )


def commit_copies():
    """Make a group of the copies started since the last one."""
    inline_ptx("cp.async.commit_group;", read_only_args=[])


def wait_copies(num_pending: int):
    """Wait until at most that many of this thread's groups, the latest, are under way."""
    inline_ptx(f"cp.async.wait_group {num_pending};", read_only_args=[])


def team_barrier(barrier, num_threads: int):
    """Wait for the other threads of a named barrier."""
    inline_ptx(f"bar.sync {{$r0}}, {num_threads};", read_only_args=[barrier])


def load_two_floats(space: str, address):
    """Return two floats of memory: "global" or "shared"."""
    return inline_ptx(
        "ld." + space + ".v2.f32 {{$w0}, {$w1}}, [{$r0}];",
        write_only_types=[Float32, Float32],
        read_only_args=[address],
    )


def store_shared_floats(address, a, b, c, d):
    """Store four floats to shared memory."""
    inline_ptx("st.shared.v4.f32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[address, a, b, c, d])


def load_scale_if(wanted, scales, index, size):
    """Return a scale in fp32, or zero if `wanted` is 0.

    Args:
        wanted: whether to read.
        scales: address of the first one.
        index: which, 64 bits.
        size: bytes of a scale: 1 for E8M0 (byte 0 is 2^-127, a subnormal; 255 is NaN), 4 for fp32.
    """
    return inline_ptx(
        """{
        .reg .pred p, small, large, ends;
        .reg .b32 flag, bits, byte, next;
        mov.b32 flag, {$r0};
        setp.ne.b32 p, flag, 0;
        setp.eq.and.b32 small, {$r2}, 1, p;
        setp.ne.and.b32 large, {$r2}, 1, p;
        mov.b32 bits, 0;
        mov.b32 byte, 0;
        @large ld.global.b32 bits, [{$r1}];
        @small ld.global.u8 byte, [{$r1}];
        @small shl.b32 bits, byte, 23;
        add.u32 next, byte, 1;
        and.b32 next, next, 255;
        setp.lt.and.u32 ends, next, 2, small;
        @ends or.b32 bits, bits, 0x00400000;
        mov.b32 {$w0}, bits;
        }""",
        write_only_types=[Float32],
        read_only_args=[Int32(wanted), scales + index * size, size],
    )


def broadcast(value, lane):
    """Return the float of one lane to all lanes of the warp."""
    return inline_ptx(
        "{ .reg .b32 bits; mov.b32 bits, {$r0}; shfl.sync.idx.b32 bits, bits, {$r1}, 31, 0xffffffff; "
        "mov.b32 {$w0}, bits; }",
        write_only_types=[Float32],
        read_only_args=[value, lane],
    )


def scaled_pairs(word, scale):
    """Return the E4M3 numbers of a word times a scale in bf16: the first and third, the second and fourth."""
    return inline_ptx(
        """{
        .reg .b16 low, high, h0, h1, h2, h3;
        .reg .b32 first, second;
        .reg .f32 a, b, c, d;
        mov.b32 {low, high}, {$r0};
        cvt.rn.f16x2.e4m3x2 first, low;
        cvt.rn.f16x2.e4m3x2 second, high;
        mov.b32 {h0, h1}, first;
        mov.b32 {h2, h3}, second;
        cvt.f32.f16 a, h0;
        cvt.f32.f16 b, h1;
        cvt.f32.f16 c, h2;
        cvt.f32.f16 d, h3;
        mul.rn.f32 a, a, {$r1};
        mul.rn.f32 b, b, {$r1};
        mul.rn.f32 c, c, {$r1};
        mul.rn.f32 d, d, {$r1};
        cvt.rn.bf16x2.f32 {$w0}, c, a;
        cvt.rn.bf16x2.f32 {$w1}, d, b;
        }""",
        write_only_types=[Uint32, Uint32],
        read_only_args=[word, scale],
    )


def folding_factor(byte):
    """Return, twice in a register, the bf16 factor 2^113 * scale of an E8M0 byte; NaN for scales above 2^14 and NaN.

    The codes' bits on the lowest exponent bits of bf16 are code * 2^-120, so what comes out is code * scale * 2^-7.
    """
    return inline_ptx(
        """{
        .reg .pred large;
        .reg .b32 bits;
        add.u32 bits, {$r0}, 113;
        setp.gt.u32 large, bits, 254;
        shl.b32 bits, bits, 7;
        @large mov.b32 bits, 0x7FC0;
        shl.b32 {$w0}, bits, 16;
        or.b32 {$w0}, {$w0}, bits;
        }""",
        write_only_types=[Uint32],
        read_only_args=[byte],
    )


def folded_pairs(word, factor, nan):
    """Return E4M3 numbers times a folding factor, the first and third, the second and fourth, and `nan` updated.

    A NaN code would come out as 480: bit 7 of a byte of `nan` is set if one was met.
    """
    return inline_ptx(
        """{
        .reg .b32 even, odd, sign, check;
        shl.b32 even, {$r0}, 4;
        and.b32 even, even, 0x07F007F0;
        shl.b32 sign, {$r0}, 8;
        and.b32 sign, sign, 0x80008000;
        or.b32 even, even, sign;
        shr.u32 odd, {$r0}, 4;
        and.b32 odd, odd, 0x07F007F0;
        and.b32 sign, {$r0}, 0x80008000;
        or.b32 odd, odd, sign;
        mul.rn.bf16x2 {$w0}, even, {$r1};
        mul.rn.bf16x2 {$w1}, odd, {$r1};
        and.b32 check, {$r0}, 0x7F7F7F7F;
        add.u32 check, check, 0x01010101;
        or.b32 {$w2}, {$r2}, check;
        }""",
        write_only_types=[Uint32, Uint32, Uint32],
        read_only_args=[word, factor, nan],
    )


def nan_of_row(nan):
    """Return NaN if one of the four lanes of a row met a NaN code, else 0."""
    return inline_ptx(
        """{
        .reg .pred met;
        .reg .b32 all, other;
        shfl.sync.bfly.b32 other, {$r0}, 1, 31, 0xffffffff;
        or.b32 all, {$r0}, other;
        shfl.sync.bfly.b32 other, all, 2, 31, 0xffffffff;
        or.b32 all, all, other;
        and.b32 all, all, 0x80808080;
        setp.ne.b32 met, all, 0;
        selp.b32 all, 0x7FC00000, 0, met;
        mov.b32 {$w0}, all;
        }""",
        write_only_types=[Float32],
        read_only_args=[nan],
    )
