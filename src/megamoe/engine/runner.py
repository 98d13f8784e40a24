# SPDX-License-Identifier: Apache-2.0
"""How the work of a decode step reaches the device: called, or replayed from the CUDA graph of its bucket.

    hidden, logits = runner(plan.bucket, lambda: model.decode(plan, cache))

The first step of a bucket is called, and then called once more while a graph records it; every later one replays that
graph. The work must therefore be the same launches on the same addresses whatever the tokens are (docs/decisions/
0016-decode-graphs.md says what is inside). On the CPU the same work is called in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from megamoe.ops import dispatch

Work = Callable[[], tuple[Any, torch.Tensor]]


class Runner(Protocol):
    """Does the work of decode steps."""

    def __call__(self, bucket: int, work: Work) -> tuple[Any, torch.Tensor]:
        """Do a step's work or what it stands for; its results may be overwritten by the next call."""
        ...

    def seal(self) -> None:
        """From now on, meet no new bucket."""
        ...

    @property
    def num_bytes(self) -> int:
        """Device memory that is kept for replays."""
        ...


class Calls:
    """Calls the work of every step."""

    num_bytes = 0

    def __call__(self, bucket: int, work: Work) -> tuple[Any, torch.Tensor]:
        """Do the work."""
        return work()

    def seal(self) -> None:
        """Do nothing: a step that is called needs nothing kept."""


class Graphs:
    """Replays one CUDA graph per bucket; all share one pool of memory.

    A replay makes no launch of its own, asks no allocator and waits for nothing. Results lie where the capture put
    them, those of a bucket always at the same place.
    """

    def __init__(self, device: torch.device) -> None:
        """Capture nothing yet."""
        self._device = device
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Any, torch.Tensor]]] = {}
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._sealed = False

    def __call__(self, bucket: int, work: Work) -> tuple[Any, torch.Tensor]:
        """Replay the graph of a bucket; call and capture the work of a new one.

        Raises:
            RuntimeError: the bucket is new and `seal` was called, or the work cannot be captured.
        """
        found = self._graphs.get(bucket)
        if found is not None:
            self.replay(found[0])
            return found[1]
        if self._sealed:
            raise RuntimeError(
                f"decode graphs: a step of {bucket} tokens was not captured before ready; captured are "
                f"{', '.join(map(str, sorted(self._graphs))) or 'none'}. Add it to the warm-up."
            )
        result = work()
        self._graphs[bucket] = self._capture(work)
        return result

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Launch a graph."""
        graph.replay()

    def seal(self) -> None:
        """From now on, refuse to capture: it takes longer than a step and allocates."""
        self._sealed = True

    @property
    def buckets(self) -> list[int]:
        """What has been captured, ascending."""
        return sorted(self._graphs)

    @property
    def num_bytes(self) -> int:
        """Bytes of the pool that all graphs share, results included."""
        segments = torch.cuda.memory_snapshot()
        return sum(one["total_size"] for one in segments if tuple(one["segment_pool_id"]) == tuple(self._pool))

    def _capture(self, work: Work) -> tuple[torch.cuda.CUDAGraph, tuple[Any, torch.Tensor]]:
        # Not torch.cuda.graph: it gives the allocator's memory back first, and later steps would ask for it again.
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                graph.capture_end()
        return graph, result


def runner_for(device: torch.device) -> Runner:
    """Return what a device's decode steps are done with."""
    return Graphs(device) if device.type == "cuda" and dispatch.uses_kernels(device) else Calls()
