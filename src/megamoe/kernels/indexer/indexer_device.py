# SPDX-License-Identifier: Apache-2.0
"""What both kernels of the indexer share on the device: FP4 vectors to bf16, scores as integers of the same order."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32
from cutlass.cute.arch import inline_ptx

from megamoe.kernels.parts.memory_device import predicated


def relative_factor(byte, highest):
    """Return, twice in a register, the bf16 factor 2^126 * 2^(byte - highest); 0 below the range.

    The bits of a code, put on the lowest exponent bits of a bf16, are code * 2^-126. 253 is the exponent byte of 2^126.

    Args:
        byte: the E8M0 scale of a group.
        highest: the largest one of the row's groups.
    """
    return inline_ptx(
        "{ .reg .b32 bits; sub.s32 bits, {$r0}, {$r1}; add.s32 bits, bits, 253; max.s32 bits, bits, 0; "
        "shl.b32 bits, bits, 7; prmt.b32 {$w0}, bits, bits, 0x1010; }",
        write_only_types=[Uint32],
        read_only_args=[byte, highest],
    )


def scale_value(byte):
    """Return 2^(byte - 127) in fp32; byte 0 is a subnormal, byte 255 NaN."""
    return inline_ptx(
        """{
        .reg .pred ends;
        .reg .b32 bits, next;
        shl.b32 bits, {$r0}, 23;
        add.u32 next, {$r0}, 1;
        and.b32 next, next, 255;
        setp.lt.u32 ends, next, 2;
        @ends or.b32 bits, bits, 0x00400000;
        mov.b32 {$w0}, bits;
        }""",
        write_only_types=[Float32],
        read_only_args=[byte],
    )


def e2m1_pairs(word, factor):
    """Return the 8 E2M1 codes of a word times a factor as four pairs of bf16: codes i and i + 4."""
    return inline_ptx(
        """{
        .reg .b32 a, b;
        shl.b32 a, {$r0}, 12; and.b32 a, a, 0x80008000;
        shl.b32 b, {$r0}, 6; and.b32 b, b, 0x01C001C0; or.b32 a, a, b;
        mul.rn.bf16x2 {$w0}, a, {$r1};
        shl.b32 a, {$r0}, 8; and.b32 a, a, 0x80008000;
        shl.b32 b, {$r0}, 2; and.b32 b, b, 0x01C001C0; or.b32 a, a, b;
        mul.rn.bf16x2 {$w1}, a, {$r1};
        shl.b32 a, {$r0}, 4; and.b32 a, a, 0x80008000;
        shr.u32 b, {$r0}, 2; and.b32 b, b, 0x01C001C0; or.b32 a, a, b;
        mul.rn.bf16x2 {$w2}, a, {$r1};
        and.b32 a, {$r0}, 0x80008000;
        shr.u32 b, {$r0}, 6; and.b32 b, b, 0x01C001C0; or.b32 a, a, b;
        mul.rn.bf16x2 {$w3}, a, {$r1};
        }""",
        write_only_types=[Uint32] * 4,
        read_only_args=[word, factor],
    )


def ordered_bits(score):
    """Return an integer for a score: larger for a larger one, equal for -0 and 0, the largest of all for any NaN."""
    return inline_ptx(
        """{
        .reg .pred nan;
        .reg .f32 x;
        .reg .b32 bits, sign;
        add.rn.f32 x, {$r0}, 0f00000000;
        setp.nan.f32 nan, x, x;
        mov.b32 bits, x;
        shr.s32 sign, bits, 31;
        or.b32 sign, sign, 0x80000000;
        xor.b32 bits, bits, sign;
        selp.b32 {$w0}, 0xFFFFFFFF, bits, nan;
        }""",
        write_only_types=[Uint32],
        read_only_args=[score],
    )


def copy_word(shared_address, global_address):
    """Start copying 4 bytes to shared memory."""
    inline_ptx("cp.async.ca.shared.global [{$r0}], [{$r1}], 4;", read_only_args=[shared_address, global_address])


def copy_vector(shared_address, global_address):
    """Start copying 16 bytes to shared memory."""
    inline_ptx("cp.async.cg.shared.global [{$r0}], [{$r1}], 16;", read_only_args=[shared_address, global_address])


def load_shared_byte(address):
    """Return a byte of shared memory."""
    return inline_ptx("ld.shared.u8 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


def load_global_byte(address):
    """Return a byte of global memory."""
    return inline_ptx("ld.global.u8 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


def count_if(wanted, address):
    """Add 1 to a word of shared memory if `wanted`."""
    predicated(wanted, "red.shared.add.u32 [{$r1}], 1;", address)


def load_cluster_word(address):
    """Return a word of the shared memory of a block of the cluster, from an address of address_in_block."""
    return inline_ptx("ld.shared::cluster.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


def store_cluster_word(address, word):
    """Store a word to the shared memory of a block of the cluster, at an address of address_in_block."""
    inline_ptx("st.shared::cluster.b32 [{$r0}], {$r1};", read_only_args=[address, word])


def lanes_where(flag):
    """Return the mask of the warp's lanes with a flag that is not 0."""
    return inline_ptx(
        "{ .reg .pred p; .reg .b32 flag; mov.b32 flag, {$r0}; setp.ne.b32 p, flag, 0; "
        "vote.sync.ballot.b32 {$w0}, p, 0xffffffff; }",
        write_only_types=[Uint32],
        read_only_args=[Int32(flag)],
    )


def bits_set(mask):
    """Return the number of bits set."""
    return inline_ptx("popc.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[mask])


def store_word_if(wanted, address, word):
    """Store a word to global memory if `wanted`."""
    predicated(wanted, "st.global.b32 [{$r1}], {$r2};", address, word)


def quotient(number, inverse):
    """Return number // divisor by the divisor's inverse of kernels/indexer/index_scores.py, 0 for the divisor 1."""
    return inline_ptx(
        "{ .reg .pred one; mul.hi.u32 {$w0}, {$r0}, {$r1}; setp.eq.u32 one, {$r1}, 0; @one mov.b32 {$w0}, {$r0}; }",
        write_only_types=[Int32],
        read_only_args=[number, inverse],
    )


def publish_to_products():
    """Make this thread's stores to shared memory visible to wgmma, once the block has met."""
    inline_ptx("fence.proxy.async.shared::cta;", read_only_args=[])


def top_of_row(byte):
    """Return the largest of the scales of the four lanes of a row."""
    byte = cutlass.max(byte, cute.arch.shuffle_sync_bfly(byte, offset=1))
    return cutlass.max(byte, cute.arch.shuffle_sync_bfly(byte, offset=2))
