# SPDX-License-Identifier: Apache-2.0
"""What is computed: one file per operation with its contract, its checks, its plain-torch meaning and its dispatch.

Import an operation from the file with its name: `from megamoe.ops.rms_norm import rms_norm`. The package itself offers
`use`, the switch that runs references everywhere, and `watch`, which wraps every operation call. They are imported when
they are first used, so that a file without tensors (yarn_scaling.py) does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamoe.ops.dispatch import use, watch

__all__ = ["use", "watch"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}.")
    from megamoe.ops import dispatch

    return getattr(dispatch, name)
