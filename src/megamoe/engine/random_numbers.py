# SPDX-License-Identifier: Apache-2.0
"""Random numbers by index: number i of a request is a function of its seed and i.

Nothing is consumed in order, so the number a token is drawn with depends neither on the batch nor on how many steps it
took, nor on a preemption in between. The generator is SplitMix64 (Steele, Lea and Flood, 2014): 64 bits of state that
grow by a fixed odd number, mixed by two multiplications.
"""

from __future__ import annotations

_MASK = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def stream_of(seed: int) -> int:
    """Return the start of a seed's numbers; neighbouring seeds start far apart."""
    return _mix(seed + _STEP & _MASK)


def uniform(stream: int, index: int) -> float:
    """Return number `index` of a stream: a multiple of 2^-24 in [0, 1), exact in fp32."""
    return (_mix(stream + (index + 1) * _STEP & _MASK) >> 40) * 2.0**-24
