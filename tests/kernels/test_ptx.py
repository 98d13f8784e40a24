# SPDX-License-Identifier: Apache-2.0
"""The reader of PTX finds a planted fault and passes what is right."""

from __future__ import annotations

from .ptx import divergent_whole_warp_instructions, instructions

HANGS = """
    mov.u32     %r2, %tid.x;
    mov.u32     %r96, %laneid;
    setp.ne.b32     %p1, %r96, 0;
    @%p1 bra    $L__BB0_2;
    shr.u32     %r97, %r2, 5;
    shfl.sync.idx.b32   %r98, %r97, 0, 31, -1;
    st.shared.b32   [%r100], %r32;
$L__BB0_2:
    bar.sync    0;
    ret;
"""
RIGHT = """
    mov.u32     %r2, %tid.x;
    mov.u32     %r96, %laneid;
    shr.u32     %r97, %r2, 5;
    shfl.sync.idx.b32   %r98, %r97, 0, 31, -1;
    setp.gt.s32     %p2, %r98, %r7;
    @%p2 bra    $L__BB0_1;
    shfl.sync.bfly.b32  %r99, %r5, 1, 31, -1;
$L__BB0_1:
    setp.ne.b32     %p1, %r96, 0;
    @%p1 bra    $L__BB0_2;
    st.shared.b32   [%r100], %r98;
$L__BB0_2:
    bar.sync    0;
    ret;
"""
OTHER_ARM = """
    mov.u32     %r1, %laneid;
    setp.lt.s32     %p1, %r1, 4;
    @%p1 bra    $L__BB0_2;
    add.s32     %r3, %r3, 1;
    bra.uni     $L__BB0_3;
$L__BB0_2:
    bar.sync    0;
$L__BB0_3:
    ret;
"""


def test_a_shuffle_that_one_lane_waits_in_is_found() -> None:
    """Seen on a GPU: the kernel never ended."""
    (problem,) = divergent_whole_warp_instructions(HANGS)
    assert "shfl.sync.idx.b32   %r98" in problem and "branch at line 5" in problem


def test_branches_that_a_whole_warp_takes_are_right() -> None:
    assert divergent_whole_warp_instructions(RIGHT) == []


def test_both_arms_are_looked_at() -> None:
    assert len(divergent_whole_warp_instructions(OTHER_ARM)) == 1


def test_instructions() -> None:
    assert instructions(OTHER_ARM)[:3] == ["mov.u32", "setp.lt.s32", "bra"]
