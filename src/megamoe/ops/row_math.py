# SPDX-License-Identifier: Apache-2.0
"""Elementwise functions and row sums whose result for a row does not depend on the rest of the tensor.

torch's own sigmoid, silu and softplus compute the last few elements of a tensor (or of a thread's share of it) with
other instructions than the rest, so the same number can give two results that differ in the last bit, by where it
stands. exp, log1p, sqrt, rsqrt, sin, cos and the four basic operations do not have this property; the functions here
are made of those. Everything is fp32.
"""

from __future__ import annotations

import torch

_TWO_PASS_ELEMENTS = 32768  # torch sums a single row of this length in parallel pieces, two rows never


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Return 1 / (1 + exp(-x))."""
    return x.neg().exp_().add_(1.0).reciprocal_()


def silu(x: torch.Tensor) -> torch.Tensor:
    """Return x / (1 + exp(-x))."""
    return x / x.neg().exp_().add_(1.0)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """Return log(1 + exp(x)) as max(x, 0) + log1p(exp(-|x|)), which neither overflows nor loses small values."""
    return x.abs().neg_().exp_().log1p_().add_(x.clamp(min=0.0))


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """Return the sum over the last dimension, kept with size 1, as fp32 with a fixed order of additions.

    Args:
        x: [..., K] fp32.
    """
    x = x.contiguous()
    if x.numel() == x.shape[-1] >= _TWO_PASS_ELEMENTS:
        rows = x.reshape(1, -1)
        return torch.cat((rows, rows)).sum(-1)[:1].reshape(*x.shape[:-1], 1)
    return x.sum(-1, keepdim=True)
