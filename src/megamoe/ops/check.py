# SPDX-License-Identifier: Apache-2.0
"""Named-dimension checks for the doors of operations.

    dims = check("linear", x=(x, "T K", FLOATS), w=(w, "N K", FLOATS), out_dtype=(out_dtype, FLOATS))

Every tensor (or quantized container, by its logical shape) is matched against a string of dimension names. A name
binds to the first size it meets and must be that size everywhere else in the call; a number must be that size. All
tensors of a call live on one device. Whatever does not fit is refused with what was expected and what was got.

A specification is one of

    (value, "T K")             a tensor or container with two dimensions, any dtype
    (value, "T K", allowed)    and with one of the allowed dtypes or container classes
    (value, "... K")           any number of leading dimensions
    (value, "?E", allowed)     the same, or None
    (value, allowed)           a plain value that must be one of the allowed ones (an `out_dtype`)

Checks run at every call of every operation, one token at a time when decoding, so they cost a microsecond per
argument: specifications are parsed once and messages are only built when something is wrong.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

FLOATS: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
FLOAT32: tuple[torch.dtype, ...] = (torch.float32,)
OUT_DTYPES: tuple[torch.dtype | None, ...] = (None, torch.bfloat16, torch.float32)  # None: as the input
INT64: tuple[torch.dtype, ...] = (torch.int64,)


@functools.cache
def _parse(dims: str) -> tuple[bool, bool, tuple[str | int, ...]]:
    """Return (None is allowed, leading dimensions are free, the named dimensions)."""
    optional = dims.startswith("?")
    words = dims.removeprefix("?").split()
    free = bool(words) and words[0] == "..."
    return optional, free, tuple(int(word) if word.isdigit() else word for word in words[1 if free else 0 :])


def describe(value: object) -> str:
    """Return a short text for an argument in an error message: its class or dtype, and its shape."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if hasattr(value, "codes"):
        return f"{type(value).__name__} {list(value.shape)}"  # type: ignore[attr-defined]
    return f"{type(value).__name__} {value!r}"


def _name(allowed: Any) -> str:
    return str(getattr(allowed, "__name__", allowed)).removeprefix("torch.")


def _names(allowed: tuple[Any, ...]) -> str:
    return " or ".join(_name(one) for one in allowed)


def _mismatch(op: str, argument: str, value: Any, dims: str, bound: dict[str, int], given: dict[str, Any]) -> str:
    known = ", ".join(f"{name} = {size}" for name, size in bound.items())
    others = "; ".join(f"{name} is {describe(spec[0])}" for name, spec in given.items() if isinstance(spec[1], str))
    return (
        f"{op}: {argument} must be [{', '.join(dims.removeprefix('?').split())}]{f' with {known}' if known else ''}; "
        f"got {describe(value)}. The call's arguments: {others}. Pass tensors whose equally named dimensions agree."
    )


def check(op: str, /, **given: Any) -> dict[str, int]:
    """Check the arguments of an operation and return the sizes of the named dimensions.

    Args:
        op: the operation's name, which starts every message.
        **given: argument name → specification, as in the file header.

    Returns:
        The size bound to each dimension name.

    Raises:
        TypeError: a value is not a tensor or container, or has a dtype or class that is not allowed.
        ValueError: a shape does not fit, a plain value is not allowed, or tensors are on different devices.
    """
    bound: dict[str, int] = {}
    device: torch.device | None = None
    for argument, spec in given.items():
        value, dims = spec[0], spec[1]
        if type(dims) is not str:
            if value not in dims:
                raise ValueError(f"{op}: {argument} must be {_names(dims)}; got {_name(value)}. Pass one of these.")
            continue
        optional, free, wanted = _parse(dims)
        if value is None and optional:
            continue
        is_tensor = isinstance(value, torch.Tensor)
        if not is_tensor and not hasattr(value, "codes"):  # what every quantized container has
            raise TypeError(f"{op}: {argument} must be a tensor or a quantized container; got {describe(value)}.")
        if len(spec) > 2 and (value.dtype if is_tensor else type(value)) not in spec[2]:
            raise TypeError(
                f"{op}: {argument} must be {_names(spec[2])}; got {describe(value)}. Convert it before the call, or "
                f"call the operation that takes what you have."
            )
        shape = value.shape
        if free and len(shape) >= len(wanted):
            shape = shape[len(shape) - len(wanted) :]
        if len(shape) != len(wanted):
            raise ValueError(_mismatch(op, argument, value, dims, bound, given))
        for size, dim in zip(shape, wanted, strict=True):
            if size != (bound.setdefault(dim, size) if type(dim) is str else dim):
                raise ValueError(_mismatch(op, argument, value, dims, bound, given))
        if device is None:
            device = value.device
        elif device != value.device:
            raise ValueError(
                f"{op}: all arguments must be on one device; {argument} is on {value.device} and others on {device}. "
                f"Move them with .to(device)."
            )
    return bound
