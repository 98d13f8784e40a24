# SPDX-License-Identifier: Apache-2.0
"""Rotation of channel pairs in registers, with sine and cosine of angles up to some millions.

The library's sine reduces large angles through tables in local memory. An angle here is below 2^22, so three products
suffice: k = round(a * 2 / pi), r = a - k * pi / 2 with pi / 2 in three parts. The first step is exact: both terms are
multiples of 2^-24 and the difference is below 1. Then polynomials on |r| < 0.9; within 1e-7 of the sine everywhere.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.arch import inline_ptx

from megamoe.kernels.parts.ptx_device import fma, multiply
from megamoe.kernels.parts.rows import VECTOR


def sine_and_cosine(angle):
    """Return the sine and the cosine of an angle in radians."""
    return inline_ptx(
        """{
        .reg .f32 q, k, r, z, s, c, t;
        .reg .s32 n, m;
        .reg .pred odd, flip;
        mul.rn.f32 q, {$r0}, 0f3F22F983;
        cvt.rni.s32.f32 n, q;
        cvt.rn.f32.s32 k, n;
        fma.rn.f32 r, k, 0fBFC90FDB, {$r0};
        fma.rn.f32 r, k, 0f333BBD2E, r;
        fma.rn.f32 r, k, 0f26F72CED, r;
        mul.rn.f32 z, r, r;
        fma.rn.f32 s, z, 0fB94CA1F9, 0f3C08839E;
        fma.rn.f32 s, z, s, 0fBE2AAAA3;
        mul.rn.f32 s, s, z;
        fma.rn.f32 s, s, r, r;
        fma.rn.f32 c, z, 0f37CCF5CE, 0fBAB6061A;
        fma.rn.f32 c, z, c, 0f3D2AAAA5;
        fma.rn.f32 t, z, 0fBF000000, 0f3F800000;
        mul.rn.f32 z, z, z;
        fma.rn.f32 c, z, c, t;
        and.b32 m, n, 1;
        setp.ne.s32 odd, m, 0;
        selp.f32 {$w0}, c, s, odd;
        selp.f32 {$w1}, s, c, odd;
        and.b32 m, n, 2;
        setp.ne.s32 flip, m, 0;
        @flip neg.f32 {$w0}, {$w0};
        add.s32 m, n, 1;
        and.b32 m, m, 2;
        setp.ne.s32 flip, m, 0;
        @flip neg.f32 {$w1}, {$w1};
        }""",
        write_only_types=[Float32, Float32],
        read_only_args=[angle],
    )


@cute.jit
def rotate_vector(
    values: cute.Tensor,
    vector: Int32,
    first: cutlass.Constexpr,
    position: Float32,
    inv_freq: cute.Tensor,
    inverse: cutlass.Constexpr,
):
    """Rotate the four pairs of a vector of 8 fp32 values in place, if it is one of the vectors that rotate.

    Args:
        values: [8] fp32 in registers.
        vector: its number in the row.
        first: the first vector that rotates.
        position: of the token, as fp32.
        inv_freq: [R / 2] fp32.
        inverse: rotate backwards.
    """
    if vector >= first:
        for pair in cutlass.range_constexpr(VECTOR // 2):
            angle = multiply(position, inv_freq[(vector - first) * (VECTOR // 2) + pair])
            sine, cosine = sine_and_cosine(angle)
            if cutlass.const_expr(inverse):
                sine = -sine
            even, odd = values[2 * pair], values[2 * pair + 1]
            values[2 * pair] = fma(even, cosine, -multiply(odd, sine))
            values[2 * pair + 1] = fma(odd, cosine, multiply(even, sine))
