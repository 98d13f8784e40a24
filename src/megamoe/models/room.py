# SPDX-License-Identifier: Apache-2.0
"""Whether there is memory for weights, asked before any is read.

A limit is hard where an allocation beyond it fails or ends the process: RLIMIT_AS and RLIMIT_DATA, the memory of the
control group, the free memory of a GPU. What the kernel calls available is no such limit (pages can be swapped out, and
some machines grow their memory as it is used), so it is only warned about.

Files are mapped while they are read. A private map counts for RLIMIT_AS and RLIMIT_DATA, and not for the others, whose
page cache is given back when memory is short.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import pathlib
import re
import resource
from collections.abc import Iterator, Mapping

import torch

_PROC = pathlib.Path("/proc")
_CGROUP = pathlib.Path("/sys/fs/cgroup")
_log = logging.getLogger("megamoe")


@dataclasses.dataclass(frozen=True)
class Room:
    """What one limit leaves.

    Attributes:
        name: of the limit, as users know it.
        free_bytes: what is left under it.
        counts_maps: mapped files count as well.
        is_hard: allocations beyond it fail.
        remedy: how to get more.
    """

    name: str
    free_bytes: int
    counts_maps: bool
    is_hard: bool
    remedy: str


@dataclasses.dataclass(frozen=True)
class Budget:
    """The device memory that a model and an engine may use, and the least caches that go beside the weights.

    Attributes:
        memory_bytes: for everything.
        num_sequences, ring_tokens, step_tokens: of the caches, see cache.pools.CacheSize.
        tokens_per_page: of the caches; None for the model's choice.
    """

    memory_bytes: int
    num_sequences: int
    ring_tokens: int
    step_tokens: int
    tokens_per_page: int | None = None


def require_budget(what: str, parts: Mapping[str, int], memory_bytes: int) -> None:
    """Refuse what is known to be more than a budget before anything is read; workspace and graphs come on top of it.

    Args:
        what: is loaded, for messages.
        parts: what the memory is for, in bytes.
        memory_bytes: the budget.

    Raises:
        ValueError: the parts are more; each is named.
    """
    needed = sum(parts.values())
    if needed > memory_bytes:
        named = ", ".join(f"{name} {num_bytes:,}" for name, num_bytes in parts.items())
        raise ValueError(
            f"{what} needs at least {needed:,} bytes ({named}) and a budget of {memory_bytes:,} is given. Raise "
            "--memory, use a GPU with more of it, or lower max_sequences or max_step_tokens."
        )


def require_room(what: str, needed_bytes: int, mapped_bytes: int, device: torch.device) -> None:
    """Refuse weights that a hard limit has no room for; warn where only the free memory of the machine is too small.

    Args:
        what: is loaded, for messages.
        needed_bytes: of the weights, as they will be held.
        mapped_bytes: of the files that are mapped while they are read.
        device: where the weights go.

    Raises:
        ValueError: they do not fit.
    """
    for room in rooms(device):
        needed = needed_bytes + (mapped_bytes if room.counts_maps else 0)
        if device.type != "cpu" and not room.name.startswith("cuda"):
            needed = mapped_bytes if room.counts_maps else 0  # one weight at a time passes through the machine's memory
        if needed <= room.free_bytes:
            continue
        maps = ", mapped files among them," if room.counts_maps else ""
        text = f"{what} needs {needed:,} bytes{maps} and {room.name} leaves {room.free_bytes:,}. {room.remedy}"
        if room.is_hard:
            raise ValueError(text)
        _log.warning("megamoe: warning: %s", text)


def rooms(device: torch.device) -> list[Room]:
    """Return what every limit of this process, and the device, leaves; without those that do not exist here."""
    found = []
    for kind, name, used, option in (
        (resource.RLIMIT_AS, "RLIMIT_AS", "VmSize", "v"),
        (resource.RLIMIT_DATA, "RLIMIT_DATA", "VmData", "d"),
    ):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            remedy = f"Raise it (ulimit -{option}), or load a smaller checkpoint."
            found.append(Room(name, max(limit - _kilobytes("self/status", used), 0), True, True, remedy))
    found += _cgroup_rooms()
    available = _kilobytes("meminfo", "MemAvailable")
    if available:
        remedy = "It goes on: some machines grow their memory as it is used, others end the process."
        found.append(Room("the machine (MemAvailable)", available, False, False, remedy))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        remedy = "Free it, or use a GPU with more memory."
        found.append(Room(f"cuda:{device.index or 0}", free, False, True, remedy))
    return found


def _kilobytes(file: str, key: str) -> int:
    """Return a field of a file of /proc in bytes, 0 where there is none."""
    path = _PROC / file
    found = re.search(rf"^{key}:\s+(\d+) kB", path.read_text(), re.MULTILINE) if path.is_file() else None
    return int(found[1]) * 1024 if found else 0


def _cgroup_rooms() -> list[Room]:
    """Return what the control groups of this process leave, its own and those above it (version 2)."""
    path = _PROC / "self/cgroup"
    match = re.search(r"^0::(/.*)$", path.read_text(), re.MULTILINE) if path.is_file() else None
    if match is None:
        return []
    inside = pathlib.PurePosixPath(match[1])
    found = []
    for group in (inside, *inside.parents):
        folder = _CGROUP / str(group).lstrip("/")
        limit = folder / "memory.max"
        if not limit.is_file() or (text := limit.read_text().strip()) == "max":
            continue
        used = int((folder / "memory.current").read_text())
        stat = folder / "memory.stat"
        cache = re.findall(r"^(?:in)?active_file (\d+)$", stat.read_text(), re.MULTILINE) if stat.is_file() else []
        free = int(text) - used + sum(map(int, cache))
        remedy = "Give the container more memory, or load a smaller checkpoint."
        found.append(Room(f"the control group {group} (memory.max)", max(free, 0), False, True, remedy))
    return found


@contextlib.contextmanager
def no_room_is_told(
    what: str, needed_bytes: int, doing: str = "of weights were loaded", remedy: str = "load a smaller checkpoint"
) -> Iterator[None]:
    """Turn an allocation that fails all the same into one line.

    Args:
        what: how the message begins.
        needed_bytes: that the block allocates in all.
        doing: what they were for.
        remedy: what helps besides more memory.

    Raises:
        ValueError: memory ran out within the block.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _ran_out(what, needed_bytes, doing, remedy, error) from error
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise _ran_out(what, needed_bytes, doing, remedy, error) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):  # torch has no class of its own for memory of the machine
            raise
        raise _ran_out(what, needed_bytes, doing, remedy, error) from error


def _ran_out(what: str, needed_bytes: int, doing: str, remedy: str, error: BaseException) -> ValueError:
    said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return ValueError(
        f"{what}: memory ran out while its {needed_bytes:,} bytes {doing} ({said}). Free memory, raise the limit, or "
        f"{remedy}."
    )
