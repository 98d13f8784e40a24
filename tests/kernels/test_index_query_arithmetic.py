# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of round_index_query's kernel, in exact numbers: codes two at a time, scales, signs, angles.

The kernel (kernels/rows/round_index_query_device.py) makes E2M1 codes by bf16 arithmetic, the exponent of a scale
without a division, and the Hadamard rotation by products with signs and butterflies. All bf16 numbers are tried.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from megamoe.formats.e2m1 import round_to_e2m1
from megamoe.formats.mxfp4 import quantize_groups
from megamoe.ops.hadamard import reference as hadamard

WIDTH, FLOOR_BITS = 128, 0x01C00000


def finite_bf16() -> torch.Tensor:
    """Return every finite bf16 number from 0 on."""
    return torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_the_least_of_three_lines_in_bf16_is_the_code() -> None:
    """Every magnitude up to 6 times every factor that keeps it there: what is rounded is the same number."""
    x = finite_bf16()
    x = x[x <= 6.0].float()
    lines = [(x * slope + start).bfloat16() for slope, start in ((2.0, 192.0), (1.0, 194.0), (0.5, 196.0))]
    least = torch.minimum(torch.minimum(lines[0], lines[1]), lines[2].clamp(max=199.0))
    codes = least.view(torch.int16).int() & 7
    assert torch.equal(codes, round_to_e2m1(x).int())


def test_the_exponent_of_a_scale_needs_no_division() -> None:
    amax = finite_bf16().float()
    raised = (amax.view(torch.int32).clamp(min=FLOOR_BITS) + 0x3FFFFF) >> 23
    _, scales = quantize_groups("test", amax[:, None].repeat(1, 32))
    assert torch.equal((raised - 2).to(torch.uint8), scales[:, 0].view(torch.uint8))
    assert int(raised.max()) == 255  # above 1.5 * 2^127: finite, and not to be taken for infinity
    for bits in (0x7F800000, 0x7FC00000, 0x7FFFFFFF):  # infinity and NaN, as unsigned numbers
        assert bits >> 23 == 255 and min((bits + 0x3FFFFF) >> 23, 255) == 255


def _odd(value: int) -> int:
    return bin(value).count("1") % 2


def test_signs_of_the_matrix_and_butterflies_make_the_hadamard_rotation() -> None:
    """The bits of channels are dealt to lanes, loads, pairs and instructions as the kernel's docstring says."""
    x = torch.arange(1.0, WIDTH + 1).square()  # no two channels alike; sums are exact in fp32
    found = torch.zeros(WIDTH)
    for group in range(8):  # a column of the matrix unit: the block 2 * ... + one of a pair
        partial = torch.zeros(4, 4)  # [pair][upper]
        for pair in range(4):
            for upper in range(4):
                for quarter in range(4):
                    for load in range(4):
                        sign = _odd((group >> 1) & load) ^ _odd(quarter & upper)
                        channel = 32 * load + 8 * quarter + 2 * pair
                        partial[pair, upper] += (-1) ** sign * x[channel]
                        partial[pair, upper] += (-1) ** (sign ^ (group & 1)) * x[channel + 1]
        for upper in range(4):
            a, b, c, d = partial[:, upper]
            for lower, total in enumerate(((a + b) + (c + d), (a - b) + (c - d), (a + b) - (c + d), (a - b) - (c - d))):
                found[32 * (group >> 1) + 2 * (4 * upper + lower) + (group & 1)] = total
    want = hadamard(x[None], torch.float32)[0]
    assert torch.equal(found * np.float32(WIDTH**-0.5).item(), want)


def test_three_parts_of_a_quarter_turn_reduce_angles_up_to_two_to_the_20() -> None:
    """Every step as the kernel's: an fp32 product fused with an fp32 sum (parts/rope_device.py)."""
    parts = [np.frombuffer(np.uint32(bits).tobytes(), np.float32)[0] for bits in (0x3FC90FDB, 0xB33BBD2E, 0xA6F72CED)]
    angles = torch.randint(1, 2**20, (20000,), generator=torch.Generator().manual_seed(0)).numpy().astype(np.float32)
    angles = np.concatenate((angles, angles / np.float32(1237.0), np.array([0.0, 1e-30, 2**20], np.float32)))
    turns = np.rint(angles * np.float32(2.0 / math.pi)).astype(np.float64)
    rest = angles.astype(np.float64)
    for part in parts:  # products of 24 bits by 24 are exact in fp64; so is the first difference
        rest = (rest - turns * np.float64(part)).astype(np.float32).astype(np.float64)
    assert np.abs(rest).max() < 0.9
    for function in (np.sin, np.cos):
        quadrant = turns.astype(np.int64) % 4
        reduced = function(rest + quadrant * (math.pi / 2))
        assert np.abs(reduced - function(angles.astype(np.float64))).max() < 1.5e-7
