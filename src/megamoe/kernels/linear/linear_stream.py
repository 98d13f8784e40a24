# SPDX-License-Identifier: Apache-2.0
"""Host side of y = x w^T for few tokens, shared by the two NVFP4 linears: which launches, and how many blocks.

A matrix wider than 8192 columns is multiplied in parts of columns, one launch each, the later ones adding to the sums
of the earlier ones in fp32. linear_stream_config.py says how a launch is shared out.
"""

from __future__ import annotations

import torch

from megamoe.formats.fragment_layout import TILE_COLUMNS
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.kernels.linear.linear_stream_config import (
    FEW_TOKENS,
    MAX_RANKS,
    MAX_SEGMENT_CHUNKS,
    MAX_WARPS,
    Config,
    LinearPlan,
)
from megamoe.kernels.parts.launch import DTYPE_NAMES, num_multiprocessors
from megamoe.kernels.parts.weight_stream import TOKENS_PER_TILE
from megamoe.kernels.store import kernel

LEFT_BY_CLUSTERS_OF_4 = 12  # of an H100's 132; with one cluster more, two would share multiprocessors
MAX_TILES = 2
PASS_TOKENS = MAX_TILES * TOKENS_PER_TILE
MAX_COLUMNS = MAX_RANKS * MAX_WARPS * MAX_SEGMENT_CHUNKS * TILE_COLUMNS


def stream_limit(num_rows: int) -> int:
    """Return up to how many tokens a weight of N rows is streamed; more of them are multiplied in tiles.

    From the measured crossover (benchmarks/h100/matrix_kernels.csv). Both paths have the operation's meaning, with sums
    in another order, so this number is where the last bits may change: a function of N alone.
    """
    if num_rows <= 2048:
        return 4 * PASS_TOKENS
    return 2 * PASS_TOKENS if num_rows <= 4096 else PASS_TOKENS


def stream_keys(num_rows: int, num_columns: int, x: str, out: str, *, row_scales: bool = False) -> list[Config]:
    """Return the compile keys of every number of tokens that is streamed."""
    counts = sorted({FEW_TOKENS, TOKENS_PER_TILE, PASS_TOKENS, stream_limit(num_rows)})
    return [config for count in counts for config in stream_configs(num_columns, count, x, out, row_scales)]


def column_parts(num_columns: int) -> list[tuple[int, int]]:
    """Return (first, last) of the parts that K columns are multiplied in: as few as possible, of nearly equal size."""
    chunks = num_columns // TILE_COLUMNS
    count = -(-num_columns // MAX_COLUMNS)
    edges = [index * chunks // count * TILE_COLUMNS for index in range(count + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def stream_configs(num_columns: int, num_tokens: int, x: str, out: str, row_scales: bool = False) -> list[Config]:
    """Return the launches for that many tokens."""
    num_tiles = min(MAX_TILES, max(1, -(-num_tokens // TOKENS_PER_TILE)))
    parts = column_parts(num_columns)
    return [
        Config(
            num_columns,
            first,
            last,
            num_tiles,
            num_tokens <= num_tiles * TOKENS_PER_TILE,
            x,
            out if last == num_columns else "f32",
            few=num_tokens <= FEW_TOKENS and x == "bf16",
            wide=num_tokens > PASS_TOKENS and LinearPlan(last - first, MAX_TILES).ranks > 1,
            row_scales=row_scales,
        )
        for first, last in parts
    ]


def num_clusters(plan: LinearPlan, num_units: int, multiprocessors: int, num_passes: int) -> int:
    """Return how many clusters share the units of a pass.

    As many blocks as there are multiprocessors. With fewer, two blocks of the next launch would share one that is
    idle, and both would be late. Clusters of 4 do not fit on all: groups of multiprocessors are not multiples of 4.
    """
    blocks = multiprocessors
    if num_passes > 1 and not plan.wide:
        blocks *= plan.blocks_per_multiprocessor
    if plan.cluster == MAX_RANKS:
        blocks -= LEFT_BY_CLUSTERS_OF_4
    return min(num_units, max(1, blocks // plan.cluster // num_passes))


def stream_linear(x: tuple[torch.Tensor, ...], x_name: str, w: NvFp4Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Multiply by streaming the weight.

    Args:
        x: (bf16 [T, K],), or codes [T, K/2], scales [T, K/16] as bytes and tensor scale [T]; all contiguous.
        x_name: "bf16" or "nvfp4".
        w: [N, K] in fragment order, with one tensor scale or one per row.
        out_dtype: bf16 or fp32.
    """
    num_rows, num_columns = w.shape
    num_tokens = x[0].shape[0]
    out = torch.empty(num_tokens, num_rows, dtype=out_dtype, device=w.device)
    if out.numel() == 0:
        return out
    configs = stream_configs(num_columns, num_tokens, x_name, DTYPE_NAMES[out_dtype], w.scale_per == "row")
    sums = out
    if len(configs) > 1 and out_dtype != torch.float32:
        sums = torch.empty(num_tokens, num_rows, dtype=torch.float32, device=w.device)
    weight = (w.codes, w.scales.view(torch.uint8), w.tensor_scale.view(-1))
    num_passes = -(-num_tokens // configs[0].tokens_per_pass)
    for config in configs:
        target = out if config is configs[-1] else sums
        earlier = (sums,) if config.adds else ()
        plan = config.plan
        # Passes stand side by side on different multiprocessors, in step: one reads a weight from memory, all others
        # find it in L2.
        clusters = num_clusters(plan, plan.num_units(num_rows // 16), num_multiprocessors(w.device), num_passes)
        blocks = clusters * num_passes * plan.cluster
        kernel(config, w.device)(*x, *weight, *earlier, target, blocks, num_passes)
    return out
