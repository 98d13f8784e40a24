# SPDX-License-Identifier: Apache-2.0
"""Where an error of one request ends: it is kept, reported and ends that request, never the others.

    with Contained() as fault:
        request.logits_filter.accept(token_id)
    if fault.error is not None:
        ...  # end the request, and tell whoever asked

Whoever uses this knows which request the code inside works for, or finds out by doing the work for each request alone.
An error is never dropped and chooses no other way of computing anything: the request fails with it. A lost device is
nobody's in particular: every later call would fail as well, so it is not contained.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch


class Contained:
    """Keeps the error that leaves its block.

    Attributes:
        error: None, or the error.
    """

    def __init__(self) -> None:
        """Start without an error."""
        self.error: Exception | None = None

    def __enter__(self) -> Self:
        """Return the object that will have the error."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Keep an error; let the end of the process and the loss of the device pass."""
        if not isinstance(error, Exception) or isinstance(error, torch.AcceleratorError):
            return False
        self.error = error
        return True
