# SPDX-License-Identifier: Apache-2.0
"""FP8 activations for the tile kernel, K dealt out as fragments: folded to bf16, or codes to fp16 and scales apart.

Lane t of a row holds weights in pieces of 16 bytes: from column 16 t of every 64 on, or, folded, from 32 t and
32 t + 16 of every 128. Four bytes of a piece are a step; its first decoded pair stands at places 2 t and 2 t + 1 of the
step's 16, its second at 2 t + 8 and 2 t + 9. The folding decoder pairs the first byte with the third and the second
with the fourth, the other one the first with the second.
"""

from __future__ import annotations

import dataclasses

THREADS = 256
THREAD_VALUES = 16
PADDED_TOKENS = 128  # scales of so many tokens can be copied at once


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        folded: multiply by the scales, which are powers of two, and round to bf16, exact unless out of range.
    """

    folded: bool
