# SPDX-License-Identifier: Apache-2.0
"""Where a running program gets its kernels from, and the ledger of what it got.

A kernel is looked for in this order: already loaded; in a pack; in the disk cache; compiled now and put into the disk
cache. Each first use writes a line into the ledger: what, how long, from where. After `seal()`, which a server calls
when it has warmed up everything it will use, a kernel that is not loaded yet raises instead: a compile would stop all
requests for seconds, and a kernel nobody warmed up is a shape nobody tested.

Environment   MEGAMOE_CACHE_DIR   the disk cache (default: ~/.cache/megamoe). Changes no result.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import os
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from megamoe.kernels.compile import (
    Request,
    compile_objects,
    dsl_version,
    require_target,
    sha256_of,
    source_hash,
    unique,
)
from megamoe.kernels.pack import Pack, PackError, open_pack

TARGET_OF_CAPABILITY = {(9, 0): "sm90a", (10, 0): "sm100a", (10, 3): "sm103a"}
Launch = Callable[..., None]


class SealedError(RuntimeError):
    """A kernel was asked for after the program had said that it has all it needs."""


@dataclasses.dataclass(frozen=True)
class LedgerEntry:
    """One kernel that was loaded.

    Attributes:
        request: module and compile key.
        origin: "pack", "disk cache" or "compiled".
        seconds: until it could be launched.
    """

    request: Request
    origin: str
    seconds: float


class KernelStore:
    """The kernels of one architecture in one process.

    Args:
        target: "sm90a", "sm100a" or "sm103a".
        cache_dir: the disk cache.
        loader: makes a callable of a library and a symbol; tests replace it.

    Attributes:
        num_taken: how often a kernel was taken to be launched; the replay of a graph takes none.
    """

    def __init__(
        self,
        target: str,
        cache_dir: pathlib.Path,
        loader: Callable[[pathlib.Path, str], Launch] | None = None,
    ) -> None:
        """Start empty and unsealed."""
        require_target(target)
        self.target = target
        self.cache_dir = cache_dir
        self.ledger: list[LedgerEntry] = []
        self.num_taken = 0
        self._loader = load_library if loader is None else loader
        self._packs: list[Pack] = []
        self._loaded: dict[Request, Launch] = {}
        self._compiled: dict[Request, float] = {}  # compiled by warm_up and not loaded yet: seconds
        self._sealed = False
        self._lock = threading.Lock()

    def use_pack(self, path: pathlib.Path, *, version: str) -> Pack:
        """Open a pack and look into it from now on before anything else.

        Raises:
            PackError: it is damaged, foreign, or for another architecture.
        """
        pack = open_pack(path, version=version)
        if pack.target != self.target:
            raise PackError(
                f"kernel pack {path}: is for {pack.target}, this GPU is {self.target}. Build one with "
                f"megamoe compile --arch {self.target}."
            )
        self._packs.append(pack)
        return pack

    def get(self, request: Request) -> Launch:
        """Return a kernel, loading or compiling it if this is its first use.

        Raises:
            SealedError: it is not loaded and the store is sealed.
            CompileError: it has to be compiled and cannot be.
        """
        found = self._loaded.get(request)
        if found is not None:
            return found
        with self._lock:
            if request not in self._loaded:
                if self._sealed:
                    raise SealedError(
                        f"{request}: was not loaded before the store was sealed, and loading it now would stall every "
                        "request. Add it to the warm-up; megamoe serve --explain lists what was warmed up."
                    )
                self._load(request)
            return self._loaded[request]

    def warm_up(self, requests: Iterable[Request]) -> None:
        """Load kernels before they are needed; those to be compiled are compiled together, in parallel."""
        wanted = [one for one in unique(requests) if one not in self._loaded]
        with self._lock:
            if wanted and self._sealed:
                raise SealedError(f"{wanted[0]}: was not loaded before the store was sealed. Warm up before seal().")
            missing = [one for one in wanted if self._packed(one) is None and not self._cached(one).is_file()]
            self._compile(missing)
            for request in wanted:
                self._load(request)

    def seal(self) -> None:
        """From now on, refuse to load or compile anything new."""
        with self._lock:  # not in the middle of a load
            self._sealed = True

    def reopen(self) -> None:
        """Take kernels again, because another model is being loaded in this process; what is loaded stays."""
        with self._lock:
            self._sealed = False

    @property
    def sealed(self) -> bool:
        """Whether the store is sealed."""
        return self._sealed

    def explain(self) -> str:
        """Return the ledger as a Markdown table."""
        lines = ["| kernel | seconds | origin |", "| --- | --- | --- |"]
        lines += [f"| {one.request} | {one.seconds:.3f} | {one.origin} |" for one in self.ledger]
        state = "sealed" if self._sealed else "not sealed"
        lines.append(f"{len(self.ledger)} kernels for {self.target}, {state}")
        return "\n".join(lines)

    def _load(self, request: Request) -> None:
        start = time.perf_counter()
        packed = self._packed(request)
        if packed is not None:
            path, origin = packed, "pack"
        else:
            path, origin = self._cached(request), "disk cache"
            if not path.is_file():
                self._compile([request])
                origin = "compiled"
            elif sha256_of(path) != (path.parent / DIGEST).read_text():
                raise PackError(f"kernel cache: {path} ({request}) is damaged. Delete its folder and start again.")
        if request in self._compiled:
            start, origin = start - self._compiled.pop(request), "compiled"
        self._loaded[request] = self._loader(path, request.symbol)
        self.ledger.append(LedgerEntry(request, origin, time.perf_counter() - start))

    def _packed(self, request: Request) -> pathlib.Path | None:
        for pack in self._packs:
            if request in pack.objects:
                return pack.objects[request].path
        return None

    def _folder(self, request: Request) -> pathlib.Path:
        """Return the cache folder: target, DSL version and source hash are in its name, the key in the file's."""
        return self.cache_dir / "kernels" / f"{self.target}-dsl{dsl_version()}-{source_hash(request.module)[:24]}"

    def _cached(self, request: Request) -> pathlib.Path:
        return self._folder(request) / request.symbol / f"{request.symbol}.so"

    def _compile(self, requests: list[Request]) -> None:
        """Compile into the cache. Library and digest appear together, whatever other processes do meanwhile."""
        if not requests:
            return
        (self.cache_dir / "kernels").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".compile-", dir=self.cache_dir / "kernels") as scratch:
            for built in compile_objects(requests, self.target, pathlib.Path(scratch)):
                entry, final = pathlib.Path(scratch) / built.request.symbol, self._cached(built.request).parent
                entry.mkdir()
                built.path.rename(entry / built.path.name)
                (entry / DIGEST).write_text(sha256_of(entry / built.path.name))
                final.parent.mkdir(exist_ok=True)
                if not _move_if_free(entry, final):
                    continue  # another process was quicker; its object is as good
                self._compiled[built.request] = built.seconds


