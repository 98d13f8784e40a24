# SPDX-License-Identifier: Apache-2.0
"""Random numbers by index: number i of a request is a function of its seed and i.

Nothing is consumed in order, so the number a token is drawn with depends neither on the batch nor on how many steps it
took, nor on a preemption in between. The generator is Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random
numbers: as easy as 1, 2, 3", 2011): ten rounds of two 32-bit multiplications on a counter, with a key. The key is the
seed and the counter the index, so a device computes any number from two integers and keeps no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Word = TypeVar("Word", int, npt.NDArray[Any])

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_FEW = 24  # pairs that integers compute faster (7 us each) than arrays (180 us for any number)


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Return the four 32-bit words of Philox 4x32-10.

    Args:
        counter: four words, least significant first: integers below 2^32, or uint64 arrays of them.
        key: two words, least significant first.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(_ROUNDS):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = high >> 32 ^ c1 ^ k0, high & _MASK, low >> 32 ^ c3 ^ k1, low & _MASK
        k0, k1 = k0 + _KEY_STEPS[0] & _MASK, k1 + _KEY_STEPS[1] & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, index: int) -> float:
    """Return number `index` of a seed: a multiple of 2^-24 in [0, 1), exact in fp32.

    It is the upper 24 bits of the first word of the counter (index mod 2^32, index div 2^32, 0, 0) under the key
    (seed mod 2^32, seed div 2^32). Both are below 2^64.
    """
    word = philox((index & _MASK, index >> 32, 0, 0), (seed & _MASK, seed >> 32))[0]
    return (word >> 8) * 2.0**-24


def uniforms(seeds: Sequence[int], indices: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return `uniform` of every pair, [N] fp32."""
    if len(seeds) < _FEW:
        return np.array([uniform(*pair) for pair in zip(seeds, indices, strict=True)], dtype=np.float32)
    seed, index = np.array(seeds, dtype=np.uint64), np.array(indices, dtype=np.uint64)
    zero = np.zeros_like(index)
    word = philox((index & _MASK, index >> 32, zero, zero), (seed & _MASK, seed >> 32))[0]
    return (word >> 8).astype(np.float32) * np.float32(2.0**-24)
