# SPDX-License-Identifier: Apache-2.0
"""Router scores sqrt(softplus(x @ gate.T)), the first of the two kernels behind route_experts.

Grid       (ceil(E / experts), ceil(T / tokens)), 8 warps that share K; their parts are added in ascending order, so
           that a token's scores do not depend on the tile it falls into
Product    bf16 on the warp's matrix unit, fp32 accumulation (parts/mma_device.py)
Limits     x and gate bf16; D a multiple of 32
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megamoe.kernels.parts.launch import as_rows
from megamoe.kernels.router.route_scores_config import Config
from megamoe.kernels.store import kernel

SMALL_TOKENS = 64  # up to here small tiles: enough blocks to read the gate with


def tiles(num_tokens: int) -> tuple[int, int]:
    """Return (row_tiles, token_tiles) for a number of tokens."""
    return (1, 1) if num_tokens <= SMALL_TOKENS else (4, 4)


def configs(width: int, experts: int) -> Iterator[Config]:
    """Yield both tile sizes."""
    for num_tokens in (1, SMALL_TOKENS + 1):
        yield Config(width, experts, *tiles(num_tokens))


def run(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Return the scores [T, E] fp32."""
    num_tokens, width = x.shape
    scores = torch.empty((num_tokens, gate.shape[0]), dtype=torch.float32, device=x.device)
    launch = kernel(Config(width, gate.shape[0], *tiles(num_tokens)), x.device)
    launch(as_rows(x).view(torch.int32), as_rows(gate).view(torch.int32), scores)
    return scores