DIGEST = "sha256"


def _move_if_free(source: pathlib.Path, target: pathlib.Path) -> bool:
    """Rename a folder unless the target is there already; return whether it was renamed."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        return False
    return True


def default_cache_dir() -> pathlib.Path:
    """Return the disk cache of this user."""
    named = os.environ.get("MEGAMOE_CACHE_DIR")
    return pathlib.Path(named) if named else pathlib.Path.home() / ".cache" / "megamoe"


def target_of(device: torch.device) -> str:
    """Return the compile target of a CUDA device.

    Raises:
        NotImplementedError: no kernel is compiled for its architecture.
    """
    capability = torch.cuda.get_device_capability(device)
    target = TARGET_OF_CAPABILITY.get(capability)
    if target is None:
        known = ", ".join(f"{major}.{minor}" for major, minor in TARGET_OF_CAPABILITY)
        raise NotImplementedError(
            f"kernels: {torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; "
            f'kernels exist for {known}. Use the CPU, or the references: with megamoe.ops.use("reference").'
        )
    return target


@functools.cache
def store_for(target: str) -> KernelStore:
    """Return this process's store for an architecture."""
    return KernelStore(target, default_cache_dir())


@functools.cache
def store_of(device: torch.device) -> KernelStore:
    """Return this process's store for the architecture of a device."""
    return store_for(target_of(device))


def architecture_of(device: torch.device) -> str:
    """Return the architecture of a CUDA device as the support table names it."""
    return store_of(device).target.rstrip("a")


def kernel(config: Any, device: torch.device) -> Launch:
    """Return the kernel for a config: what every `run` calls.

    Args:
        config: its compile key.
        device: where the tensors are.
    """
    store = store_of(device)
    store.num_taken += 1
    return store.get(Request.of(config))


@functools.cache
def _load_runtime() -> Any:
    """Load the libraries that objects refer to, for everyone in this process, and return tvm_ffi."""
    if importlib.util.find_spec("tvm_ffi") is None:
        raise PackError("kernels: apache-tvm-ffi is not installed, and objects are loaded with it. pip install it.")
    tvm_ffi = importlib.import_module("tvm_ffi")
    ctypes.CDLL(str(_runtime_library()), mode=ctypes.RTLD_GLOBAL)
    return tvm_ffi


def _runtime_library() -> pathlib.Path:
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    places = [] if spec is None else [pathlib.Path(place) for place in spec.submodule_search_locations or []]
    # cu13 first: its cubins are what we build, and drivers before CUDA 13 are not supported.
    found = [path for place in places for path in sorted(place.glob("cu*/lib/libcute_dsl_runtime.so"), reverse=True)]
    if not found:
        raise PackError(
            "kernels: libcute_dsl_runtime.so is not installed, and objects are linked to it. Install "
            "nvidia-cutlass-dsl-libs-cu13 (pip install --no-deps; the compiler is not needed)."
        )
    return found[0]


def load_library(path: pathlib.Path, symbol: str) -> Launch:
    """Load an object and return its function."""
    function: Launch = _load_runtime().load_module(str(path))[symbol]
    return function
