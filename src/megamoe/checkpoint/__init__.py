# SPDX-License-Identifier: Apache-2.0
"""Files to tensors and back: safetensors checkpoints read with every disagreement named, and written atomically.

What the tensors mean is not known here: names, shapes and formats of a model are in models/<architecture>/.

Names are imported when they are first used: headers.py and problem.py need no torch, and neither does who uses only
them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamoe.checkpoint.headers import Headers, TensorInfo, read_headers
    from megamoe.checkpoint.problem import CheckpointError, Problem
    from megamoe.checkpoint.reader import CheckpointReader
    from megamoe.checkpoint.writer import write_json, write_safetensors

_HOMES = {
    "CheckpointError": "problem",
    "CheckpointReader": "reader",
    "Headers": "headers",
    "Problem": "problem",
    "TensorInfo": "headers",
    "read_headers": "headers",
    "write_json": "writer",
    "write_safetensors": "writer",
}

__all__ = [
    "CheckpointError",
    "CheckpointReader",
    "Headers",
    "Problem",
    "TensorInfo",
    "read_headers",
    "write_json",
    "write_safetensors",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}.")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value
