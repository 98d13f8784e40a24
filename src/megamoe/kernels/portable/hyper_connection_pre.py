# SPDX-License-Identifier: Apache-2.0
"""hyper_connection_pre: project the streams, normalize, Sinkhorn, collapse; the streams are read once.

Meaning    ops/hyper_connection.py; this file only makes it fast
Grid       (C, ceil(T / tokens)): a cluster of C blocks shares a tile of tokens; a block has D / C channels of all
           streams
Warps      each holds 64 channels of all streams of the tile in registers, from the load to the weighted sum
Product    fp32 weights are split into three bf16 parts, exactly; products of bf16 are exact in fp32, so the matrix unit
           gives the fp32 product up to the order of additions (parts/mma_device.py)
Order      channels of a warp, warps of a block ascending, blocks of a cluster ascending: the same for every T
Memory     partial sums of a block go to the others of its cluster through a workspace of 25 floats a token and block
Limits     4 streams of bf16; D a multiple of 64
Bound      memory for many tokens (X D + D values a token); the weights, from L2, for few
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.parts.rows import as_rows, as_vector
from megamoe.kernels.store import kernel

STREAMS = 4
WARP_CHANNELS = 64
MAX_WARPS = 16
FEW_WARPS = 8  # two blocks of so many share an SM
SMALL_TILE, LARGE_TILE = 8, 16
SMALL_TOKENS = 64  # up to here the small tile: more clusters, each with less to wait for


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        width: D.
        tokens: tokens per cluster, 8 or 16.
        sinkhorn_iters: column steps; 0 for hyper_connection_head, which has none and no post and C.
    """

    width: int
    tokens: int
    sinkhorn_iters: int

    @property
    def cluster(self) -> int:
        """Blocks per cluster."""
        return cluster_size(self.width)

    @property
    def warps(self) -> int:
        """Warps per block."""
        return self.width // (self.cluster * WARP_CHANNELS)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: sums of every warp, of the block, and the streams' weights."""
        values = (self.outputs + 1) * self.tokens
        return 4 * (values * self.warps + values + STREAMS * self.tokens)

    @property
    def outputs(self) -> int:
        """Rows of fn."""
        return (2 + STREAMS) * STREAMS if self.sinkhorn_iters else STREAMS


def cluster_size(width: int) -> int:
    """Return the blocks that share a token: as many as divide its channels, up to 8."""
    return next(size for size in (8, 4, 2, 1) if width % (size * WARP_CHANNELS) == 0)


def configs(dims: Mapping[str, int], sinkhorn_iters: int = 20) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    for tokens in (SMALL_TILE, LARGE_TILE):
        yield Config(dims["D"], tokens, sinkhorn_iters)


def run(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute hyper_connection_pre."""
    num_tokens = x.shape[0]
    post = torch.empty((num_tokens, STREAMS), dtype=torch.float32, device=x.device)
    comb = torch.empty((num_tokens, STREAMS, STREAMS), dtype=torch.float32, device=x.device)
    u = collapse("hyper_connection_pre", x, fn, base, scale, norm_eps, hc_eps, sinkhorn_iters, post, comb)
    return u, post, comb


def collapse(
    op: str,
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
    post: torch.Tensor | None,
    comb: torch.Tensor | None,
) -> torch.Tensor:
    """Launch the kernel behind hyper_connection_pre (post and comb given) and hyper_connection_head (None)."""
    num_tokens, streams, width = x.shape
    if streams != STREAMS or width % WARP_CHANNELS or x.dtype != torch.bfloat16:
        raise NotImplementedError(
            f"{op}: the kernel takes {STREAMS} bf16 streams of a multiple of {WARP_CHANNELS} channels; got "
            f'{x.dtype} {list(x.shape)}. Run the reference: with megamoe.ops.use("reference").'
        )
    u = torch.empty((num_tokens, width), dtype=x.dtype, device=x.device)
    if u.numel() == 0:
        return u
    config = Config(width, SMALL_TILE if num_tokens <= SMALL_TOKENS else LARGE_TILE, sinkhorn_iters)
    if config.warps > MAX_WARPS:
        raise NotImplementedError(
            f"{op}: the kernel takes up to {8 * MAX_WARPS * WARP_CHANNELS} channels, all divided by 512 above "
            f'{MAX_WARPS * WARP_CHANNELS}; got {width}. Run the reference: with megamoe.ops.use("reference").'
        )
    num_tiles = -(-num_tokens // config.tokens)
    partial = torch.empty(
        (num_tiles * config.cluster, (config.outputs + 1) * config.tokens), dtype=torch.float32, device=x.device
    )
    launch = kernel(__name__, config, x.device)
    outputs = () if post is None or comb is None else (post, comb.view(num_tokens, STREAMS * STREAMS))
    launch(
        as_rows(x).view(torch.int32),
        as_rows(fn),
        as_vector(base),
        as_vector(scale),
        u.view(torch.int32),
        *outputs,
        partial,
        norm_eps,
        hc_eps,
    )
    return u
