# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the NVFP4 quantizer, in exact numbers: a cheap division and a rounding trick change no code.

The kernel (kernels/parts/nvfp4_device.py) does not divide each value by its step. It takes r = 1 / step, rounded, and
refines x * r once. Whether that decides a code otherwise than the rounded quotient can only depend on quotients next
to a threshold of E2M1, or next to a midpoint of two fp32 numbers there. For x with 8 significant bits these are few:
each (threshold, neighbour, x) leaves a handful of steps, and all are tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch

from megamoe.formats.e2m1 import round_to_e2m1

THRESHOLDS = [Fraction(n, 4) for n in (1, 3, 5, 7, 10, 14, 20)]


def exponent(x: Fraction) -> int:
    """Return e with 2^e <= x < 2^(e + 1)."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def rounded(x: Fraction) -> Fraction:
    """Return x rounded to 24 significant bits, ties to even."""
    if x == 0:
        return x
    size = abs(x)
    unit = Fraction(2) ** (exponent(size) - 23)
    quotient = size / unit
    whole, rest = floor(quotient), quotient - floor(quotient)
    whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
    return (1 if x > 0 else -1) * whole * unit


def refined(x: Fraction, step: Fraction, refinements: int = 1) -> Fraction:
    """Return the kernel's quotient: every operation rounded once, fma without intermediate rounding."""
    inverse = rounded(1 / step)
    quotient = rounded(x * inverse)
    for _ in range(refinements):
        quotient = rounded(quotient + rounded(x - quotient * step) * inverse)
    return quotient


def cases(spread: int = 3) -> Iterator[tuple[Fraction, Fraction]]:
    """Yield x of 8 bits and steps of 24 bits whose quotient lies next to a threshold or a neighbouring midpoint."""
    for threshold in THRESHOLDS:
        e = exponent(threshold)
        unit = Fraction(2) ** (e - 23)
        below = unit / 4 if threshold == Fraction(2) ** e else unit / 2
        for point in (threshold - below, threshold, threshold + unit / 2):
            for significand in range(128, 256):
                exact = Fraction(significand) / point
                shift = 23 - exponent(exact)
                near = floor(exact * Fraction(2) ** shift)
                for step in range(near - spread, near + spread + 2):
                    if 2**23 <= step < 2**24:
                        yield Fraction(significand) * Fraction(2) ** shift, Fraction(step)


def test_one_refinement_is_the_rounded_quotient_next_to_every_threshold() -> None:
    count = 0
    for x, step in cases():
        assert refined(x, step) == rounded(x / step), (x, step)
        count += 1
    assert count > 20_000


def test_without_refinement_codes_would_differ() -> None:
    """The check can fail: x * r alone is wrong next to thresholds."""
    wrong = sum(refined(x, step, refinements=0) != rounded(x / step) for x, step in cases(spread=1))
    assert wrong > 100


def magic_code(x: np.ndarray) -> np.ndarray:
    """Return the E2M1 magnitude code by the kernel's additions (kernels/parts/ptx_device.py, e2m1_magnitude)."""
    bits = x.view(np.int32)
    binade = np.maximum(bits & 0x7F800000, 0x3F800000)
    magic = binade + 0x0B400000
    total = (magic.view(np.float32) + x).view(np.int32)
    return total - magic + (binade >> 22) - 254


def test_the_rounding_trick_gives_every_code() -> None:
    thresholds = np.array([float(one) for one in THRESHOLDS], dtype=np.float32)
    near = np.concatenate([thresholds.view(np.int32) + offset for offset in range(-4, 5)]).view(np.float32)
    spread = np.linspace(0.0, 6.0, 200_001, dtype=np.float32)
    tiny = np.array([0.0, 1e-45, 1e-38, 2.0**-126, 0.1], dtype=np.float32)
    x = np.concatenate([near, spread, tiny, np.array([6.0, 4.0, 2.0], dtype=np.float32)])
    np.testing.assert_array_equal(magic_code(x), round_to_e2m1(torch.from_numpy(x)).numpy())


@pytest.mark.parametrize("constant", [0x0AC00000, 0x0BC00000])
def test_another_constant_would_not(constant: int) -> None:
    x = np.linspace(0.0, 6.0, 1001, dtype=np.float32)
    binade = np.maximum(x.view(np.int32) & 0x7F800000, 0x3F800000)
    magic = binade + constant
    codes = (magic.view(np.float32) + x).view(np.int32) - magic + (binade >> 22) - 254
    assert (codes != round_to_e2m1(torch.from_numpy(x)).numpy()).any()
