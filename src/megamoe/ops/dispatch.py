# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operation runs: one rule and one table.

    cpu    the operation's reference
    cuda   KERNELS[op][arch], else an error

There is no ranking and no fall-back: every implementation gives the operation's meaning, and a missing one is an error
that says what to do. Two switches exist for `verify` and for tests, and both hold for the thread and the `with` block
that set them: `use("reference")` runs references everywhere, `watch(observer)` wraps every operation call.

While torch traces (torch.compile, torch.export), an operation that kernels exist for is one node of the graph, the
custom operator `torch.ops.megamoe.<op>`: shapes come from its fake implementation, and the rule above is applied when
the graph runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch

from megamoe.formats.fragment_layout import CodeLayout, fits_fragments
from megamoe.kernels import KERNELS, WEIGHT_LAYOUTS

_USED: ContextVar[str] = ContextVar("used_implementation", default="device")

Run = Callable[..., Any]
"""What computes an operation: a reference, or a kernel's `run`. All of an operation take the same arguments."""

Observer = Callable[[str, Run, Run], Run]
"""(operation, what would run, its reference) → what runs instead; `run` itself where the call is of no interest."""

_OBSERVERS: ContextVar[tuple[Observer, ...]] = ContextVar("observers", default=())


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


@contextlib.contextmanager
def watch(observer: Observer, *, outermost: bool = False) -> Iterator[None]:
    """Let an observer wrap every operation that is called inside the `with` block, on every device.

        def record(op, run, reference):
            def recorded(*args):
                calls.append((op, args))
                return run(*args)
            return recorded

        with megamoe.ops.watch(record):
            model(batch, cache)

    A recorder, a guard that is suspended inside references, and a comparison of a kernel with its reference need
    nothing else. Operations that a reference calls are watched like any other. Of nested blocks, the inner
    observer stands nearer to the operation: the outer one gets what the inner one made as its `run`.

    While torch traces, nothing is watched; the operators of the traced graph are when it runs.

    Args:
        observer: is asked at every call; the callable that it returns gets the arguments that the door passes on, and
            its result is the operation's.
        outermost: the observer stands outside of those of the blocks around, and sees what they make of operations.
    """
    others = _OBSERVERS.get()
    token = _OBSERVERS.set((*others, observer) if outermost else (observer, *others))
    try:
        yield
    finally:
        _OBSERVERS.reset(token)


@functools.cache
def _arch(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


_LIBRARY = torch.library.Library("megamoe", "FRAGMENT")
_TRACED: dict[str, Callable[..., Any]] = {}


def traced(
    op: str,
    schemas: dict[str, str],
    implementations: dict[str, Callable[..., Any]],
    fakes: dict[str, Callable[..., Any]],
    call: Callable[..., Any] | None = None,
) -> None:
    """Register an operation's custom operators, and what `pick` returns while torch traces.

    An operation has several operators where it returns different tensors for different arguments: an operator may
    not return one of its inputs.

    Args:
        op: the operation's name.
        schemas: operator → its schema without the name, "(Tensor x) -> Tensor".
        implementations: operator → tensors from tensors, on any device; it calls `pick` itself.
        fakes: operator → empty tensors of the right shapes and dtypes.
        call: takes what the reference takes, calls the operators, returns what the reference returns. None where the
            operator of the operation's name does.
    """
    for name, schema in schemas.items():
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, implementations[name], "CompositeExplicitAutograd")
        torch.library.register_fake(f"megamoe::{name}", fakes[name], lib=_LIBRARY)
    _TRACED[op] = getattr(torch.ops.megamoe, op) if call is None else call


def pick(op: str, device: torch.device, reference: Run) -> Run:
    """Return the callable that computes `op` on `device`, wrapped by the observers of `watch`.

    Args:
        op: the operation's name, the key of `KERNELS`.
        device: where the operation's tensors are.
        reference: the operation's plain-torch meaning.

    Raises:
        NotImplementedError: the device has no implementation of the operation.
    """
    is_traced = torch.compiler.is_compiling()
    if is_traced and op in _TRACED:
        return _TRACED[op]
    run = reference if device.type == "cpu" or _USED.get() == "reference" else _kernel(op, device)
    if not is_traced:
        for observer in _OBSERVERS.get():
            run = observer(op, run, reference)
    return run


def _kernel(op: str, device: torch.device) -> Run:
    """Return what the table names for an operation on a device."""
    if device.type != "cuda":
        raise NotImplementedError(
            f"{op}: runs on cpu and cuda devices; got {device}. Move the tensors to the CPU, or run the reference "
            f'there with `with megamoe.ops.use("reference")`.'
        )
    arch = _arch(device)
    table = KERNELS.get(op, {})
    module = table.get(arch)
    if module is None:
        raise NotImplementedError(
            f"{op}: there is no kernel for {arch}; kernels exist for {', '.join(table) or 'no architecture'}. Run it "
            f'by its reference with `with megamoe.ops.use("reference")` (slow), or on the CPU.'
        )
    run: Run = importlib.import_module(module).run
    return run


# What is done before a model is said to be ready. The rooms above operations do not see kernels.

Calls = Iterable[tuple[str, Mapping[str, int]]]
"""(operation, sizes of its named dimensions), as in models/*/shapes.py."""


