# SPDX-License-Identifier: Apache-2.0
"""Compile key of token_logprobs."""

from __future__ import annotations

import dataclasses

LIST = 32
"""Tokens that a block finds before the blocks compare theirs."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key: one kernel serves every vocabulary."""
