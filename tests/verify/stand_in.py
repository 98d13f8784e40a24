# SPDX-License-Identifier: Apache-2.0
"""A kernel that is not there: an operation's reference in its place, right or with one fault, on CPU tensors.

It stands where a kernel stands: behind the door's checks, with the arguments that the door passes to `pick`, its
outputs from `torch.empty`, what it changes in place changed in place.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.ops import dispatch, use
from megamoe.verify.op_inputs import OpInputs
from megamoe.verify.values import mapped, parts, whole_storage

Fault = Callable[[torch.Tensor, torch.Tensor], None]
"""(an output of the stand-in, where its values were left out; the right values) → None, writing the output."""


def right(output: torch.Tensor, values: torch.Tensor) -> None:
    output.copy_(values)


def perturbed(output: torch.Tensor, values: torch.Tensor) -> None:
    """A much larger number in the last element; codes of the last row with other signs, another scale, another id."""
    output.copy_(values)
    last = output.view(-1)[-1:]
    if output.is_floating_point() and output.dtype.itemsize > 1:
        last.copy_(last * 1.5 + values.float().abs().amax().clamp(min=1.0).to(output.dtype))
    elif output.dtype in (torch.uint8, torch.float8_e4m3fn):
        codes = output.view(-1)[-output.shape[-1] :].view(torch.uint8)
        codes.bitwise_xor_(torch.full_like(codes, 0x88 if output.dtype == torch.uint8 else 0x80))
    else:
        bits = last.view(torch.uint8) if output.dtype.itemsize == 1 else last
        bits.bitwise_xor_(torch.ones_like(bits))


def unwritten(output: torch.Tensor, values: torch.Tensor) -> None:
    """All but the last element."""
    output.view(-1)[:-1] = values.contiguous().view(-1)[:-1]


def overwritten(output: torch.Tensor, values: torch.Tensor) -> None:
    """One element too many."""
    output.copy_(values)
    first = output.storage_offset() + output.numel()
    behind = output.as_strided((1,), (1,), first)
    (behind.view(torch.uint8) if output.dtype.itemsize == 1 else behind).zero_()


OUTPUT_FAULTS: dict[str, Fault] = {"perturbed": perturbed, "unwritten": unwritten, "overwritten": overwritten}


def _changed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return (before != after).nonzero()[:, 0]


def byte_perturbed(before: torch.Tensor, after: torch.Tensor) -> None:
    after[_changed(before, after)[-16:]] ^= 0x80  # one bit of one code may be another: it may lie beside a step


def byte_unwritten(before: torch.Tensor, after: torch.Tensor) -> None:
    last = _changed(before, after)[-16:]
    after[last] = before[last]


def byte_untouchable(before: torch.Tensor, after: torch.Tensor) -> None:
    """The byte behind the last one that changed, or the first that did not change."""
    same = (before == after).nonzero()[:, 0]
    behind = same[same > _changed(before, after)[-1]]
    after[behind[0]] ^= 0xFF


def byte_before(before: torch.Tensor, after: torch.Tensor) -> None:
    """A byte of the fence before."""
    after[4095] ^= 0xFF


def byte_behind(before: torch.Tensor, after: torch.Tensor) -> None:
    """A byte of the fence behind."""
    after[-4096] ^= 0xFF


IN_PLACE_FAULTS: dict[str, Fault] = {
    "perturbed": byte_perturbed,
    "unwritten": byte_unwritten,
    "untouchable": byte_untouchable,
    "before": byte_before,
    "behind": byte_behind,
}
"""Of the whole memory, before and after the call."""


class StandIn:
    """The kernel of one operation.

    Args:
        op: its name.
        inputs: how it is called.
        fault: which fault it has, or None; and of which output or which changed argument.
    """

    def __init__(self, op: str, inputs: OpInputs, fault: str | None = None, which: int = 0) -> None:
        self.op, self.inputs, self.fault, self.which = op, inputs, fault, which
        self.calls = 0

    def pick(self, op: str, device: torch.device, reference: Callable[..., Any]) -> Callable[..., Any]:
        if op != self.op or not dispatch._USED.get() == "device":
            return dispatch.pick(op, device, reference)
        return functools.partial(self.run, reference)

    def run(self, reference: Callable[..., Any], *arguments: Any) -> Any:
        self.calls += 1
        if not self.inputs.written and self._fills_an_argument(reference, arguments):
            return None
        written = [one for one in storages(arguments) if self.inputs.written]
        before = [one.clone() for one in written]
        with use("reference"):
            returned = reference(*arguments)
        if self.inputs.written and self.fault is not None:
            changed = [index for index, one in enumerate(written) if not torch.equal(one, before[index])]
            if changed:
                index = changed[self.which]
                IN_PLACE_FAULTS[self.fault](before[index], written[index])
        if returned is None:
            return None
        given = {one.data_ptr() for one in storages(arguments)}
        numbers: Iterator[int] = iter(range(100))
        return mapped(returned, lambda one: self._output(one, next(numbers), given))

    def _fills_an_argument(self, reference: Callable[..., Any], arguments: tuple[Any, ...]) -> bool:
        """Run an operation whose door allocates its output and passes it on last; say whether it is one."""
        if self.op != "mean_of_streams":
            return False
        output = arguments[-1]
        poison = output.clone()
        with use("reference"):
            reference(*arguments)
        values = output.clone()
        output.copy_(poison)
        is_faulty = self.fault is not None and values.numel()
        (OUTPUT_FAULTS[str(self.fault)] if is_faulty else right)(output, values)
        return True

    def _output(self, values: torch.Tensor, number: int, given: set[int]) -> torch.Tensor:
        if values.numel() and whole_storage(values).data_ptr() in given:
            return values  # a part of an argument, such as a scale that was given
        output = torch.empty(values.shape, dtype=values.dtype)
        faulty = self.fault is not None and number == self.which and not self.inputs.written and values.numel()
        (OUTPUT_FAULTS[str(self.fault)] if faulty else right)(output, values)
        return output


def storages(values: Iterable[Any]) -> list[torch.Tensor]:
    """Return the memory of all tensors of some arguments, each once."""
    found: dict[int, torch.Tensor] = {}
    for one in values:
        for tensor in [one.storage] if isinstance(one, CachePool) else parts(one).values():
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                found.setdefault(whole_storage(tensor).data_ptr(), whole_storage(tensor))
    return list(found.values())


def install(
    monkeypatch: pytest.MonkeyPatch, op: str, inputs: OpInputs, fault: str | None = None, which: int = 0
) -> StandIn:
    """Put a stand-in where the operation's door looks for its kernel."""
    stand_in = StandIn(op, inputs, fault, which)
    monkeypatch.setattr(sys.modules[inputs.door.__module__], "pick", stand_in.pick)
    return stand_in
