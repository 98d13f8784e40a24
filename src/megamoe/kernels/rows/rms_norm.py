# SPDX-License-Identifier: Apache-2.0
"""rms_norm: one pass over the rows, each held in the registers of the threads that share it.

Meaning    ops/rms_norm.py; this file only makes it fast
Grid       one block a row, or 128 threads for several short rows (parts/rows.py)
Memory     16-byte loads and stores; a float per warp of shared memory where a row is wider than a warp's share
Limits     K a multiple of 8 up to 32768
Bound      memory: K * (bytes of x + bytes of y) a row
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.parts.launch import DTYPE_NAMES, as_rows, as_vector, require_width
from megamoe.kernels.rows.rms_norm_config import Config
from megamoe.kernels.store import kernel


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config(dims["K"], "bf16", "bf16", "bf16")
    if "H" in dims:  # the norm of the queries has no weight
        yield Config(dims["K"], "bf16", None, "bf16")


def run(x: torch.Tensor, weight: torch.Tensor | None, eps: float, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute rms_norm."""
    width = x.shape[-1]
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return y
    require_width("rms_norm", width)
    weight_name = None if weight is None else DTYPE_NAMES[weight.dtype]
    launch = kernel(Config(width, DTYPE_NAMES[x.dtype], weight_name, DTYPE_NAMES[out_dtype]), x.device)
    if weight is None:
        launch(as_rows(x), y.view(-1, width), eps)
    else:
        launch(as_rows(x), as_vector(weight), y.view(-1, width), eps)
    return y
