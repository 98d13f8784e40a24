# SPDX-License-Identifier: Apache-2.0
"""What would make the host wait for a device, noticed on a machine without one.

On the CPU a read costs nothing, so nothing slows down when one slips in; on a GPU each is a stop of 20 us or more, and
a CUDA graph cannot be captured over it. Operators are seen by a dispatch mode, and methods that copy memory without an
operator (`tolist`, `numpy`, `cpu`) by a function mode. What an operation runs, its reference or kernel, may read.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megamoe import ops

OPERATORS = frozenset(
    {
        "_local_scalar_dense",  # item, int, bool, float, an index, a format string
        "_unique2",
        "allclose",
        "argwhere",
        "bincount",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "nonzero_numpy",
        "unique_consecutive",
        "unique_dim",
    }
)
"""Operators whose result, or the shape of it, is known to the host only when the device has answered. In inference mode
`item` and its like arrive whole; otherwise as the operators they are made of."""

METHODS = frozenset({"__array__", "__dlpack__", "__reduce_ex__", "cpu", "numpy", "tolist"})
"""Methods that hand memory to the host and show no operator where it is the host's already."""


class HostReads:
    """The reads of a `count_host_reads` block.

    Attributes:
        places: one line per read, in order: what it was and the line of the package that did it.
        operations: every operation that was called, in order.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self.places: list[str] = []
        self.operations: list[str] = []
        self._inside = 0

    def seen(self, what: str) -> None:
        """Note a read, unless an operation runs."""
        if not self._inside:
            self.places.append(f"{what} in {_place()}")

    def observe(self, op: str, run: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
        """Allow reads while an operation runs."""

        @functools.wraps(run)
        def inside(*args: Any) -> Any:
            self.operations.append(op)
            self._inside += 1
            try:
                return run(*args)
            finally:
                self._inside -= 1

        return inside


@contextlib.contextmanager
def count_host_reads() -> Iterator[HostReads]:
    """Note every host read inside the block that is not made by what an operation runs."""
    reads = HostReads()
    with ops.watch(reads.observe), _Methods(reads), _Operators(reads):
        yield reads


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in OPERATORS or (name == "where" and len(args) == 1) or _repeats_by_tensor(func, kwargs):
            self.reads.seen(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and _is_masked(name, args):
            self.reads.seen(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


def _repeats_by_tensor(func: Any, kwargs: Any) -> bool:
    """Return whether the length of the result is the sum of a tensor that the caller did not give."""
    name, overload = func.overloadpacket.__name__, func._overloadname
    return name == "repeat_interleave" and overload != "self_int" and (kwargs or {}).get("output_size") is None


def _is_masked(name: str, args: tuple[Any, ...]) -> bool:
    """Return whether an index holds a mask: its ones are counted first, except to fill them with one value."""
    masks = [one for one in args[1] if one is not None and one.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and (name == "index" or args[2].numel() != 1)


class _Methods(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in METHODS or (name == "to" and "cpu" in (*map(_text, args[1:]), (kwargs or {}).get("device"))):
            self.reads.seen(name)
        if name in ("tensor", "as_tensor") and _holds_tensor(args[0]):
            self.reads.seen(f"{name} of tensors")
        return func(*args, **(kwargs or {}))


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _holds_tensor(value: object) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(one, torch.Tensor) or _holds_tensor(one) for one in value)


def _place() -> str:
    """Return the innermost line that is neither torch's nor this file's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
        frame = frame.f_back
    return f"{'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
