# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operation runs: one rule and one table.

    cpu    the operation's reference
    cuda   KERNELS[op][arch], else KERNELS[op]["portable"], else an error

There is no ranking and no fall-back: every implementation gives the operation's meaning, and a missing one is an error
that says what to do. `use("reference")` is the only process-wide switch; it exists for `verify` and for tests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from megamoe.kernels import KERNELS

_USED: ContextVar[str] = ContextVar("used_implementation", default="device")


@contextlib.contextmanager
def use(implementation: str) -> Iterator[None]:
    """Run every operation inside the `with` block by its reference, wherever its tensors are.

    Args:
        implementation: "reference", or "device" for the ordinary rule.

    Raises:
        ValueError: another name was given.
    """
    if implementation not in ("reference", "device"):
        raise ValueError(f"use: implementation must be 'reference' or 'device'; got {implementation!r}.")
    token = _USED.set(implementation)
    try:
        yield
    finally:
        _USED.reset(token)


@functools.cache
def _arch(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def pick(op: str, device: torch.device, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Return the callable that computes `op` on `device`.

    Args:
        op: the operation's name, the key of `KERNELS`.
        device: where the operation's tensors are.
        reference: the operation's plain-torch meaning.

    Raises:
        NotImplementedError: the device has no implementation of the operation.
    """
    if device.type == "cpu" or _USED.get() == "reference":
        return reference
    if device.type != "cuda":
        raise NotImplementedError(
            f"{op}: runs on cpu and cuda devices; got {device}. Move the tensors to the CPU, or run the reference "
            f'there with `with megamoe.ops.use("reference")`.'
        )
    arch = _arch(device)
    table = KERNELS.get(op, {})
    module = table.get(arch) or table.get("portable")
    if module is None:
        raise NotImplementedError(
            f"{op}: there is no kernel for {arch}; kernels exist for {', '.join(table) or 'no architecture'}. Run it "
            f'by its reference with `with megamoe.ops.use("reference")` (slow), or on the CPU.'
        )
    run: Callable[..., Any] = importlib.import_module(module).run
    return run
