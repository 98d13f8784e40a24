# SPDX-License-Identifier: Apache-2.0
"""Host side of y[:, g] = x[:, g] w[g]^T for few tokens: all weights streamed once (parts/weight_stream.py).

A unit of work is a few row tiles of one group. Every block belongs to one group and loads that group's tokens once;
tokens of a second group would come in the middle of the stream, and everyone would wait for that block.
"""

from __future__ import annotations

import torch

from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.kernels.linear.grouped_stream_config import Config
from megamoe.kernels.parts.launch import DTYPE_NAMES, num_multiprocessors
from megamoe.kernels.parts.weight_stream import TOKENS_PER_TILE
from megamoe.kernels.parts.weight_stream_limits import MAX_COLUMNS
from megamoe.kernels.store import kernel

MAX_TILES = 2
STREAM_LIMIT = MAX_TILES * TOKENS_PER_TILE
"""Up to so many tokens the weights are streamed; more are multiplied in tiles, which add in another order."""


def stream_keys(num_columns: int, x: str, out: str) -> list[Config]:
    """Return the compile keys of every number of tokens that is streamed."""
    return [Config(num_columns, num_tiles, x, out) for num_tiles in range(1, MAX_TILES + 1)]


def require_columns(op: str, num_columns: int) -> None:
    """Refuse widths that one of the two paths does not take."""
    if num_columns % 128 or num_columns > MAX_COLUMNS:
        raise NotImplementedError(
            f"{op}: the kernel takes K a multiple of 128, up to {MAX_COLUMNS}; got {num_columns}. Run the reference: "
            'with megamoe.ops.use("reference").'
        )


def stream_grouped(x: tuple[torch.Tensor, ...], x_name: str, w: NvFp4Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Multiply by streaming the weights.

    Args:
        x: (bf16 [T, G, K],), or codes [T, G, K/2], scales [T, G, K/16] as bytes and tensor scale [T, G]; contiguous,
            T at most STREAM_LIMIT.
        x_name: "bf16" or "nvfp4".
        w: [G, N, K] in fragment order.
        out_dtype: bf16 or fp32.
    """
    num_groups, num_rows, num_columns = w.shape
    num_tokens = x[0].shape[0]
    out = torch.empty(num_tokens, num_groups, num_rows, dtype=out_dtype, device=w.device)
    if out.numel() == 0:
        return out
    config = Config(num_columns, -(-num_tokens // TOKENS_PER_TILE), x_name, DTYPE_NAMES[out_dtype])
    per_group = max(1, num_multiprocessors(w.device) // num_groups)
    blocks = min(per_group, config.plan.num_units(num_rows // 16))  # of a group
    kernel(config, w.device)(
        *(one.view(num_tokens, -1) for one in x),
        w.codes.view(-1, num_columns // 2),
        w.scales.view(torch.uint8).view(-1, num_columns // 16),
        w.tensor_scale,
        out.view(num_tokens, -1),
        blocks,
    )
    return out
