# SPDX-License-Identifier: Apache-2.0
"""How a cluster shares a row of logits, for host and device halves."""

from __future__ import annotations

import torch

CLUSTER = 8
THREADS = 512
WARPS = THREADS // 32
HELD = 16384
"""Logits that a block keeps in shared memory."""
MAX_COLUMNS = CLUSTER * HELD


def require_columns(op: str, num_columns: int) -> None:
    """Refuse rows that a cluster cannot hold."""
    if num_columns > MAX_COLUMNS:
        raise NotImplementedError(
            f"{op}: the kernel takes up to {MAX_COLUMNS} columns; got {num_columns}. Run the reference: "
            f'with megamoe.ops.use("reference").'
        )


def as_logits(logits: torch.Tensor) -> torch.Tensor:
    """Return [T, V] with the values of a row side by side: itself, or a copy where they are not."""
    return logits if logits.stride(1) == 1 else logits.clone(memory_format=torch.contiguous_format)
