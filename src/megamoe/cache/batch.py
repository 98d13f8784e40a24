# SPDX-License-Identifier: Apache-2.0
"""Batch and Commit: which tokens of which sequences a step runs, and which of them turned out certain. Integers only.

Whoever schedules fills them in; a model derives every slot of the step from them and from the pages it was told of.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class Save:
    """A page boundary at which the rows that continue a sequence are kept.

    Attributes:
        ring: the ring of the sequence.
        length: tokens before the boundary, whole pages.
        snapshot_idx: where the rows go.
        row: the row of token length - 1 among the tokens of the step.
    """

    ring: int
    length: int
    snapshot_idx: int
    row: int


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """One step over T tokens of B sequences; the tokens of a sequence are consecutive and stand together.

    Attributes:
        token_ids: [T] int64.
        starts: [B] int64, the position of each sequence's first token in this step.
        counts: [B] int64, at least 1, each sequence's tokens in this step; they add up to T.
        rings: [B] int64, the ring of each sequence, all different.
        saves: page boundaries that tokens of this step reach for certain; their rows are kept when the step has run.
    """

    token_ids: IntArray
    starts: IntArray
    counts: IntArray
    rings: IntArray
    saves: tuple[Save, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Commit:
    """The tokens of one step that are certain: T tokens of B sequences, rejected drafts left out.

    Attributes:
        rows: [T] int64, their rows in what the model returned for the step.
        rings: [B] int64, the ring of each sequence.
        starts: [B] int64, the position of each sequence's first token.
        counts: [B] int64, at least 1; they add up to T.
        first_ids: [B] int64, the token at `starts`.
        next_ids: [T] int64, the token after each of the T; the last one of a sequence is not computed yet.
        wants_drafts: [B] bool, the sequences to guess for.
        saves: page boundaries among the T tokens at which rows are kept; `row` counts as in `rows`.
    """

    rows: IntArray
    rings: IntArray
    starts: IntArray
    counts: IntArray
    first_ids: IntArray
    next_ids: IntArray
    wants_drafts: npt.NDArray[np.bool_]
    saves: tuple[Save, ...] = ()
