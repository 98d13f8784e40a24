# SPDX-License-Identifier: Apache-2.0
"""Kernel packs: a directory of compiled kernels and a manifest that says what they are.

    PACK/manifest.json      format, target, versions, and per object its key, source hash, file name and SHA-256
    PACK/<symbol>.so        one shared library per kernel, without a path of the machine that built it

A pack is built on any machine (`megamoe compile`) and loaded where neither the DSL nor a compiler is installed. It is
refused, by name and before anything of it is loaded, when it is for another architecture, was built from other kernel
sources, or an object is missing, damaged or not listed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Sequence

from megamoe.kernels.compile import (
    CONFIG,
    Request,
    compile_objects,
    dsl_version,
    require_target,
    sha256_of,
    source_hash,
)

FORMAT = 1
MANIFEST = "manifest.json"


class PackError(ValueError):
    """A pack is damaged, or is not for this program or this GPU."""


@dataclasses.dataclass(frozen=True)
class PackObject:
    """One kernel of a pack: its request and the library it is in."""

    request: Request
    path: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Pack:
    """An opened pack.

    Attributes:
        path: its directory.
        target: the architecture it is for, "sm90a" for example.
        dsl: version of the DSL that compiled it.
        objects: request → object.
    """

    path: pathlib.Path
    target: str
    dsl: str
    objects: dict[Request, PackObject]


def build_pack(requests: Sequence[Request], target: str, path: pathlib.Path, *, version: str, model: str) -> Pack:
    """Compile kernels into a new pack.

    Args:
        requests: the kernels.
        target: "sm90a", "sm100a" or "sm103a".
        path: the pack's directory; it must not exist or be empty, or hold an older pack, which is replaced.
        version: megamoe's version.
        model: what the kernels were collected for, for the reader of the manifest.

    Raises:
        PackError: there is something else than a pack at `path`.
        CompileError: a kernel does not compile.
    """
    require_target(target)
    if path.exists() and not (path / MANIFEST).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise PackError(f"compile: --out {path} exists and is not a kernel pack. Name a new directory.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        fresh = pathlib.Path(scratch) / "pack"
        fresh.mkdir()
        built = compile_objects(requests, target, fresh)
        manifest = {
            "format": FORMAT,
            "target": target,
            "megamoe": version,
            "dsl": dsl_version(),
            "model": model,
            "objects": [
                {
                    "module": one.request.module,
                    "config": dict(one.request.values),
                    "key": str(one.request),
                    "source": source_hash(one.request.module),
                    "file": one.path.name,
                    "sha256": sha256_of(one.path),
                    "seconds": round(one.seconds, 3),
                }
                for one in built
            ],
        }
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if path.exists():
            path.rename(pathlib.Path(scratch) / "replaced")
        os.rename(fresh, path)
    return open_pack(path, version=version)


def open_pack(path: pathlib.Path, *, version: str) -> Pack:
    """Read and check a pack; nothing of it is loaded.

    Args:
        path: its directory.
        version: megamoe's version, which must be the pack's.

    Raises:
        PackError: the manifest or an object is missing, damaged or foreign; the message names it.
    """
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise PackError(f"kernel pack {path}: there is no {MANIFEST}. Build one with megamoe compile --out {path}.")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise PackError(
                f"kernel pack {path}: its format is {manifest['format']!r}; this program reads {FORMAT}. Rebuild it."
            )
        require_target(manifest["target"])
        entries = [
            (Request(str(one["module"]), tuple(one["config"].items())), str(one["source"]), str(one["file"]), one)
            for one in manifest["objects"]
        ]
        pack = Pack(path, str(manifest["target"]), str(manifest["dsl"]), {})
        built_by = str(manifest["megamoe"])
        digests = {file: str(one["sha256"]) for _, _, file, one in entries}
        keys = {file: str(one["key"]) for _, _, file, one in entries}
    except PackError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PackError(f"kernel pack {path}: {MANIFEST} is damaged ({error!r}). Rebuild the pack.") from error
    if built_by != version:
        raise PackError(f"kernel pack {path}: was built by megamoe {built_by}, this is {version}. Rebuild the pack.")
    listed = {MANIFEST, *digests}
    strangers = sorted(one.name for one in path.iterdir() if one.name not in listed)
    if strangers:
        raise PackError(f"kernel pack {path}: {', '.join(strangers)} is not listed in {MANIFEST}. Rebuild the pack.")
    for request, source, file, _ in entries:
        library = path / file
        if keys[file] != str(request) or file != f"{request.symbol}.so":
            raise PackError(f"kernel pack {path}: {file} is listed as {keys[file]}, but is not that kernel's name.")
        if not library.is_file():
            raise PackError(f"kernel pack {path}: {file} ({request}) is missing. Copy or rebuild the pack.")
        if sha256_of(library) != digests[file]:
            raise PackError(f"kernel pack {path}: {file} ({request}) is damaged: its SHA-256 is not the manifest's.")
        if not _is_known(request.module) or source_hash(request.module) != source:
            raise PackError(
                f"kernel pack {path}: {file} ({request}) was built from other sources than this program's kernels/. "
                "Rebuild the pack."
            )
        pack.objects[request] = PackObject(request, library)
    return pack


def _is_known(module: str) -> bool:
    return pathlib.Path(__file__).parent.joinpath(*f"{module}{CONFIG}".split(".")).with_suffix(".py").is_file()
