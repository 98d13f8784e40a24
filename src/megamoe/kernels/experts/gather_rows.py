# SPDX-License-Identifier: Apache-2.0
"""Tokens into the order of sorted pairs, so that an expert's tokens lie side by side for the copy engine.

bf16 rows are copied. NVFP4 rows become code * block scale * 2^-7 in bf16, exact, as in expand_nvfp4; their tensor
scales follow in fp32. Route weights come along: what an epilogue needs of a pair is then at its sorted position.
"""

from __future__ import annotations

import dataclasses

import torch

from megamoe.kernels.experts.gather_rows_config import Config
from megamoe.kernels.store import kernel


@dataclasses.dataclass(frozen=True)
class GatheredRows:
    """What the first product multiplies, by sorted position.

    Attributes:
        x: [pairs, K] bf16.
        tensor_scale: [pairs] fp32 of NVFP4 tokens, or None.
        route_weights: [pairs] fp32.
    """

    x: torch.Tensor
    tensor_scale: torch.Tensor | None
    route_weights: torch.Tensor


def gather_rows(x: tuple[torch.Tensor, ...], order: torch.Tensor, route_weights: torch.Tensor) -> GatheredRows:
    """Gather the token of each sorted pair.

    Args:
        x: (bf16 [T, K],), or codes [T, K/2], scales [T, K/16] as bytes and tensor scale [T]; all contiguous.
        order: [pairs] int32, a pair is token * A + slot, or T * A + token of the shared expert, whose weight is 1.
            Rows of no pair stay as they are.
        route_weights: [T, A] fp32, contiguous.
    """
    num_pairs, device = order.shape[0], order.device
    num_columns = x[0].shape[1] * (1 if len(x) == 1 else 2)
    gathered = GatheredRows(
        torch.empty(num_pairs, num_columns, dtype=torch.bfloat16, device=device),
        None if len(x) == 1 else torch.empty(num_pairs, dtype=torch.float32, device=device),
        torch.empty(num_pairs, dtype=torch.float32, device=device),
    )
    config = Config(num_columns, "bf16" if len(x) == 1 else "nvfp4")
    scales = () if gathered.tensor_scale is None else (gathered.tensor_scale,)
    kernel(config, device)(
        *x, order, route_weights.view(-1), gathered.x, *scales, gathered.route_weights, route_weights.shape[1]
    )
    return gathered
