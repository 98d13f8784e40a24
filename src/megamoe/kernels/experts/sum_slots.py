# SPDX-License-Identifier: Apache-2.0
"""out[t] = sum over slots, ascending, of outputs[t, slot] + shared[t], in fp32 with one rounding at the end."""

from __future__ import annotations

import torch

from megamoe.kernels.experts.sum_slots_config import Config
from megamoe.kernels.parts.launch import DTYPE_NAMES
from megamoe.kernels.store import kernel


def sum_slots(
    outputs: torch.Tensor,
    expert_ids: torch.Tensor,
    num_experts: int,
    shared_output: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Add up the experts' outputs of each token.

    Args:
        outputs: [T * A, D] bf16; rows whose id is no expert of ours are not read.
        expert_ids: [T, A] int64, contiguous, and written before the two kernels ahead of this one: they are read
            while the one ahead is still running. The rows of tokens with nothing but -1, which are nobody, become 0.
        num_experts: E.
        shared_output: [T, D] bf16 or fp32, or None; rows of nobody are not read.
        out_dtype: bf16 or fp32.
    """
    (num_tokens, num_slots), width = expert_ids.shape, outputs.shape[1]
    out = torch.empty(num_tokens, width, dtype=out_dtype, device=outputs.device)
    shared = None if shared_output is None else DTYPE_NAMES[shared_output.dtype]
    launch = kernel(Config(width, num_slots, shared, DTYPE_NAMES[out_dtype]), outputs.device)
    more = () if shared_output is None else (shared_output.contiguous(),)
    launch(outputs, *more, expert_ids.view(-1), out, num_experts)
    return out
