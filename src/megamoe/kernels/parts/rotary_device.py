# SPDX-License-Identifier: Apache-2.0
"""Rotation by positions: sine and cosine of fp32 angles, heads that share them, pairs of channels.

An angle is the fp32 product of ops/rope.py, up to a million radians. The DSL's own sine is either an approximation or
a call that keeps its reduction in local memory; three fused steps reduce angles up to 2^22 to a quarter turn exactly
enough, because an integer multiple of the leading 24 bits of pi / 2 is subtracted without rounding.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.arch import inline_ptx
from cutlass.cute.runtime import make_fake_tensor

from megamoe.kernels.parts.ptx_device import multiply
from megamoe.kernels.parts.rows import VECTOR, RowTile
from megamoe.kernels.parts.rows_device import RowThread

PAIRS = VECTOR // 2


def sine_cosine(angle):
    """Return sin and cos of an fp32 angle of at most 2^22, within two units in the last place of 1; NaN stays NaN.

    With n the nearest whole number of quarter turns, r = angle - n * pi / 2 in three parts of pi / 2; the series of
    both functions up to r^10, beyond which fp32 sees nothing below 0.9; n says which is which, and the signs.
    """
    return inline_ptx(
        """{
        .reg .f32 turns, r, square, sine, cosine, kept;
        .reg .b32 n, next, flip;
        .reg .pred odd;
        mul.rn.f32 turns, {$r0}, 0f3F22F983;
        cvt.rni.s32.f32 n, turns;
        cvt.rn.f32.s32 turns, n;
        fma.rn.f32 r, turns, 0fBFC90FDB, {$r0};
        fma.rn.f32 r, turns, 0f333BBD2E, r;
        fma.rn.f32 r, turns, 0f26F72CED, r;
        mul.rn.f32 square, r, r;
        fma.rn.f32 sine, square, 0f3638EF1D, 0fB9500D01;
        fma.rn.f32 sine, sine, square, 0f3C088889;
        fma.rn.f32 sine, sine, square, 0fBE2AAAAB;
        mul.rn.f32 sine, sine, square;
        fma.rn.f32 sine, sine, r, r;
        fma.rn.f32 cosine, square, 0fB493F27E, 0f37D00D01;
        fma.rn.f32 cosine, cosine, square, 0fBAB60B61;
        fma.rn.f32 cosine, cosine, square, 0f3D2AAAAB;
        fma.rn.f32 cosine, cosine, square, 0fBF000000;
        fma.rn.f32 cosine, cosine, square, 0f3F800000;
        and.b32 next, n, 1;
        setp.ne.b32 odd, next, 0;
        selp.f32 kept, cosine, sine, odd;
        selp.f32 cosine, sine, cosine, odd;
        add.s32 next, n, 1;
        shl.b32 flip, n, 30;
        and.b32 flip, flip, 0x80000000;
        mov.b32 n, kept;
        xor.b32 n, n, flip;
        mov.b32 {$w0}, n;
        shl.b32 flip, next, 30;
        and.b32 flip, flip, 0x80000000;
        mov.b32 n, cosine;
        xor.b32 n, n, flip;
        mov.b32 {$w1}, n;
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


def symbolic_heads(dtype, num_tokens, num_heads: int, width: int):
    """Return a [num_tokens, num_heads, width] argument whose heads are aligned to 16 bytes, at any strides."""
    divisibility = 128 // dtype.width
    strides = (cute.sym_int64(divisibility=divisibility), cute.sym_int64(divisibility=divisibility), 1)
    return make_fake_tensor(dtype, (num_tokens, num_heads, width), strides, assumed_align=16)


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

    def __init__(self, thread: HeadThread, inv_freq, position, rope_dim: int):
        tile = thread.tile
        self.first = (tile.width - rope_dim) // VECTOR
        self.factors = {}
        for index in range(tile.vectors):
            if (index + 1) * tile.lanes > self.first:
                pairs = cute.make_rmem_tensor(cute.make_layout(PAIRS), Float32)
                group = cutlass.min(cutlass.max(thread.vector(index) - self.first, 0), rope_dim // VECTOR - 1)
                cute.autovec_copy(cute.zipped_divide(inv_freq, (PAIRS,))[(None,), group], pairs)
                self.factors[index] = [sine_cosine(multiply(position, pairs[pair])) for pair in range(PAIRS)]

    def turned(self, thread: HeadThread, index: int, values):
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
