# SPDX-License-Identifier: Apache-2.0
"""Rotation of channel pairs in registers, with sine and cosine of angles up to a million.

The library's sine reduces large angles through tables in local memory. An angle here is at most 2^20, so three products
suffice: k = round(a * 2 / pi), r = a - k * pi / 2 with pi / 2 in three parts. The first step is exact: both terms are
multiples of 2^-24 and the difference is below 1. Then polynomials on |r| < 0.9; within 1e-7 of the sine everywhere.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.arch import inline_ptx

from megamoe.kernels.parts.ptx_device import multiply
from megamoe.kernels.parts.rows import VECTOR, RowTile
from megamoe.kernels.parts.rows_device import RowThread

PAIRS = VECTOR // 2


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


def choose(wanted, a, b):
    """Return a if `wanted`, else b."""
    return inline_ptx(
        "{ .reg .pred p; .reg .b32 flag; mov.b32 flag, {$r0}; setp.ne.b32 p, flag, 0; "
        "selp.f32 {$w0}, {$r1}, {$r2}, p; }",
        write_only_types=[Float32],
        read_only_args=[Int32(wanted), a, b],
    )


class HeadThread(RowThread):
    """This thread's share of one head of a token; blocks of a token follow each other, `passes` heads a thread.

    Attributes:
        row: the head's index; heads past the last one repeat it, and `live` says not to store them.
        lane: position among the head's threads.
    """

    def __init__(self, tile: RowTile, part, tidx, index: int, passes: int, num_heads: int):
        self.tile = tile
        self.lane = tidx % tile.lanes
        head = (part * passes + index) * tile.rows + tidx // tile.lanes
        if cutlass.const_expr(num_heads % (passes * tile.rows) == 0):
            self.live, self.row = True, head
        else:
            self.live = head < num_heads
            self.row = cutlass.min(head, num_heads - 1)


def head_blocks(tile: RowTile, passes: int, num_heads: int) -> int:
    """Return how many blocks the heads of a token take."""
    return -(-num_heads // (passes * tile.rows))


class Rotation:
    """Sines and cosines of this thread's channels for one position.

    The last `rope_dim` channels of a head rotate. A vector of 8 lies on one side of that border, which is a multiple
    of 8; where only some threads' vector at an index rotates, the others keep their values.
    """

    def __init__(self, thread: RowThread, inv_freq, position, rope_dim: int):
        tile = thread.tile
        self.first = (tile.width - rope_dim) // VECTOR
        self.factors = {}
        for index in range(tile.vectors):
            if (index + 1) * tile.lanes > self.first:
                pairs = cute.make_rmem_tensor(cute.make_layout(PAIRS), Float32)
                group = cutlass.min(cutlass.max(thread.vector(index) - self.first, 0), rope_dim // VECTOR - 1)
                cute.autovec_copy(cute.zipped_divide(inv_freq, (PAIRS,))[(None,), group], pairs)
                self.factors[index] = [sine_and_cosine(multiply(position, pairs[pair])) for pair in range(PAIRS)]

    def turned(self, thread: RowThread, index: int, values):
        """Return eight fp32 values of a vector, rotated if their channels are: products and sums rounded one by one."""
        if index not in self.factors:
            return values
        turned = []
        for pair, (sine, cosine) in enumerate(self.factors[index]):
            even, odd = values[2 * pair], values[2 * pair + 1]
            turned.append(multiply(even, cosine) - multiply(odd, sine))
            turned.append(multiply(odd, cosine) + multiply(even, sine))
        if index * thread.tile.lanes >= self.first:
            return turned
        rotates = thread.vector(index) >= self.first
        return [choose(rotates, new, old) for new, old in zip(turned, values, strict=True)]
