# SPDX-License-Identifier: Apache-2.0
"""What kernels over rows of logits share: logits as integers in their order, and the best token of a row."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.arch import inline_ptx
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.parts.ptx_device import add

LEAST = -(2**31)
NO_INDEX = 2**31 - 1


def symbolic_logits(num_rows):
    """Return a [num_rows, V] fp32 argument of any row stride."""
    return make_fake_tensor(Float32, (num_rows, cute.sym_int32()), (cute.sym_int64(), 1))


def symbolic_column(dtype, num_rows):
    """Return a [num_rows] argument."""
    return make_fake_tensor(dtype, (num_rows,), (1,))


def order_of(logit):
    """Return an int32 that is larger for larger logits, and the same for both zeros."""
    return inline_ptx(
        "{ .reg .b32 b, s; mov.b32 b, {$r0}; shr.s32 s, b, 31; and.b32 s, s, 0x7FFFFFFF; xor.b32 {$w0}, b, s; }",
        write_only_types=[Int32],
        read_only_args=[add(logit, Float32(0.0))],
    )


@cute.jit
def block_best(order: Int32, index: Int32, scratch: cute.Tensor, num_warps: cutlass.Constexpr):
    """Return the largest order of a block and the lowest index that has it; scratch is int32 [2, warps]."""
    for step in cutlass.range_constexpr(5):
        other_order = cute.arch.shuffle_sync_bfly(order, offset=16 >> step)
        other_index = cute.arch.shuffle_sync_bfly(index, offset=16 >> step)
        if (other_order > order) | ((other_order == order) & (other_index < index)):
            order, index = other_order, other_index
    warp = cute.arch.warp_idx()
    cute.arch.sync_threads()  # the scratch may still be being read
    if cute.arch.lane_idx() == 0:
        scratch[0, warp] = order
        scratch[1, warp] = index
    cute.arch.sync_threads()
    order, index = scratch[0, 0], scratch[1, 0]
    for other in cutlass.range_constexpr(1, num_warps):
        other_order, other_index = scratch[0, other], scratch[1, other]
        if (other_order > order) | ((other_order == order) & (other_index < index)):
            order, index = other_order, other_index
    return order, index


@cute.jit
def row_best(logits: cute.Tensor, row: Int32, thread: Int32, threads: cutlass.Constexpr, scratch: cute.Tensor):
    """Return the order of a row's largest logit and the lowest index that has it, to all threads of the block."""
    order, index = Int32(LEAST), Int32(NO_INDEX)
    for token in cutlass.range(thread, logits.shape[1], threads, unroll=4):
        own = order_of(logits[row, token])
        if (own > order) | (index == NO_INDEX):
            order, index = own, token
    return block_best(order, index, scratch, threads // 32)


def floor_of_product(a, b):
    """Return the integer part of fp32 a times int64 b, as an fp64 product."""
    return inline_ptx(
        "{ .reg .f64 x, y; cvt.f64.f32 x, {$r0}; cvt.rn.f64.s64 y, {$r1}; mul.rn.f64 x, x, y; "
        "cvt.rzi.s64.f64 {$w0}, x; }",
        write_only_types=[Int64],
        read_only_args=[a, b],
    )


def ceiling_of_product(a, b):
    """Return the least integer that is at least fp32 a times int64 b, as an fp64 product."""
    return inline_ptx(
        "{ .reg .f64 x, y; cvt.f64.f32 x, {$r0}; cvt.rn.f64.s64 y, {$r1}; mul.rn.f64 x, x, y; "
        "cvt.rpi.s64.f64 {$w0}, x; }",
        write_only_types=[Int64],
        read_only_args=[a, b],
    )
