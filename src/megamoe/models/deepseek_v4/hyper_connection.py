# SPDX-License-Identifier: Apache-2.0
"""One sublayer inside its manifold-constrained hyper-connection."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megamoe.models.deepseek_v4.config import ModelConfig
from megamoe.models.deepseek_v4.weights import HyperConnectionWeights
from megamoe.ops.hyper_connection import hyper_connection_head, hyper_connection_post, hyper_connection_pre_norm


def wrap_sublayer(
    streams: torch.Tensor,
    weights: HyperConnectionWeights,
    norm_weight: torch.Tensor,
    sublayer: Callable[[torch.Tensor], torch.Tensor],
    config: ModelConfig,
) -> torch.Tensor:
    """Collapse the streams, norm, run the sublayer, and mix its output back into the streams.

    Args:
        streams: [T, X, D].
        weights: the mixing parameters of this sublayer.
        norm_weight: [D], RMSNorm before the sublayer.
        sublayer: [T, D] -> [T, D].
        config: epsilons and Sinkhorn iterations.

    Returns:
        [T, X, D], new.
    """
    normed, post, comb = hyper_connection_pre_norm(
        streams,
        weights.fn,
        weights.base,
        weights.scale,
        norm_weight,
        norm_eps=config.rms_norm_eps,
        hc_eps=config.hc_eps,
        sinkhorn_iters=config.hc_sinkhorn_iters,
    )
    return hyper_connection_post(sublayer(normed), streams, post, comb)


def collapse_streams(streams: torch.Tensor, weights: HyperConnectionWeights, config: ModelConfig) -> torch.Tensor:
    """Return the weighted sum of the streams [T, D] that the final norm reads (no Sinkhorn)."""
    return hyper_connection_head(
        streams,
        weights.fn,
        weights.base,
        weights.scale,
        norm_eps=config.rms_norm_eps,
        hc_eps=config.hc_eps,
    )
