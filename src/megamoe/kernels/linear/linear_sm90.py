# SPDX-License-Identifier: Apache-2.0
"""linear on Hopper for bf16 weights: tiles on wgmma for any number of tokens.

Meaning    ops/linear.py; this file only makes it fast
Kernel     weight_tiles_sm90.py: small tiles for few tokens, which wait for the weight's bytes, large ones for many
Order      one path: products of 16 columns at a time in ascending order, whatever the tile
Limits     x and w bf16; K a multiple of 8
Bound      few tokens: the weight's bytes, 2 a value; many: the tensor cores
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.kernels.linear.weight_tiles_sm90 import plain_tile_linear, require_bf16, tile_keys
from megamoe.kernels.parts.launch import aligned


def configs(dims: Mapping[str, int]) -> Iterator[Any]:
    """Yield what a model needs for one entry of its shape table."""
    for out in ("bf16", "f32"):  # attention, and everything that is summed or compared in fp32 afterwards
        yield from tile_keys("bf16", False, out)


def run(x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute linear."""
    require_bf16("linear", x, w, 8)
    return plain_tile_linear(aligned(x), aligned(w), out_dtype)
