# SPDX-License-Identifier: Apache-2.0
"""What kernels over rows of logits share: logits as integers in their order, and products in fp64."""

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
