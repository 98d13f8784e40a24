# SPDX-License-Identifier: Apache-2.0
"""mean_of_streams: the streams of a token read once, their mean stored where the caller wants it.

Meaning    ops/streams.py, bit for bit; this file only makes it fast
Grid       one block a token, or 128 threads for several short rows (parts/rows.py)
Memory     16-byte loads and stores; a second launch copies the mean where rows of `out` are not aligned to 16 bytes
Limits     D a multiple of 8 up to 32768; 1 to 8 streams
Bound      memory: (X + 1) D values a token
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.parts.launch import DTYPE_NAMES, as_rows, has_aligned_rows, require_streams, require_width
from megamoe.kernels.rows.mean_of_streams_config import Config
from megamoe.kernels.store import kernel


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config(dims["D"], dims["X"], "bf16")


def run(x: torch.Tensor, out: torch.Tensor) -> None:
    """Compute mean_of_streams."""
    _, streams, width = x.shape
    if x.numel() == 0:
        return
    require_streams("mean_of_streams", streams)
    require_width("mean_of_streams", width)
    launch = kernel(Config(width, streams, DTYPE_NAMES[x.dtype]), x.device)
    mean = out if has_aligned_rows(out) else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    launch(as_rows(x), mean)
    if mean is not out:
        out.copy_(mean)
