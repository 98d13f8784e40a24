# SPDX-License-Identifier: Apache-2.0
"""Launch of the expansion of FP8 activations for the tile kernel; fp8_expand_config.py has the order of K."""

from __future__ import annotations

import torch

from megamoe.kernels.fp8.fp8_expand_config import PADDED_TOKENS, THREAD_VALUES, Config
from megamoe.kernels.fp8.fp8_stream import scale_bytes
from megamoe.kernels.fp8.fp8_stream_config import BLOCK
from megamoe.kernels.store import kernel


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
    launch = kernel(Config(folded), x.device)
    launch(x.view(-1), *scale_bytes(x_scales), values.view(-1), *more, count, num_columns // BLOCK)
    return values, factors
