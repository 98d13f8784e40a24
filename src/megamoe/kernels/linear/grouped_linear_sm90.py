# SPDX-License-Identifier: Apache-2.0
"""grouped_linear on Hopper for bf16 weights: the kernel of linear with a group in every address.

Meaning    ops/grouped_linear.py; this file only makes it fast
Kernel     weight_tiles_sm90.py: small tiles for few tokens, which wait for the weights' bytes, large ones for many
Order      one path: products of 16 columns at a time in ascending order, whatever the tile
Limits     x and w bf16; K a multiple of 64
Bound      few tokens: the weights' bytes, 2 a value; many: the tensor cores
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megamoe.kernels.linear.weight_tiles_sm90 import plain_tile_linear, require_bf16, tile_keys
from megamoe.kernels.parts.launch import aligned


def configs(dims: Mapping[str, int]) -> Iterator[Any]:
    """Yield what a model needs for one entry of its shape table."""
    yield from tile_keys("bf16", False, "bf16")


def run(x: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute grouped_linear."""
    require_bf16("grouped_linear", x, w, 64)
    return plain_tile_linear(aligned(x), aligned(w), out_dtype)
