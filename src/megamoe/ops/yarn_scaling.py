# SPDX-License-Identifier: Apache-2.0
"""How a rotary table is stretched (see rope.py); apart from it because a configuration is read without torch."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """How frequencies are stretched to reach beyond the original context.

    Attributes:
        factor: slow pairs are divided by it.
        beta_fast: pairs that turn more often than this over the original context keep their frequency.
        beta_slow: pairs that turn less often than this are divided by `factor`.
        original_max_pos: length of the original context in tokens.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_pos: int
