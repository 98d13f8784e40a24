# SPDX-License-Identifier: Apache-2.0
"""The only place that compiles kernels: what a compile key is, and the processes that turn keys into objects.

A kernel is three files. `rows/rms_norm_config.py` has a frozen dataclass `Config`, whose fields are the compile key
(dtypes, static sizes, tile choices), and how work is shared out for it. `rms_norm_device.py` has `program(config)`,
which returns the CuTe DSL function and its symbolic arguments; only that half imports the DSL, and only this file
imports that half. So a machine that serves needs neither the DSL nor a compiler. `rms_norm.py` chooses a `Config`,
allocates outputs and launches; no object depends on it, so a border or a tile choice in it is changed without building
anything anew.

Every object is built the same way, whether it goes into the cache of this machine or into a pack for another one: in a
process of its own, ahead of time, through TVM-FFI, and linked with the C compiler. One architecture per process: the
DSL reads it from the environment when it is imported. What a developer tests is therefore what a server loads.

Environment   MEGAMOE_COMPILE_WORKERS   compiling processes (default: one per core, at most 8). Changes no result.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

TARGETS = {"sm90a": "sm_90a", "sm100a": "sm_100a", "sm103a": "sm_103a"}
"""Names on our command line → names of the compiler."""

PACKAGE = "megamoe.kernels."
CONFIG, DEVICE = "_config", "_device"  # behind a kernel's name: the files that an object is made of
DSL_DISTRIBUTION = "nvidia-cutlass-dsl"
OPTIONS = "--enable-tvm-ffi"
RECIPE = 1  # raised when this file builds objects in another way, so that old ones are not taken for new
MAX_WORKERS = 8

Scalar = str | int | bool | float | None


class CompileError(ValueError):
    """A kernel could not be compiled, or nothing to compile with is installed; the message has the compiler's words."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One kernel to compile or to load: its name and the values of its compile key.

    Attributes:
        module: the kernel's name below `megamoe.kernels`, for example "rows.rms_norm".
        values: (field, value) pairs of the module's `Config`, in its order.
    """

    module: str
    values: tuple[tuple[str, Scalar], ...]

    @staticmethod
    def of(config: Any) -> Request:
        """Return the request for a config: its kernel is the one whose file its class is in."""
        values = tuple((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
        return Request(type(config).__module__.removeprefix(PACKAGE).removesuffix(CONFIG), values)

    def __str__(self) -> str:
        """Return the key as text: it names the object everywhere."""
        return f"{self.module}[{','.join(f'{name}={value}' for name, value in self.values)}]"

    @property
    def symbol(self) -> str:
        """Name of the function inside the object."""
        return "megamoe_" + hashlib.sha256(str(self).encode()).hexdigest()[:16]

    def config(self) -> Any:
        """Return the kernel's `Config` with these values."""
        return importlib.import_module(PACKAGE + self.module + CONFIG).Config(**dict(self.values))


@functools.cache
def source_hash(module: str) -> str:
    """Return a digest of everything that decides what an object of this kernel computes, except compiler and key.

    That is its config, its device half and every file of kernels/ that they import, directly or not.
    """
    root = pathlib.Path(__file__).parent
    files: set[pathlib.Path] = set()
    todo = [module + CONFIG, module + DEVICE]
    while todo:
        path = root.joinpath(*todo.pop().split(".")).with_suffix(".py")
        if path.is_file() and path not in files:
            files.add(path)
            todo += imported(path)
    digest = hashlib.sha256(f"{RECIPE} {OPTIONS}".encode())
    for path in sorted(files):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


MACHINERY = {"compile", "pack", "plan", "store"}
"""Modules of this package that move objects about and are not part of any."""


