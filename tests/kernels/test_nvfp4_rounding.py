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


def code_by_lines(x: np.ndarray, lowest: int = 12582912) -> np.ndarray:
    """Return the E2M1 magnitude code by the kernel's additions (kernels/parts/ptx_device.py, e2m1_bits).

    Products by a power of two are exact, and a sum in fp64 of fp32 values of these sizes is rounded once to fp32.
    """
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        low, middle, high = (
            line.astype(np.float32) for line in (2 * wide + lowest, wide + (lowest + 2), wide / 2 + (lowest + 4))
        )
    least = np.minimum(np.minimum(low, middle), np.minimum(high, np.float32(lowest + 7)))
    return least.view(np.int32) - 0x4B400000


def magnitudes() -> np.ndarray:
    thresholds = np.array([float(one) for one in THRESHOLDS], dtype=np.float32)
    near = np.concatenate([thresholds.view(np.int32) + offset for offset in range(-4, 5)]).view(np.float32)
    spread = np.linspace(0.0, 6.0, 200_001, dtype=np.float32)
    tiny = np.array([0.0, 1e-45, 1e-38, 2.0**-126, 0.1], dtype=np.float32)
    return np.concatenate([near, spread, tiny, np.array([6.0, 4.0, 2.0], dtype=np.float32)])


def test_the_rounding_trick_gives_every_code() -> None:
    x = magnitudes()
    np.testing.assert_array_equal(code_by_lines(x), round_to_e2m1(torch.from_numpy(x)).numpy())


def test_the_rounding_trick_saturates() -> None:
    x = np.array([6.5, 7.0, 7.5, 8.0, 1e6, 3e38], dtype=np.float32)
    np.testing.assert_array_equal(code_by_lines(x), np.full(6, 7))


@pytest.mark.parametrize("lowest", [12582912 // 2, 12582913])
def test_another_constant_would_not(lowest: int) -> None:
    x = magnitudes()
    assert (code_by_lines(x, lowest) != round_to_e2m1(torch.from_numpy(x)).numpy()).any()


def test_signs_land_on_their_codes() -> None:
    """The byte shuffles of kernels/parts/nvfp4_device.py, pair_signs, in Python."""

    def gathered(a: int, b: int, selector: int) -> int:
        data = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        return int.from_bytes(bytes(data[selector >> 4 * place & 15] for place in range(4)), "little")

    generator = np.random.default_rng(0)
    for words in generator.integers(0, 2**32, (200, 4)).tolist():
        first, second = gathered(words[0], words[1], 0x7351), gathered(words[2], words[3], 0x7351)
        low, high = gathered(first, second, 0x5410), gathered(first, second, 0x7632)
        signs = low >> 4 & 0x08080808 | high & 0x80808080
        values = [word >> 16 * half & 0xFFFF for word in words for half in range(2)]
        assert signs == sum((value >> 15) << 4 * place + 3 for place, value in enumerate(values))
