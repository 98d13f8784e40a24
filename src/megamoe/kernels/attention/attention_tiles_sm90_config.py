# SPDX-License-Identifier: Apache-2.0
"""Compile key of attention in tiles on wgmma: 64 heads a thread block."""

from __future__ import annotations

import dataclasses

from megamoe.kernels.attention import attention_tiles_config


@dataclasses.dataclass(frozen=True)
class Config(attention_tiles_config.Config):
    """The compile key: fields as in attention_tiles_config."""

    @property
    def head_tiles(self) -> int:
        """Blocks of 16 heads that a thread block has."""
        return 4
