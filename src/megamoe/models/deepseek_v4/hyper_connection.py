# SPDX-License-Identifier: Apache-2.0
"""One sublayer inside its manifold-constrained hyper-connection.

A sublayer's output is mixed back into the streams in the launch that makes the next sublayer's input of them. Between
two sublayers the streams are therefore `Unmixed`: those before the sublayer, and what is still to be mixed in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from megamoe.models.deepseek_v4.config import ModelConfig
from megamoe.models.deepseek_v4.weights import HyperConnectionWeights
from megamoe.ops.hyper_connection import (
    hyper_connection_head,
    hyper_connection_head_norm,
    hyper_connection_post,
    hyper_connection_post_pre_norm,
    hyper_connection_pre_norm,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Unmixed:
    """Streams and the output of a sublayer that is not mixed into them yet.

    Attributes:
        output: [T, D], of the sublayer.
        streams: [T, X, D], before the sublayer.
        post: [T, X] fp32, how much of the output each stream gets.
        comb: [T, X, X] fp32, how streams are mixed; the first X is summed.
    """

    output: torch.Tensor
    streams: torch.Tensor
    post: torch.Tensor
    comb: torch.Tensor

    def mixed(self) -> torch.Tensor:
        """Return the streams [T, X, D] after the sublayer."""
        return hyper_connection_post(self.output, self.streams, self.post, self.comb)


def wrap_sublayer(
    before: torch.Tensor | Unmixed,
    weights: HyperConnectionWeights,
    norm_weight: torch.Tensor,
    sublayer: Callable[[torch.Tensor], torch.Tensor],
    config: ModelConfig,
) -> Unmixed:
    """Collapse the streams, norm, and run the sublayer.

    Args:
        before: the streams [T, X, D], or what the sublayer before returned.
        weights: the mixing parameters of this sublayer.
        norm_weight: [D], RMSNorm before the sublayer.
        sublayer: [T, D] -> [T, D].
        config: epsilons and Sinkhorn iterations.
    """
    parameters = (weights.fn, weights.base, weights.scale, norm_weight)
    if isinstance(before, Unmixed):
        streams, normed, post, comb = hyper_connection_post_pre_norm(
            before.output,
            before.streams,
            before.post,
            before.comb,
            *parameters,
            norm_eps=config.rms_norm_eps,
            hc_eps=config.hc_eps,
            sinkhorn_iters=config.hc_sinkhorn_iters,
        )
    else:
        streams = before
        normed, post, comb = hyper_connection_pre_norm(
            streams,
            *parameters,
            norm_eps=config.rms_norm_eps,
            hc_eps=config.hc_eps,
            sinkhorn_iters=config.hc_sinkhorn_iters,
        )
    return Unmixed(sublayer(normed), streams, post, comb)


def collapse_streams(streams: torch.Tensor, weights: HyperConnectionWeights, config: ModelConfig) -> torch.Tensor:
    """Return the weighted sum of the streams [T, D] (no Sinkhorn), not normed."""
    return hyper_connection_head(
        streams,
        weights.fn,
        weights.base,
        weights.scale,
        norm_eps=config.rms_norm_eps,
        hc_eps=config.hc_eps,
    )


def head_input(
    streams: torch.Tensor,
    rows: torch.Tensor | None,
    weights: HyperConnectionWeights,
    norm_weight: torch.Tensor,
    config: ModelConfig,
) -> torch.Tensor:
    """Return what the head multiplies, [N, D], of some rows (int64 [N], -1 for nobody) of the streams, or of all."""
    return hyper_connection_head_norm(
        streams,
        weights.fn,
        weights.base,
        weights.scale,
        norm_weight,
        rows=rows,
        norm_eps=config.rms_norm_eps,
        hc_eps=config.hc_eps,
    )
