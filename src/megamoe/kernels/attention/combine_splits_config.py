# SPDX-License-Identifier: Apache-2.0
"""Compile key of the kernel that joins the splits of sparse_attention."""

from __future__ import annotations

import dataclasses

THREADS = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """The compile key.

    Attributes:
        heads: H.
        rope: R.
        entries: "none", "list" or "all", as in sparse_attention_config.py.
    """

    heads: int
    rope: int
    entries: str
