# SPDX-License-Identifier: Apache-2.0
"""out[t] = sum over slots, ascending, of outputs[t, slot] + shared[t], in fp32 with one rounding at the end."""

from __future__ import annotations

import torch

from megamoe.kernels.experts.sum_slots_config import Config
from megamoe.kernels.parts.launch import DTYPE_NAMES
from megamoe.kernels.store import kernel


def sum_slots(
    outputs: torch.Tensor, num_slots: int, shared_output: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """Add up the experts' outputs of each token.

    Args:
        outputs: [T * A, D] bf16.
        num_slots: A.
        shared_output: [T, D] bf16 or fp32, or None.
        out_dtype: bf16 or fp32.
    """
    num_tokens, width = outputs.shape[0] // num_slots, outputs.shape[1]
    out = torch.empty(num_tokens, width, dtype=out_dtype, device=outputs.device)
    shared = None if shared_output is None else DTYPE_NAMES[shared_output.dtype]
    launch = kernel(Config(width, num_slots, shared, DTYPE_NAMES[out_dtype]), outputs.device)
    if shared_output is None:
        launch(outputs, out)
    else:
        launch(outputs, shared_output.contiguous(), out)
    return out
