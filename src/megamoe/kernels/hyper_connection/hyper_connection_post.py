# SPDX-License-Identifier: Apache-2.0
"""hyper_connection_post: mix a sublayer's output back into the streams, one pass.

Meaning    ops/hyper_connection.py; this file only makes it fast
Grid       one block a token, or 128 threads for several tokens of few channels (parts/rows.py)
Memory     16-byte loads and stores; the mixing weights of a token are read by all its threads at once
Limits     D a multiple of 8 up to 32768; 1 to 8 streams
Bound      memory: (2 X + 1) D values a token
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.hyper_connection.hyper_connection_post_config import Config
from megamoe.kernels.parts.launch import DTYPE_NAMES, as_rows, require_streams, require_width
from megamoe.kernels.store import kernel


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield Config(dims["D"], dims["X"], "bf16", "bf16")


def run(y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """Compute hyper_connection_post."""
    num_tokens, streams, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    require_streams("hyper_connection_post", streams)
    require_width("hyper_connection_post", width)
    launch = kernel(Config(width, streams, DTYPE_NAMES[x.dtype], DTYPE_NAMES[y.dtype]), x.device)
    launch(
        as_rows(y),
        as_rows(x),
        post.contiguous(),
        comb.contiguous().view(num_tokens, streams * streams),
        out.view(num_tokens * streams, width),
    )
    return out
