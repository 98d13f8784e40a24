# SPDX-License-Identifier: Apache-2.0
"""hyper_connection_head_norm: rows are gathered, collapsed by the kernel of hyper_connection_head, and normed.

Meaning    ops/hyper_connection.py; everything else as in the files named
Launches   three, or two where all rows are wanted. A row of nobody is gathered as zeros, and zeros stay zeros
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.kernels.hyper_connection import hyper_connection_head
from megamoe.kernels.rows import embed_streams, rms_norm
from megamoe.kernels.rows.embed_streams_config import Config as GatherConfig
from megamoe.kernels.rows.rms_norm_config import Config as NormConfig


def configs(dims: Mapping[str, int]) -> Iterator[Any]:
    """Yield what a model needs for one entry of its shape table."""
    yield from hyper_connection_head.configs(dims)
    yield GatherConfig(dims["X"] * dims["D"], 1, "bf16", "bf16")
    yield NormConfig(dims["D"], "bf16", "bf16", "bf16")


def run(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor | None,
    norm_eps: float,
    hc_eps: float,
) -> torch.Tensor:
    """Compute hyper_connection_head_norm."""
    if rows is not None:
        x = embed_streams.run(x.flatten(1), rows, 1, x.dtype).view(rows.shape[0], *x.shape[1:])
    h = hyper_connection_head.run(x, fn, base, scale, norm_eps, hc_eps)
    return rms_norm.run(h, weight, norm_eps, h.dtype)
