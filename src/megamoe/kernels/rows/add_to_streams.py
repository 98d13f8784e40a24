# SPDX-License-Identifier: Apache-2.0
"""add_to_streams: a token's row read once, added to each of its streams.

Meaning    ops/streams.py, bit for bit; this file only makes it fast
Grid       one block a token, or 128 threads for several short rows (parts/rows.py)
Memory     16-byte loads and stores
Limits     D a multiple of 8 up to 32768; 1 to 8 streams
Bound      memory: (2 X + 1) D values a token
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.parts.launch import DTYPE_NAMES, as_rows, require_streams, require_width
from megamoe.kernels.rows.add_to_streams_config import Config
from megamoe.kernels.store import kernel


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config(dims["D"], dims["X"], "bf16", "bf16")


def run(x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """Compute add_to_streams."""
    num_tokens, streams, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    require_streams("add_to_streams", streams)
    require_width("add_to_streams", width)
    launch = kernel(Config(width, streams, DTYPE_NAMES[x.dtype], DTYPE_NAMES[e.dtype]), x.device)
    launch(as_rows(x), as_rows(e), y.view(num_tokens * streams, width))
    return y
