# SPDX-License-Identifier: Apache-2.0
"""embed_streams: a row of the table read once, stored to every stream.

Meaning    ops/embed_streams.py; this file only makes it fast
Grid       one block a token, or 128 threads for several short rows (parts/rows.py)
Memory     16-byte loads and stores
Limits     D a multiple of 8 up to 32768; 1 to 8 streams. It cannot raise for an id outside the table without waiting
           for the device: such a token gets zeros, as nobody does, and nothing outside the table is read
Bound      memory: (bytes of a row of the table + X * bytes of a row of y) a token
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.parts.launch import DTYPE_NAMES, as_rows, require_streams, require_width
from megamoe.kernels.rows.embed_streams_config import Config
from megamoe.kernels.store import kernel


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config(dims["D"], dims["X"], "bf16", "bf16")


def run(table: torch.Tensor, token_ids: torch.Tensor, num_streams: int, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute embed_streams."""
    num_tokens, width = token_ids.shape[0], table.shape[1]
    y = torch.empty((num_tokens, num_streams, width), dtype=out_dtype, device=table.device)
    if y.numel() == 0:
        return y
    require_streams("embed_streams", num_streams)
    require_width("embed_streams", width)
    launch = kernel(Config(width, num_streams, DTYPE_NAMES[table.dtype], DTYPE_NAMES[out_dtype]), table.device)
    launch(as_rows(table), token_ids.contiguous(), y.view(num_tokens * num_streams, width))
    return y
