# SPDX-License-Identifier: Apache-2.0
"""Hashes of files, and files that are named by theirs.

A hub cache links every file of a snapshot to a blob, and names the blob by its content: large files by their SHA-256
(64 hex digits), small ones by the SHA-1 that git gives them (40). So such a file can be proved without a network.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Callable

from megamoe.checkpoint.problem import Problem

CHUNK_BYTES = 1 << 20
_SHA256, _GIT_SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


def hash_file(path: pathlib.Path, progress: Callable[[int], None] | None = None, *, git: bool = False) -> str:
    """Return the SHA-256 of a file, or with `git` the SHA-1 of its git blob.

    Args:
        path: the file.
        progress: called with the bytes read since the last call.
        git: which.

    Raises:
        OSError: it cannot be read.
    """
    buffer = bytearray(CHUNK_BYTES)
    with open(path, "rb", buffering=0) as file:
        digest = hashlib.sha256()
        if git:
            digest = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size, usedforsecurity=False)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            if progress is not None:
                progress(count)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Hashed:
    """What the names of blobs prove.

    Attributes:
        proved: files whose content has the hash that names it.
        not_compared: files that are no link to such a blob.
        problems: files whose content has another.
    """

    proved: tuple[str, ...]
    not_compared: tuple[str, ...]
    problems: tuple[Problem, ...]


def check_hashes(directory: pathlib.Path, progress: Callable[[int, int], None] | None = None) -> Hashed:
    """Compare every file of a snapshot with the hash that names its blob.

    Args:
        directory: a checkpoint's folder.
        progress: called with (bytes read, bytes in all).

    Raises:
        OSError: a file cannot be read.
    """
    files = {path.name: path.resolve() for path in sorted(directory.iterdir()) if path.is_file()}
    named = {name: path for name, path in files.items() if path.name != name and _is_hash(path.name)}
    total, done = sum(path.stat().st_size for path in named.values()), 0

    def show(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    proved, problems = [], []
    for name, path in named.items():
        found = hash_file(path, show, git=len(path.name) == 40)
        if found == path.name:
            proved.append(name)
            continue
        text = f"{name}: its bytes are not those it was published with ({found[:16]}…, not {path.name[:16]}…)."
        remedy = f"Remove the blob {path} and download it again."
        problems.append(Problem("file-hash", name, text, remedy, found, path.name))
    return Hashed(tuple(proved), tuple(name for name in files if name not in named), tuple(problems))


def _is_hash(name: str) -> bool:
    return bool(_SHA256.fullmatch(name) or _GIT_SHA1.fullmatch(name))
