# SPDX-License-Identifier: Apache-2.0
"""hyper_connection_post_pre_norm: the kernel of one sublayer's end, then that of the next one's beginning.

Meaning    ops/hyper_connection.py; bit for bit hyper_connection_post, then hyper_connection_pre_norm, two launches
Memory     the mixed streams, which are a result, are written by the first and read back by the second: from the L2
           cache where a step has few tokens
Limits     those of both
Bound      memory: (2 X + 2) D values a token, and X D that are read back
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.kernels.hyper_connection import hyper_connection_post, hyper_connection_pre_norm


def configs(dims: Mapping[str, int]) -> Iterator[Any]:
    """Yield what a model needs for one entry of its shape table."""
    yield from hyper_connection_post.configs(dims)
    yield from hyper_connection_pre_norm.configs(dims)


def run(
    y: torch.Tensor,
    x: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute hyper_connection_post_pre_norm."""
    streams = hyper_connection_post.run(y, x, post, comb)
    return streams, *hyper_connection_pre_norm.run(streams, fn, base, scale, weight, norm_eps, hc_eps, sinkhorn_iters)
