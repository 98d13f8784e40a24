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

import torch

from megamoe.kernels.parts.launch import as_rows
from megamoe.kernels.router.route_tiles_config import STAGE_COLUMNS, Config
from megamoe.kernels.store import kernel

MANY_TOKENS = 1536  # beyond this number the tiles are quicker: they take as long for 2,048 tokens as for 4,096


def fits(width: int) -> bool:
    """Return whether rows of a width can be cut into stages."""
    return width % STAGE_COLUMNS == 0


def run(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Return the scores [T, E] fp32."""
    num_tokens, width = x.shape
    scores = torch.empty((num_tokens, gate.shape[0]), dtype=torch.float32, device=x.device)
    launch = kernel(Config(width, gate.shape[0]), x.device)
    launch(as_rows(x).view(torch.int32), as_rows(gate).view(torch.int32), scores)
    return scores
