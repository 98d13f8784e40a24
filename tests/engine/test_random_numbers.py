# SPDX-License-Identifier: Apache-2.0
"""Numbers by index: the published generator, even, and different for neighbouring seeds."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megamoe.engine.random_numbers import philox, uniform, uniforms

# Known answers of the generator's authors (Random123, kat_vectors): counter, key, output.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_the_generator_is_philox_4x32_10(counter: list[int], key: list[int], output: list[int]) -> None:
    assert philox(tuple(counter), tuple(key)) == tuple(output)
    arrays = [np.full(3, word, dtype=np.uint64) for word in counter + key]
    words = philox(tuple(arrays[:4]), tuple(arrays[4:]))
    assert [word.tolist() for word in words] == [[word] * 3 for word in output]


def test_a_number_is_the_upper_24_bits_of_the_first_word() -> None:
    assert uniform(0, 0) == (0x6627E8D5 >> 8) / 2**24
    assert uniform(0x299F31D0A4093822, 5) == (philox((5, 0, 0, 0), (0xA4093822, 0x299F31D0))[0] >> 8) / 2**24
    assert uniform(7, 2**32 + 9) == (philox((9, 1, 0, 0), (7, 0))[0] >> 8) / 2**24


@pytest.mark.parametrize("count", [0, 1, 23, 24, 100])
def test_many_numbers_are_the_single_ones(count: int) -> None:
    seeds = [(2**63 - 1) * i // 100 for i in range(count)]
    indices = [2**33 * i // 50 for i in range(count)]
    numbers = uniforms(seeds, indices)
    assert numbers.dtype == np.float32 and numbers.tolist() == [
        uniform(*pair) for pair in zip(seeds, indices, strict=True)
    ]


def test_numbers_are_24_bit_fractions() -> None:
    numbers = uniforms([5] * 2000, range(2000))
    assert all(0.0 <= number < 1.0 and (number * 2**24).is_integer() for number in numbers.tolist())
    assert len(set(numbers.tolist())) > 1990


def test_numbers_are_even_along_an_index_and_across_seeds() -> None:
    """Chi-square over 20 cells, 19 degrees of freedom: 43.8 is exceeded once in a thousand."""
    count = 20_000
    along, across = uniforms([1] * count, range(count)), uniforms(range(count + 1), [0] * (count + 1))
    pairs = (across[:-1] + across[1:]) % 1
    for numbers in (along, across[:-1], pairs):
        counts = Counter((20 * numbers).astype(int).tolist())
        assert sum((counts[cell] - 1000) ** 2 / 1000 for cell in range(20)) < 43.8


def test_the_largest_seed_works() -> None:
    assert uniform(2**63 - 1, 10**9) != uniform(0, 10**9)
