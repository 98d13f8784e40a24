# SPDX-License-Identifier: Apache-2.0
"""Times of GPU work: CUDA graphs over rotated buffers, variants interleaved, medians.

A call is captured many times into one graph, each time on another set of inputs and outputs. Together the sets are
larger than the L2 cache, so that no call finds its data there (where that takes more than MAX_SETS sets, the report
says so). Quantized weights are rotated like tokens, and over more memory: for few tokens they are all that moves, and
a cache that keeps a part of them by chance would flatter the kernel. Variants are replayed in turn, so that a change
of clocks meets all of them alike.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

MAX_SETS = 48
MIN_SETS = 3
L2_TIMES = 2  # how many times the L2 cache the sets come to
MAX_WEIGHT_SETS = 400
WEIGHT_L2_TIMES = 9  # the same where weights are rotated: 450 MB on an H100
CALLS = 48
ROUNDS = 15
COPY_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of one variant.

    Attributes:
        median_us: of the rounds, per call.
        low_us, high_us: quickest and slowest round.
        from_l2: the sets do not exceed twice the L2 cache, so some data may come from there.
    """

    median_us: float
    low_us: float
    high_us: float
    from_l2: bool


def num_sets(set_bytes: int, l2_bytes: int, limit_bytes: int, *, has_weights: bool = False) -> int:
    """Return how many sets of buffers to rotate through."""
    times, most = (WEIGHT_L2_TIMES, MAX_WEIGHT_SETS) if has_weights else (L2_TIMES, MAX_SETS)
    wanted = math.ceil(times * l2_bytes / max(1, set_bytes)) + 1
    return max(MIN_SETS, min(most, wanted, max(MIN_SETS, limit_bytes // max(1, set_bytes))))


def capture(call: Callable[[int], Any], count: int, calls: int = CALLS) -> torch.cuda.CUDAGraph:
    """Return a graph of `calls` calls; call(i) works on set i."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(count):
            call(index)  # loads kernels and makes workspaces before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(index % count) for index in range(calls)]  # kept: outputs must not share memory
    del kept
    return graph


def time_graphs(
    graphs: Mapping[str, torch.cuda.CUDAGraph], calls: int, from_l2: bool, rounds: int = ROUNDS
) -> dict[str, Timing]:
    """Replay every graph `rounds` times in turn and return times per call."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for graph in graphs.values():
        graph.replay()
    torch.cuda.synchronize()
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) * 1000.0 / calls)
    return {name: summary(values, from_l2) for name, values in times.items()}


def summary(times_us: Sequence[float], from_l2: bool) -> Timing:
    """Return median, quickest and slowest."""
    return Timing(statistics.median(times_us), min(times_us), max(times_us), from_l2)


def copy_gbps() -> float:
    """Return the bandwidth of a device-to-device copy, bytes read and written, in 1e9 bytes a second."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times: list[float] = []
    for _ in range(12):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000.0)
    return 2 * COPY_BYTES / statistics.median(times) / 1e9
