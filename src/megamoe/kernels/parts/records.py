# SPDX-License-Identifier: Apache-2.0
"""Records that operations hand to host halves: these know the fields that they look at, and not ops/."""

from __future__ import annotations

from typing import Protocol

import torch


class RopeTable(Protocol):
    """ops/rope.py: the frequencies of one kind of layer."""

    @property
    def inv_freq(self) -> torch.Tensor:
        """fp32 [R / 2]."""

    @property
    def rope_dim(self) -> int:
        """R."""
