# SPDX-License-Identifier: Apache-2.0
"""hyper_connection_head: the kernel of hyper_connection_pre without Sinkhorn and its outputs.

Meaning    ops/hyper_connection.py; everything else as in hyper_connection/hyper_connection_pre.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.hyper_connection import hyper_connection_pre
from megamoe.kernels.hyper_connection.hyper_connection_pre_config import Config


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    return hyper_connection_pre.configs(dims, sinkhorn_iters=0)


def run(
    x: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, norm_eps: float, hc_eps: float
) -> torch.Tensor:
    """Compute hyper_connection_head."""
    return hyper_connection_pre.collapse(
        "hyper_connection_head", x, fn, base, scale, None, norm_eps, hc_eps, 0, None, None
    )
