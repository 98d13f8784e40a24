# SPDX-License-Identifier: Apache-2.0
"""Numbers by index: the published generator, even, and different for neighbouring seeds."""

from __future__ import annotations

from collections import Counter

from megamoe.engine.random_numbers import _STEP, _mix, stream_of, uniform


def test_the_generator_is_splitmix64() -> None:
    """The first outputs for state 1234567 in the algorithm's published form: state += step, then mix."""
    states = [1234567 + _STEP * n & 2**64 - 1 for n in (1, 2, 3)]
    assert [_mix(state) for state in states] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_numbers_are_24_bit_fractions() -> None:
    numbers = [uniform(stream_of(5), index) for index in range(2000)]
    assert all(0.0 <= number < 1.0 and (number * 2**24).is_integer() for number in numbers)
    assert len(set(numbers)) > 1990


def test_numbers_are_even_along_an_index_and_across_seeds() -> None:
    """Chi-square over 20 cells, 19 degrees of freedom: 43.8 is exceeded once in a thousand."""
    along = Counter(int(20 * uniform(stream_of(1), index)) for index in range(20_000))
    across = Counter(int(20 * uniform(stream_of(seed), 0)) for seed in range(20_000))
    pairs = Counter(int(20 * ((uniform(stream_of(s), 0) + uniform(stream_of(s + 1), 0)) % 1)) for s in range(20_000))
    for counts in (along, across, pairs):
        assert sum((counts[cell] - 1000) ** 2 / 1000 for cell in range(20)) < 43.8


def test_the_largest_seed_works() -> None:
    assert uniform(stream_of(2**63 - 1), 10**9) != uniform(stream_of(0), 10**9)
