# SPDX-License-Identifier: Apache-2.0
"""mean_of_streams: the mean over the streams of a token, one pass.

Meaning    ops/streams.py; this file only makes it fast
Grid       one block a token
Memory     16-byte loads and stores
Limits     D a multiple of 8 up to 32768; rows of the output 16-byte aligned
Bound      memory: (1 + X) D values a token
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.parts.launch import DTYPE_NAMES, as_rows, require_width
from megamoe.kernels.rows.streams_config import Config
from megamoe.kernels.store import kernel


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config("mean", dims["D"], dims["X"], "bf16", "bf16")


def run(x: torch.Tensor, out: torch.Tensor) -> None:
    """Compute mean_of_streams."""
    _, streams, width = x.shape
    if x.numel() == 0:
        return
    require_width("mean_of_streams", width)
    y = as_rows(out)  # the output itself, or a copy where its rows are not aligned
    kernel(Config("mean", width, streams, DTYPE_NAMES[x.dtype], DTYPE_NAMES[out.dtype]), x.device)(as_rows(x), y)
    if y.data_ptr() != out.data_ptr():
        out.copy_(y)
