# SPDX-License-Identifier: Apache-2.0
"""FP8 activations for the tile kernel, K dealt out as fragments: folded to bf16, or codes to fp16 and scales apart.

Lane t of a row holds weights in pieces of 16 bytes: from column 16 t of every 64 on, or, folded, from 32 t and
32 t + 16 of every 128. Four bytes of a piece are a step; its first decoded pair stands at places 2 t and 2 t + 1 of the
step's 16, its second at 2 t + 8 and 2 t + 9. The folding decoder pairs the first byte with the third and the second
with the fourth, the other one the first with the second.
"""

from __future__ import annotations

import dataclasses

import torch

from megamoe.kernels.fp8.fp8_stream import BLOCK, scale_bytes
from megamoe.kernels.store import kernel

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


def expand_fp8(x: torch.Tensor, x_scales: torch.Tensor, folded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Expand activations.

    Args:
        x: [T, K] uint8 codes, contiguous, K a multiple of 128.
        x_scales: [T, K/128] E8M0 or fp32, contiguous.
        folded: as in Config.

    Returns:
        [T, K] bf16 or fp16 in the order above, and fp32 scales [K/128, T rounded up to 128], those past T undefined, or
        an empty tensor where they are folded.
    """
    num_tokens, num_columns = x.shape
    padded = -(-num_tokens // PADDED_TOKENS) * PADDED_TOKENS
    values = torch.empty(num_tokens, num_columns, dtype=torch.bfloat16 if folded else torch.float16, device=x.device)
    factors = torch.empty(0 if folded else num_columns // BLOCK, padded, dtype=torch.float32, device=x.device)
    count = num_tokens * (num_columns // THREAD_VALUES)
    more = () if folded else (factors,)
    launch = kernel(__name__, Config(folded), x.device)
    launch(x.view(-1), *scale_bytes(x_scales), values.view(-1), *more, count, num_columns // BLOCK)
    return values, factors
