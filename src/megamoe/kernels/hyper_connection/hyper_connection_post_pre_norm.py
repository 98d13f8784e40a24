# SPDX-License-Identifier: Apache-2.0
"""hyper_connection_post_pre_norm: the kernel of hyper_connection_pre_norm, which mixes the streams it has loaded.

Meaning    ops/hyper_connection.py; everything else as in hyper_connection_pre.py. The streams are bit for
           bit those of hyper_connection_post, and the rest that of hyper_connection_pre_norm of them
Launches   one: the streams are stored and not read back
Limits     as hyper_connection_pre; bf16 sublayer outputs and a bf16 weight of the norm
Bound      memory for many tokens ((2 X + 2) D values a token); latency for few
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.hyper_connection import hyper_connection_pre
from megamoe.kernels.hyper_connection.hyper_connection_pre_config import Config


def configs(dims: Mapping[str, int]) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    for config in hyper_connection_pre.configs(dims, norm=True):
        yield dataclasses.replace(config, mixes=True)


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
    if (weight.dtype, y.dtype) != (torch.bfloat16, torch.bfloat16):
        raise NotImplementedError(
            "hyper_connection_post_pre_norm: the kernel takes a bf16 weight and a bf16 output; got "
            f"{weight.dtype} and {y.dtype}. Call hyper_connection_post, hyper_connection_pre and rms_norm, or run the "
            'reference: with megamoe.ops.use("reference").'
        )
    streams = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    post_after, comb_after = hyper_connection_pre.mixing_outputs(x)
    normed = hyper_connection_pre.collapse(
        "hyper_connection_post_pre_norm",
        x,
        fn,
        base,
        scale,
        weight,
        norm_eps,
        hc_eps,
        sinkhorn_iters,
        post_after,
        comb_after,
        hyper_connection_pre.Mixing(y, post, comb, streams),
    )
    return streams, normed, post_after, comb_after
