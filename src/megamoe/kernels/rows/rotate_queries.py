# SPDX-License-Identifier: Apache-2.0
"""rotate_queries: every head normed and rotated in registers, read once.

Meaning    ops/rotate_queries.py; this file only makes it fast
Grid       128 threads for several heads (parts/rows.py)
Memory     16-byte loads and stores; tokens may lie at any stride
Limits     C a multiple of 8 up to 32768, R one of 8
Bound      memory: 2 H C values a token
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.parts.launch import DTYPE_NAMES, as_heads, as_vector, require_width
from megamoe.kernels.rows.rotate_queries_config import Config
from megamoe.kernels.store import kernel
from megamoe.ops.rope import RopeTable


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config(dims["H"], dims["C"], dims["R"], "bf16")


def run(q: torch.Tensor, pos: torch.Tensor, table: RopeTable, eps: float) -> torch.Tensor:
    """Compute rotate_queries."""
    num_tokens, heads, width = q.shape
    y = torch.empty((num_tokens, heads, width), dtype=q.dtype, device=q.device)
    if y.numel() == 0:
        return y
    require_width("rotate_queries", width)
    require_width("rotate_queries", table.rope_dim)
    launch = kernel(Config(heads, width, table.rope_dim, DTYPE_NAMES[q.dtype]), q.device)
    launch(as_heads(q), pos, as_vector(table.inv_freq), y.view(-1, width), eps)
    return y
