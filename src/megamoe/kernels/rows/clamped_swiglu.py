# SPDX-License-Identifier: Apache-2.0
"""clamped_swiglu: gate and up read once, the product written once.

Meaning    ops/swiglu.py; this file only makes it fast
Grid       one block a row, or 128 threads for several short rows (parts/rows.py)
Memory     16-byte loads and stores
Limits     F a multiple of 8 up to 32768
Bound      memory: (bytes of gate + up + y) F a row
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.parts.launch import DTYPE_NAMES, as_rows, require_width
from megamoe.kernels.rows.clamped_swiglu_config import Config
from megamoe.kernels.store import kernel


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table: the shared expert, clamped, weight 1."""
    yield Config(dims["F"], "bf16", "bf16", "bf16", clamped=True, weighted=False)


def run(
    gate: torch.Tensor,
    up: torch.Tensor,
    limit: float | None,
    row_weight: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute clamped_swiglu."""
    width = gate.shape[-1]
    y = torch.empty(gate.shape, dtype=out_dtype, device=gate.device)
    if y.numel() == 0:
        return y
    require_width("clamped_swiglu", width)
    names = (DTYPE_NAMES[gate.dtype], DTYPE_NAMES[up.dtype], DTYPE_NAMES[out_dtype])
    launch = kernel(Config(width, *names, limit is not None, row_weight is not None), gate.device)
    weight = () if row_weight is None else (row_weight.contiguous(),)
    launch(as_rows(gate), as_rows(up), *weight, y, 0.0 if limit is None else limit)
    return y
