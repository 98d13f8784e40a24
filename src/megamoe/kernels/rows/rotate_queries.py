# SPDX-License-Identifier: Apache-2.0
"""rotate_queries: every head read once, normed, rotated in registers and stored.

Meaning    ops/rotate_queries.py; this file only makes it fast
Grid       blocks of 128 threads with several heads of one token (parts/rows.py); a thread takes part in two of them,
           whose sines and cosines it computes once
Memory     16-byte loads and stores
Limits     C a multiple of 8 up to 1024, R a multiple of 8; positions up to 2^20 keep the precision of the angle
Bound      memory: 2 H C values a token
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.parts.launch import DTYPE_NAMES, as_heads, as_vector, require_heads
from megamoe.kernels.parts.records import RopeTable
from megamoe.kernels.rows.rotate_queries_config import Config
from megamoe.kernels.store import kernel

PASSES = 2


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config(dims["H"], dims["C"], dims["R"], "bf16", PASSES)


def run(q: torch.Tensor, pos: torch.Tensor, table: RopeTable, eps: float) -> torch.Tensor:
    """Compute rotate_queries."""
    num_tokens, num_heads, width = q.shape
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if y.numel() == 0:
        return y
    require_heads("rotate_queries", width, table.rope_dim)
    launch = kernel(Config(num_heads, width, table.rope_dim, DTYPE_NAMES[q.dtype], PASSES), q.device)
    launch(as_heads(q), pos.contiguous(), as_vector(table.inv_freq), y.view(num_tokens * num_heads, width), eps)
    return y
