# SPDX-License-Identifier: Apache-2.0
"""Router scores sqrt(softplus(x @ gate.T)) for many tokens, the first of the two kernels behind route_experts.

Tile       128 tokens by up to 192 experts; a cluster of blocks shares it, each with a part of K, so that a gate row is
           read once for 128 tokens and a token once for all experts of the tile
Order      the parts of K ascending: another one than that of router/route_scores.py, which takes fewer tokens
Memory     16-byte copies into a ring in shared memory, fragments by ldmatrix
Limits     x and gate bf16; D a multiple of 64
Bound      L2: (1/128 + 1/experts) D T E bytes twice, for a product that the matrix unit has done sooner
"""

from __future__ import annotations

import dataclasses

import torch

from megamoe.kernels.parts.rows import as_rows
from megamoe.kernels.store import kernel

THREADS = 256
TILE_TOKENS = 128
MAX_TILE_EXPERTS = 192  # so that two blocks share a tile of 256 or 384: of clusters of two all are resident at once
STAGES = 4
STAGE_COLUMNS = 64
ROW_BYTES = 2 * STAGE_COLUMNS  # of a stage
TOKEN_WARPS, EXPERT_WARPS = 2, 4
PADDING = 8  # floats between rows of sums
MANY_TOKENS = 1536  # beyond this number the tiles are quicker: they take as long for 2,048 tokens as for 4,096


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: D.
        experts: E.
    """

    width: int
    experts: int

    @property
    def expert_tiles(self) -> int:
        """Tiles of experts."""
        return -(-self.experts // MAX_TILE_EXPERTS)

    @property
    def tile_experts(self) -> int:
        """Experts of a tile: a multiple of 16 for each of four warps."""
        step = 16 * EXPERT_WARPS
        return -(-self.experts // (self.expert_tiles * step)) * step

    @property
    def splits(self) -> int:
        """Blocks that share a tile: four for each token tile in all, where D divides."""
        wanted = max(1, 4 // self.expert_tiles)
        return next(size for size in (4, 2, 1) if size <= wanted and self.width % (size * STAGE_COLUMNS) == 0)

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage."""
        return (TILE_TOKENS + self.tile_experts) * ROW_BYTES

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the ring, and in its place the sums of all blocks for this block's tokens."""
        return max(STAGES * self.stage_bytes, TILE_TOKENS * (self.tile_experts + PADDING) * 4)


def fits(width: int) -> bool:
    """Return whether rows of a width can be cut into stages."""
    return width % STAGE_COLUMNS == 0


def run(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Return the scores [T, E] fp32."""
    num_tokens, width = x.shape
    scores = torch.empty((num_tokens, gate.shape[0]), dtype=torch.float32, device=x.device)
    launch = kernel(__name__, Config(width, gate.shape[0]), x.device)
    launch(as_rows(x).view(torch.int32), as_rows(gate).view(torch.int32), scores)
    return scores
