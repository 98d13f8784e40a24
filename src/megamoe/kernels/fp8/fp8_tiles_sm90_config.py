# SPDX-License-Identifier: Apache-2.0
"""Compile key of fp8_linear for many tokens."""

from __future__ import annotations

import dataclasses

from megamoe.kernels.fp8.fp8_stream_config import BLOCK

CONSUMERS = 256
THREADS = CONSUMERS + 128
SHARED_BYTES = 208 * 1024  # for stages
MAX_STAGES = 6
GROUP_ROWS = 128  # rows of one wgmma of both consumer warpgroups
UNDO = 2.0**7  # folded weights are held times 2^-7, so that the factor of their bytes stays in bf16's range


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        block_rows: weight rows of a tile, 128 or 256 (folded alone).
        block_tokens: tokens of a tile, 64 or 128.
        folded: scales are part of the bf16 operands.
        out: "bf16" or "f32".
    """

    block_rows: int
    block_tokens: int
    folded: bool
    out: str

    @property
    def stage_bytes(self) -> int:
        """Bytes of 128 columns of a tile's operands."""
        return BLOCK * (2 * self.block_tokens + (self.block_rows if self.folded else 0))

    @property
    def stages(self) -> int:
        """Stages in shared memory."""
        return min(MAX_STAGES, SHARED_BYTES // self.stage_bytes)
