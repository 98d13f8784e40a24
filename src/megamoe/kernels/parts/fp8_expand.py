# SPDX-License-Identifier: Apache-2.0
"""FP8 activations for the tile kernel: codes to fp16, exact, with K dealt out as fragments; scales to fp32, turned round.

Of every 64 columns the tile kernel's lanes hold weights in 16-byte pieces (parts/fp8_device.py). Tokens meet them in the
order of the matrix instruction's steps, so value 16 t + 4 s + i of a token goes to place 16 s + 2 t + i, or
16 s + 2 t + 6 + i for i of 2 and 3.
"""

from __future__ import annotations

import dataclasses

import torch

from megamoe.kernels.parts.fp8_stream import BLOCK, scale_bytes
from megamoe.kernels.store import kernel

THREADS = 256
THREAD_VALUES = 16
PADDED_TOKENS = 128  # scales of so many tokens can be copied at once


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key: nothing, the sizes are free."""


def expand_fp8(x: torch.Tensor, x_scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Expand activations.

    Args:
        x: [T, K] uint8 codes, contiguous, K a multiple of 128.
        x_scales: [T, K/128] E8M0 or fp32, contiguous.

    Returns:
        [T, K] fp16 in the order above, and [K/128, T rounded up to 128] fp32 scales, those past T undefined; both newly
        allocated.
    """
    num_tokens, num_columns = x.shape
    padded = -(-num_tokens // PADDED_TOKENS) * PADDED_TOKENS
    values = torch.empty(num_tokens, num_columns, dtype=torch.float16, device=x.device)
    factors = torch.empty(num_columns // BLOCK, padded, dtype=torch.float32, device=x.device)
    count = num_tokens * (num_columns // THREAD_VALUES)
    launch = kernel(__name__, Config(), x.device)
    launch(x.view(-1), *scale_bytes(x_scales), values.view(-1), factors, count, num_columns // BLOCK)
    return values, factors
