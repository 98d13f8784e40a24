# SPDX-License-Identifier: Apache-2.0
"""Bytes of files, read and written through buffers, with errors that say what to do.

Nothing is mapped: a map counts as memory of the process, and an unreadable or shrinking file behind one ends the
process with a signal instead of an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import pathlib
from collections.abc import Iterator

import torch

from megamoe.checkpoint.problem import CheckpointError

CHUNK_BYTES = 1 << 20  # read, written and read back while it is in the processor's cache


@dataclasses.dataclass(frozen=True)
class ByteRange:
    """Bytes of a file.

    Attributes:
        path: file.
        offset: first byte.
        num_bytes: how many.
    """

    path: pathlib.Path
    offset: int
    num_bytes: int


def read_range(where: ByteRange) -> bytearray:
    """Return bytes of a file.

    Raises:
        CheckpointError: they cannot be read.
    """
    buffer = bytearray(where.num_bytes)
    with opened(where.path) as descriptor:
        read_into(descriptor, where.path, memoryview(buffer), where.offset)
    return buffer


def as_tensor(buffer: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor over bytes."""
    if not buffer:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).view(shape)


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[int]:
    """Open a file to read it; the block gets its descriptor."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(
            f"convert: {path} cannot be read: {error.strerror}. Check the file and its disk."
        ) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_into(descriptor: int, path: pathlib.Path, buffer: memoryview, offset: int) -> None:
    """Fill a buffer from a file.

    Raises:
        CheckpointError: the bytes cannot be read, or the file ends before them.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(
                f"convert: {path} cannot be read at byte {offset + done}: {error.strerror}. Check the disk, or "
                "download the file again."
            ) from error
        if count == 0:
            raise CheckpointError(f"convert: {path} ends at byte {offset + done}; it was cut off while it was read.")
        done += count


def write_from(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Write a whole buffer."""
    done = 0
    while done < len(buffer):
        done += os.pwrite(descriptor, buffer[done:], offset + done)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def disk_errors(destination: pathlib.Path, bytes_left: int) -> Iterator[None]:
    """Say what a failed write means and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        more = f" with about {bytes_left:,} source bytes to go" if bytes_left else ""
        raise CheckpointError(
            f"convert: cannot write to {destination}: {error.strerror}{more}. Make room and give the same command "
            "again: finished files are kept, and no file is half-written."
        ) from error
