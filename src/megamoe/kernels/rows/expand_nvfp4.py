# SPDX-License-Identifier: Apache-2.0
"""NVFP4 activations to bf16 for the tile kernel: code * block scale * 2^-7, exact; the tensor scale is left out."""

from __future__ import annotations

import torch

from megamoe.formats.nvfp4 import BLOCK
from megamoe.kernels.rows.expand_nvfp4_config import Config
from megamoe.kernels.store import kernel


def expand_nvfp4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Expand activations.

    Args:
        codes: [T, K/2] uint8, row-major, contiguous.
        scales: [T, K/16] uint8, row-major, contiguous.

    Returns:
        [T, K] bf16, newly allocated.
    """
    num_tokens, half = codes.shape
    x = torch.empty(num_tokens, half * 2, dtype=torch.bfloat16, device=codes.device)
    kernel(Config(), codes.device)(codes.view(-1), scales.view(-1), x.view(-1), x.numel() // BLOCK)
    return x
