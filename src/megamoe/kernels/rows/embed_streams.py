# SPDX-License-Identifier: Apache-2.0
"""embed_streams: rows of a table, each read once and written into every stream.

Meaning    ops/embed_streams.py; this file only makes it fast
Grid       one block a token
Memory     16-byte loads and stores
Limits     D a multiple of 8 up to 32768
Bound      memory: (1 + X) D values a token
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.parts.launch import DTYPE_NAMES, as_rows, require_width
from megamoe.kernels.rows.embed_streams_config import Config
from megamoe.kernels.store import kernel


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config(dims["D"], dims["X"], "bf16", "bf16")


def run(table: torch.Tensor, token_ids: torch.Tensor, num_streams: int, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute embed_streams."""
    num_tokens, width = token_ids.shape[0], table.shape[1]
    y = torch.empty((num_tokens, num_streams, width), dtype=out_dtype, device=token_ids.device)
    if y.numel() == 0:
        return y
    require_width("embed_streams", width)
    launch = kernel(Config(width, num_streams, DTYPE_NAMES[table.dtype], DTYPE_NAMES[out_dtype]), y.device)
    launch(as_rows(table), token_ids, y.view(-1, width))
    return y
