# SPDX-License-Identifier: Apache-2.0
"""What the engine asks of a drafter: cheap guesses at the tokens a model will choose next.

A drafter keeps state of its own per ring (the rows of its own layers). After every step it is shown the tokens that are
now certain, and guesses on from there. Which drafter a checkpoint has is the model's business (see
`BatchModel.new_drafter`): the classic multi-token-prediction stage and DSpark both fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from megamoe.cache.batch import Commit

Choose = Callable[[torch.Tensor, int], torch.Tensor]
"""(logits [N, V] fp32, how many tokens were drafted before) -> ids [N] int64, for the sequences that want drafts."""


class Drafter(Protocol):
    """Guesses tokens, and never changes what comes out, only how many steps it takes."""

    def observe(self, hidden: Any, commit: Commit, num_tokens: int, choose: Choose) -> torch.Tensor:
        """Take in certain tokens, keep what continues sequences at the page boundaries among them, then guess.

        Args:
            hidden: what `BatchModel.run` returned for the step.
            commit: the tokens of it that are certain.
            num_tokens: how many tokens to guess per sequence that wants drafts.
            choose: picks one token per such sequence from logits.

        Returns:
            [N, num_tokens] int64 guesses for the N sequences that want drafts, in their order.
        """
        ...

    def start(self, ring_idx: int) -> None:
        """Forget a ring: a new sequence begins there at position 0."""
        ...

    def restore(self, snapshot_idx: int, ring_idx: int, length: int) -> None:
        """Let a ring continue at a page boundary that a commit named with the same length."""
        ...
