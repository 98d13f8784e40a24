# SPDX-License-Identifier: Apache-2.0
"""hyper_connection_pre_norm: the kernel of hyper_connection_pre, which norms what it has in registers.

Meaning    ops/hyper_connection.py; everything else as in hyper_connection/hyper_connection_pre.py
Memory     u is neither written nor read back; a second exchange in the cluster, of one sum a token and block
Limits     as hyper_connection_pre; a bf16 weight of the norm
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.hyper_connection import hyper_connection_pre
from megamoe.kernels.hyper_connection.hyper_connection_pre_config import Config


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    return hyper_connection_pre.configs(dims, norm=True)


def run(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute hyper_connection_pre_norm."""
    if weight.dtype != torch.bfloat16:
        raise NotImplementedError(
            f"hyper_connection_pre_norm: the kernel takes a bf16 weight; got {weight.dtype}. Call hyper_connection_pre "
            'and rms_norm, or run the reference: with megamoe.ops.use("reference").'
        )
    post, comb = hyper_connection_pre.mixing_outputs(x)
    y = hyper_connection_pre.collapse(
        "hyper_connection_pre_norm", x, fn, base, scale, weight, norm_eps, hc_eps, sinkhorn_iters, post, comb
    )
    return y, post, comb
