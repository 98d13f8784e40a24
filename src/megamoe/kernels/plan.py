# SPDX-License-Identifier: Apache-2.0
"""Which kernels a model needs: from its operation calls and the support table to compile requests."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping

from megamoe.kernels import KERNELS
from megamoe.kernels.compile import Request, require_target, unique


def module_for(op: str, target: str) -> str | None:
    """Return the host module of an operation on a compile target ("sm90a"), or None if there is no kernel."""
    require_target(target)
    return KERNELS.get(op, {}).get(target.rstrip("a"))


def requests_for(calls: Iterable[tuple[str, Mapping[str, int]]], target: str) -> list[Request]:
    """Return the kernels behind some operation calls, each once.

    Args:
        calls: (operation, sizes of its named dimensions); operations without a kernel are passed over.
        target: "sm90a", "sm100a" or "sm103a".
    """
    requests = []
    for op, dims in calls:
        module = module_for(op, target)
        if module is not None:
            requests += [Request.of(config) for config in importlib.import_module(module).configs(dims)]
    return unique(requests)