def imported(path: pathlib.Path) -> list[str]:
    """Return the modules below this package that a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found += [name.removeprefix(PACKAGE) for name in names if name.startswith(PACKAGE)]
    return [name for name in found if name not in MACHINERY]


def dsl_version() -> str | None:
    """Return the version of the installed CuTe DSL, or None if it is not installed."""
    try:
        return importlib.metadata.version(DSL_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def sha256_of(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def require_target(target: str) -> None:
    """Refuse targets that no kernel is compiled for."""
    if target not in TARGETS:
        raise ValueError(f"compile: --arch must be one of {', '.join(TARGETS)}; got {target!r}. sm90a is Hopper.")


def num_workers(num_requests: int) -> int:
    """Return how many processes compile that many kernels."""
    wanted = os.environ.get("MEGAMOE_COMPILE_WORKERS", "")
    if wanted and not (wanted.isdigit() and int(wanted) > 0):
        raise ValueError(
            f"MEGAMOE_COMPILE_WORKERS must be a positive number; got {wanted!r}. Unset it for the default."
        )
    return max(1, min(num_requests, int(wanted) if wanted else min(MAX_WORKERS, os.cpu_count() or 1)))


@dataclasses.dataclass(frozen=True)
class Built:
    """One object that was built.

    Attributes:
        request: what it is.
        path: the shared library.
        seconds: tracing, compiling and linking.
        ptx, cubin: kept beside the library when asked for.
    """

    request: Request
    path: pathlib.Path
    seconds: float
    ptx: pathlib.Path | None = None
    cubin: pathlib.Path | None = None


def compile_objects(
    requests: Sequence[Request], target: str, directory: pathlib.Path, *, keep_code: bool = False
) -> list[Built]:
    """Compile kernels into `directory`, one shared library each, called by its symbol.

    Args:
        requests: what to compile.
        target: a key of TARGETS. The machine needs no GPU.
        directory: exists.
        keep_code: also write PTX and cubin, for tests that read them.

    Raises:
        ValueError: there is no such target.
        CompileError: the DSL or a C compiler is missing, or a kernel does not compile.
    """
    require_target(target)
    _require_tools()
    if not requests:
        return []
    environment = {**os.environ, "CUTE_DSL_ARCH": TARGETS[target]}
    environment["PYTHONPATH"] = os.pathsep.join(  # a process of ours finds what we were imported from
        [str(pathlib.Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    with tempfile.TemporaryDirectory(prefix="megamoe-compile-") as scratch:
        count = num_workers(len(requests))
        parts = [list(requests[start::count]) for start in range(count)]
        processes = []
        for index, part in enumerate(parts):
            order = pathlib.Path(scratch) / f"{index}.json"
            order.write_text(
                json.dumps(
                    {
                        "requests": [[one.module, one.values] for one in part],
                        "directory": str(directory),
                        "keep_code": keep_code,
                        "result": f"{order}.out",
                    }
                )
            )
            if keep_code:  # a folder of its own: the DSL's file names do not tell all kernels apart
                dumps = pathlib.Path(scratch) / f"{index}.dumps"
                dumps.mkdir()
                environment |= {"CUTE_DSL_KEEP": "ptx,cubin", "CUTE_DSL_DUMP_DIR": str(dumps)}
            log = open(f"{order}.log", "w+", encoding="utf-8")  # noqa: SIM115 (closed below, after the process)
            command = [sys.executable, "-m", "megamoe.kernels.compile", str(order)]
            processes.append((subprocess.Popen(command, env=environment, stdout=log, stderr=log), log, order))
        built: list[Built] = []
        failures = []
        for process, log, order in processes:
            status = process.wait()
            log.seek(0)
            text = log.read()
            log.close()
            if status:
                failures.append(text[-4000:])
                continue
            for module, values, seconds in json.loads(pathlib.Path(f"{order}.out").read_text()):
                request = Request(module, tuple((name, value) for name, value in values))
                path = directory / f"{request.symbol}.so"
                code = (path.with_suffix(".ptx"), path.with_suffix(".cubin")) if keep_code else (None, None)
                built.append(Built(request, path, seconds, *code))
        if failures:
            raise CompileError(f"compile: a kernel for {target} does not compile:\n" + "\n".join(failures))
    order_of = {request: position for position, request in enumerate(requests)}
    return sorted(built, key=lambda one: order_of[one.request])


def _require_tools() -> None:
    if dsl_version() is None:
        raise CompileError(
            f"compile: {DSL_DISTRIBUTION} is not installed here. Install megamoe[cuda], or build a pack on a machine "
            "that has it (megamoe compile --model ... --arch ... --out PACK) and pass it with --pack."
        )
    if _c_compiler() is None:
        raise CompileError("compile: no C compiler (gcc or cc) is on PATH to link kernels with. Install one.")


def _c_compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("cc")


# What follows runs in the compiling process.


def _build(request: Request, directory: pathlib.Path, keep_code: bool) -> None:
    cute = importlib.import_module("cutlass.cute")
    device_half = importlib.import_module(PACKAGE + request.module + DEVICE)
    function, arguments = device_half.program(request.config())
    compiled = cute.compile(function, *arguments, options=OPTIONS)
    library = directory / f"{request.symbol}.so"
    with tempfile.TemporaryDirectory(prefix="megamoe-link-") as scratch:
        compiled.export_to_c(f"{scratch}/kernel.o", function_name=request.symbol)
        # The runtime libraries stay undefined here and are loaded first where the object is used (store.py): no path
        # of the building machine gets into the object.
        linked = pathlib.Path(scratch) / "kernel.so"
        subprocess.run([str(_c_compiler()), "-shared", "-o", str(linked), f"{scratch}/kernel.o"], check=True)
        partial = directory / f".{request.symbol}.{os.getpid()}"
        shutil.copyfile(linked, partial)
        partial.replace(library)  # never a half-written library under its final name
    if keep_code:
        library.with_suffix(".ptx").write_text(compiled.__ptx__)
        library.with_suffix(".cubin").write_bytes(compiled.__cubin__)


def _work(order_path: str) -> None:
    order = json.loads(pathlib.Path(order_path).read_text())
    results = []
    for module, values in order["requests"]:
        request = Request(module, tuple((name, value) for name, value in values))
        print(f"compiling {request}", flush=True)
        start = time.perf_counter()
        _build(request, pathlib.Path(order["directory"]), order["keep_code"])
        results.append([module, values, time.perf_counter() - start])
    pathlib.Path(order["result"]).write_text(json.dumps(results))


def unique(requests: Iterable[Request]) -> list[Request]:
    """Return the requests without repetitions, in order."""
    return list(dict.fromkeys(requests))


if __name__ == "__main__":
    _work(sys.argv[1])