def uses_kernels(device: torch.device) -> bool:
    """Return whether operations on a device run kernels; on the CPU and under `use("reference")` they do not."""
    return device.type == "cuda" and _USED.get() != "reference"


def _store(device: torch.device) -> Any:
    return importlib.import_module("megamoe.kernels.store").store_of(device)


def weight_layout(op: str, device: torch.device) -> CodeLayout:
    """Return the order in which an operation's kernel takes NVFP4 weights on a device."""
    if not uses_kernels(device):
        return CodeLayout.ROW_MAJOR
    return WEIGHT_LAYOUTS.get(op, {}).get(_arch(device), CodeLayout.ROW_MAJOR)


def require(calls: Calls, device: torch.device, *, what: str) -> None:
    """Refuse a model that a device has not all kernels for, naming every operation that is missing.

    Args:
        calls: everything the model will call.
        device: where it is to run.
        what: how the message calls the model.

    Raises:
        NotImplementedError: an operation has no kernel on the device, or a weight does not fit the layout that its
            kernel takes.
    """
    if not uses_kernels(device):
        return
    target = _store(device).target  # refuses a device that no kernel is compiled for
    plan = importlib.import_module("megamoe.kernels.plan")
    calls = list(calls)
    ops = sorted({op for op, _ in calls})
    missing = [op for op in ops if plan.module_for(op, target) is None]
    misfits = [
        f"{op} of {num_rows} x {num_columns} (N must be a multiple of 16, K of 64)"
        for op, dims in calls
        if op not in missing and weight_layout(op, device) is CodeLayout.FRAGMENT_16X64
        for num_rows, num_columns in _matrices(dims)
        if not fits_fragments(num_rows, num_columns)
    ]
    if missing or misfits:
        present = [op for op in ops if op not in missing]
        names = ", ".join([*missing, *dict.fromkeys(misfits)])
        raise NotImplementedError(
            f"{what} on {device} ({target}): {len(missing)} of the {len(ops)} operations it calls have no kernel: "
            f"{names}. There are kernels for {', '.join(present) or 'none of them'}. A model needs all of them, and "
            "nothing falls back. Run it by its references on the CPU: --device cpu, or device='cpu'."
        )


def _matrices(dims: Mapping[str, int]) -> list[tuple[int, int]]:
    """Return the sizes of the weights of a linear, a grouped linear or experts."""
    return [(dims["N"], dims["K"])] if "N" in dims else [(dims["F"], dims["D"]), (dims["D"], dims["F"])]


def open_pack(path: pathlib.Path, device: torch.device, *, version: str | None = None) -> None:
    """Load kernels for a device from a pack before looking anywhere else.

    Args:
        path: the pack's directory.
        device: a CUDA device.
        version: megamoe's version; a pack of another one is refused. None for the one that runs.

    Raises:
        ValueError: the device is not a CUDA device, or the pack is damaged, foreign or for another architecture.
    """
    if not uses_kernels(device):
        raise ValueError(f"open_pack: a kernel pack is for a CUDA device; got {device}. Leave --pack out.")
    if version is None:  # the package is there already when a module of it runs: it is looked up and not imported
        version = str(sys.modules[__name__.partition(".")[0]].__version__)
    _store(device).use_pack(path, version=version)


def warm_up(calls: Calls, device: torch.device) -> None:
    """Load, and compile where necessary, every kernel that some operation calls need; on the CPU there is none.

    Nothing is run, so no data is needed. Operations without a kernel on the device are passed over here and refused
    when they are called.

    Args:
        calls: (operation, sizes of its named dimensions), as in models/*/shapes.py.
        device: where the model is.
    """
    if uses_kernels(device):
        store = _store(device)
        plan = importlib.import_module("megamoe.kernels.plan")
        store.warm_up(plan.requests_for(calls, store.target))


def prepare(calls: Calls, device: torch.device, *, what: str, pack: pathlib.Path | None = None) -> None:
    """Do everything about a model's kernels that needs no weight: refuse, open the pack, load or compile all.

    Args:
        calls: everything the model will call.
        device: where it is to run.
        what: how messages call the model.
        pack: a kernel pack to look into first.

    Raises:
        NotImplementedError: see `require`.
        ValueError: see `open_pack`; or a kernel has to be compiled and cannot be.
    """
    calls = list(calls)
    require(calls, device, what=what)
    if pack is not None:
        open_pack(pack, device)
    if uses_kernels(device):
        _store(device).reopen()
        warm_up(calls, device)


def seal(device: torch.device) -> None:
    """From now on, refuse to load or compile a kernel that is not loaded yet."""
    if uses_kernels(device):
        _store(device).seal()


def explain(device: torch.device) -> str:
    """Return what was loaded, from where and how long it took, as a Markdown table."""
    return str(_store(device).explain()) if uses_kernels(device) else f"{device}: references, no kernels"


def ledger(device: torch.device) -> list[dict[str, Any]]:
    """Return the rows of `explain`: kernel, key, seconds, origin."""
    if not uses_kernels(device):
        return []
    return [
        {
            "kernel": one.request.module,
            "key": dict(one.request.values),
            "seconds": round(one.seconds, 3),
            "origin": one.origin,
        }
        for one in _store(device).ledger
    ]
