# SPDX-License-Identifier: Apache-2.0
"""mean_of_streams, add_to_streams: what drafts read from the residual streams, and put into them.

Math       mean_of_streams: y[t, :] = (sum_j x[t, j, :]) / X
           add_to_streams:  y[t, j, :] = x[t, j, :] + e[t, :]         for every stream j
Numerics   fp32 sums, streams in ascending order; the mean divides once; one rounding to the dtype of x.
           Row-invariant.
Tolerance  verify/tolerance.py, "mean_of_streams", "add_to_streams": exact, every operation is a rounded one of fp32
Kernels    one pass each, bit for bit
Source     DeepSeek-V4 inference code: the targets of DSpark, and the input of a classic draft stage
"""

from __future__ import annotations

import torch

from megamoe.formats.division import divide
from megamoe.ops.check import FLOATS, check
from megamoe.ops.dispatch import pick


def mean_of_streams(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean of the streams.

    Args:
        x: [T, X, D] bf16 or fp32, X at least 1. T may be 0.
        out: [T, D] in the dtype of x, where the mean goes; tokens may lie at any stride, so that several layers' means
            stand side by side in one tensor. None for a new tensor.

    Returns:
        `out`, or [T, D] in the dtype of x, newly allocated.

    Raises:
        TypeError: x is not bf16 or fp32, or out has another dtype.
        ValueError: a shape is not as above.
        NotImplementedError: the device has no kernel for this operation.
    """
    dims = check("mean_of_streams", x=(x, "T X D", FLOATS), out=(out, "?T D", (x.dtype,)))
    if dims["X"] < 1:
        raise ValueError(f"mean_of_streams: x must have at least one stream; got {list(x.shape)}. Pass [T, X, D].")
    y = torch.empty(x.shape[0], x.shape[2], dtype=x.dtype, device=x.device) if out is None else out
    pick("mean_of_streams", x.device, reference_mean)(x, y)
    return y


def add_to_streams(x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """Add one row per token to all of its streams.

    Args:
        x: [T, X, D] bf16 or fp32. T may be 0.
        e: [T, D] bf16 or fp32.

    Returns:
        [T, X, D] in the dtype of x, contiguous, newly allocated.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above.
        NotImplementedError: the device has no kernel for this operation.
    """
    check("add_to_streams", x=(x, "T X D", FLOATS), e=(e, "T D", FLOATS))
    y: torch.Tensor = pick("add_to_streams", x.device, reference_add)(x, e)
    return y


def reference_mean(x: torch.Tensor, out: torch.Tensor) -> None:
    """Compute mean_of_streams in plain torch."""
    total = x[:, 0].float()
    for stream in range(1, x.shape[1]):
        total = total + x[:, stream].float()
    out.copy_(divide(total, x.shape[1]))


def reference_add(x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """Compute add_to_streams in plain torch."""
    return (e[:, None, :].float() + x.float()).to(x.dtype)
