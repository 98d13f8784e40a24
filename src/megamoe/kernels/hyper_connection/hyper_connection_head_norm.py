# SPDX-License-Identifier: Apache-2.0
"""hyper_connection_head_norm: rows gathered, collapsed and normed by three kernels, one after the other.

Meaning    ops/hyper_connection.py; bit for bit hyper_connection_head, then rms_norm, of the rows
Grid       three launches, or two where no rows are named; few rows, one a sequence, so that launches are what counts
Memory     the gather is embed_streams over tokens instead of a vocabulary, all streams of one a row of its table
Limits     those of the three; X D at most 32768 where rows are named. It cannot raise for a row outside the tokens
           without waiting for the device: such a row gets zeros, as nobody's does
Bound      latency for few rows; memory: (X + 1) D values a row, and (2 X + 2) D between the launches
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.kernels.hyper_connection import hyper_connection_head
from megamoe.kernels.rows import embed_streams, rms_norm


def configs(dims: Mapping[str, int]) -> Iterator[Any]:
    """Yield what a model needs for one entry of its shape table."""
    width = dims["D"]
    yield from embed_streams.configs({"D": dims["X"] * width, "X": 1})
    yield from hyper_connection_head.configs(dims)
    yield from rms_norm.configs({"K": width})


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
        num_tokens, streams, width = x.shape
        flat = x.reshape(num_tokens, streams * width)
        x = embed_streams.run(flat, rows, 1, x.dtype).view(-1, streams, width)
    return rms_norm.run(hyper_connection_head.run(x, fn, base, scale, norm_eps, hc_eps), weight, norm_eps, x.dtype)
