# SPDX-License-Identifier: Apache-2.0
"""hyper_connection_pre: project the streams, normalize, Sinkhorn, collapse; the streams are read once.

Meaning    ops/hyper_connection.py; this file only makes it fast
Grid       (C, clusters): a cluster of C blocks goes through tiles of 16 tokens; a block has D / C channels of every
           stream
Groups     of warps in a block, each with a tile of its own: while one waits, another computes
Warps      each holds 64 channels of all streams of its tile in registers, from the load to the weighted sum
Product    fp32 weights as two bf16 parts each, 17 significant bits, split once and kept in shared memory; products of
           bf16 are exact in fp32
Order      channels of a warp, pairs of warps, these ascending, blocks of a cluster ascending: the same for every T
Memory     sums go straight into the shared memory of the blocks that need them, and an mbarrier counts their bytes
Limits     4 streams of bf16; D = 64 C W, C one of 1, 2, 4, 8 and 16, W at most 8, or 7 where C is 16
Bound      memory for many tokens (X D + D values a token); latency for few
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch

from megamoe.kernels.hyper_connection.hyper_connection_pre_config import STREAMS, TOKENS, WARP_CHANNELS, Config
from megamoe.kernels.parts.launch import as_rows, as_vector
from megamoe.kernels.store import kernel

MAX_WARPS = 8  # that share a tile in one block
SHARED_LIMIT = 227 * 1024
CLUSTERS = (1, 2, 4, 8, 16)


def plan(width: int, sinkhorn_iters: int, norm: bool) -> Config:
    """Return the configuration for a width: up to 8 blocks, and 16 where 8 are too few or where that was quicker."""
    fitting = [size for size in CLUSTERS if width % (size * WARP_CHANNELS) == 0]
    few = [size for size in fitting if size <= 8]
    many = width > few[-1] * WARP_CHANNELS * MAX_WARPS or (sinkhorn_iters > 0 and not norm)
    return Config(width, sinkhorn_iters, fitting[-1] if many else few[-1], norm)


def configs(dims: Mapping[str, int], sinkhorn_iters: int = 20, norm: bool = False) -> Iterator[Config]:
    """Yield what a model needs for one entry of its shape table."""
    yield plan(dims["D"], sinkhorn_iters, norm)


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
    post, comb = mixing_outputs(x)
    u = collapse("hyper_connection_pre", x, fn, base, scale, None, norm_eps, hc_eps, sinkhorn_iters, post, comb)
    return u, post, comb


def mixing_outputs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for post [T, 4] and C [T, 4, 4]."""
    num_tokens = x.shape[0]
    post = torch.empty((num_tokens, STREAMS), dtype=torch.float32, device=x.device)
    return post, torch.empty((num_tokens, STREAMS, STREAMS), dtype=torch.float32, device=x.device)


def collapse(
    op: str,
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor | None,
    norm_eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
    post: torch.Tensor | None,
    comb: torch.Tensor | None,
) -> torch.Tensor:
    """Launch the kernel behind hyper_connection_pre, _pre_norm (a weight given) and _head (no post and comb)."""
    num_tokens, streams, width = x.shape
    if streams != STREAMS or width % WARP_CHANNELS or x.dtype != torch.bfloat16:
        raise NotImplementedError(
            f"{op}: the kernel takes {STREAMS} bf16 streams of a multiple of {WARP_CHANNELS} channels; got "
            f'{x.dtype} {list(x.shape)}. Run the reference: with megamoe.ops.use("reference").'
        )
    u = torch.empty((num_tokens, width), dtype=x.dtype, device=x.device)
    if u.numel() == 0:
        return u
    config = plan(width, sinkhorn_iters, weight is not None)
    if config.warps > MAX_WARPS or config.shared_bytes > SHARED_LIMIT:
        raise NotImplementedError(
            f"{op}: the kernel takes {WARP_CHANNELS} C W channels, W at most {MAX_WARPS}, or 7 where C is 16, C one of "
            f'{CLUSTERS}; got {width}. Run the reference: with megamoe.ops.use("reference").'
        )
    launch = kernel(config, x.device)
    outputs = () if post is None or comb is None else (post, comb.view(num_tokens, STREAMS * STREAMS))
    launch(
        as_rows(x).view(torch.int32),
        as_rows(fn),
        as_vector(base),
        as_vector(scale),
        *(() if weight is None else (as_vector(weight).view(torch.int32),)),
        u.view(torch.int32),
        *outputs,
        min(-(-num_tokens // TOKENS), max_clusters(config.cluster, x.device)),
        norm_eps,
        hc_eps,
    )
    return u


@functools.cache
def max_clusters(cluster: int, device: torch.device) -> int:
    """Return how many clusters a device runs at once, one block a multiprocessor.

    A cluster lies within one group of multiprocessors (GPC), and a group need not be a multiple of a cluster: on an
    H100 of 132, 15 clusters of 8 and 7 of 16 are resident. One more would run alone, after all others.
    """
    return max(1, torch.cuda.get_device_properties(device).multi_processor_count // cluster - 1)
