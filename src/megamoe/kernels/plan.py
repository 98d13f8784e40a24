# SPDX-License-Identifier: Apache-2.0
"""Which kernels a model needs: from its operation calls and the support table to compile requests."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping

from megamoe.kernels import BORDERS, KERNELS
from megamoe.kernels.compile import Request, require_target, unique


def module_for(op: str, target: str) -> str | None:
    """Return the host module of an operation on a compile target ("sm90a"), or None if there is no kernel."""
    require_target(target)
    return KERNELS.get(op, {}).get(target.rstrip("a"))


def requests_for(calls: Iterable[tuple[str, Mapping[str, int]]], target: str) -> list[Request]:
    """Return the kernels behind some operation calls, each once.

    Args:
        calls: (operation, sizes of its named dimensions). Operations without a kernel are passed over, and so are
            kernels that are bound to another architecture.
        target: "sm90a", "sm100a" or "sm103a".
    """
    requests = []
    for op, dims in calls:
        module = module_for(op, target)
        if module is not None:
            requests += [Request.of(config) for config in importlib.import_module(module).configs(dims)]
    return unique(one for one in requests if bound_to(one.module) in (None, target.rstrip("a")))


def only_few_tokens(ops: Iterable[str], target: str) -> list[tuple[str, str]]:
    """Return the operations that take no more than few tokens on a target, and up to how many that is, in words."""
    arch = target.rstrip("a")
    return [(op, BORDERS[op].few) for op in sorted(ops) if op in BORDERS and arch not in BORDERS[op].more]


def bound_to(module: str) -> str | None:
    """Return the one architecture that a kernel is compiled for, which its name ends with, or None for any."""
    found = re.search(r"_(sm\d+)$", module)
    return found[1] if found else None
