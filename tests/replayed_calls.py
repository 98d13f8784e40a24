# SPDX-License-Identifier: Apache-2.0
"""Captured graphs for machines without a GPU: the operations of a decode step, recorded once and run again.

A graph knows the launches of the step it was captured from and the addresses they read and wrote, and nothing else:
what the host worked out between them is a constant in it. So does a recording here: it runs the same operations on the
same tensors, and writes what they return where the first ones returned it. A step that computed anything on the host,
or in torch between operations, is replayed wrong, and the bits tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megamoe import ops
from megamoe.engine.runner import Work


def leaves(value: Any) -> Iterator[Any]:
    """Yield every tensor and every other value of an argument."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for one in value:
            yield from leaves(one)
    elif isinstance(value, dict):
        for key, one in value.items():
            yield key
            yield from leaves(one)
    else:
        yield value


def tensors(value: Any) -> list[torch.Tensor]:
    """Return every tensor of a value."""
    return [one for one in leaves(value) if isinstance(one, torch.Tensor)]


@dataclasses.dataclass
class Call:
    """One operation: what ran, on what, and what came of it."""

    op: str
    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    result: Any


class Recording:
    """The operations of one step, outermost ones alone."""

    def __init__(self, work: Work) -> None:
        self.calls: list[Call] = []
        self._depth = 0
        with ops.watch(self._observe):
            self.results = work()

    def _observe(self, op: str, run: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*arguments: Any) -> Any:
            self._depth += 1
            try:
                result = run(*arguments)
            finally:
                self._depth -= 1
            if not self._depth:
                self.calls.append(Call(op, run, arguments, result))
            return result

        return recorded

    def replay(self) -> None:
        """Run every operation again, on the tensors of the first time."""
        for call in self.calls:
            for kept, new in zip(tensors(call.result), tensors(call.run(*call.arguments)), strict=True):
                if kept.data_ptr() != new.data_ptr():
                    kept.view(torch.uint8).copy_(new.view(torch.uint8))

    def signature(self) -> list[tuple[Any, ...]]:
        """Return what a graph would hold of the step: operations, shapes, values, and addresses of what was there."""
        made: dict[int, str] = {}
        lines: list[tuple[Any, ...]] = []
        for number, call in enumerate(self.calls):
            line: list[Any] = [call.op]
            for one in leaves(call.arguments):
                if not isinstance(one, torch.Tensor):
                    line.append(one)
                    continue
                storage = one.untyped_storage().data_ptr()
                place = made.get(storage, storage)
                line.append((one.shape, one.stride(), one.dtype, one.storage_offset(), place))
            lines.append(tuple(line))
            made |= {
                one.untyped_storage().data_ptr(): f"result {number}.{at}" for at, one in enumerate(tensors(call.result))
            }
        return lines


class ReplayedCalls:
    """A runner that replays; with every replay it makes the calls as well, and both must agree in every bit.

    Attributes:
        recordings: by bucket.
        num_replays: steps that were replayed.
        wrong: what disagreed, one line each.
    """

    num_bytes = 0

    def __init__(self) -> None:
        self.recordings: dict[int, Recording] = {}
        self.num_replays = 0
        self.wrong: list[str] = []

    def __call__(self, bucket: int, work: Work) -> tuple[Any, torch.Tensor]:
        """Record a new bucket; replay a known one."""
        recording = self.recordings.get(bucket)
        if recording is None:
            recording = self.recordings[bucket] = Recording(work)
            return recording.results
        again = Recording(work)
        before, now = recording.signature(), again.signature()
        if before != now:
            differ = [one[0] for one, other in zip(before, now, strict=False) if one != other]
            self.wrong.append(f"bucket {bucket}: {len(before)} and {len(now)} operations; other ones: {differ[:5]}")
        recording.replay()
        self.num_replays += 1
        for kept, new in zip(tensors(recording.results), tensors(again.results), strict=True):
            if not torch.equal(kept.view(torch.uint8), new.view(torch.uint8)):
                self.wrong.append(f"bucket {bucket}: a replay has other bits than calls")
        return recording.results

    def seal(self) -> None:
        """Nothing to refuse."""
