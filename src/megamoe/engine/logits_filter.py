# SPDX-License-Identifier: Apache-2.0
"""What a grammar tells the sampler: which tokens may come next."""

from __future__ import annotations

from typing import Protocol

import torch


class LogitsFilter(Protocol):
    """Restricts one request's next token. It is asked once per token and told every token that was chosen.

    The model's end-of-sequence ids are tokens like others: a filter allows them where the text may end.
    """

    def allowed(self) -> torch.Tensor | None:
        """Return bool, True for tokens that may come next; None for all.

        As long as the vocabulary; ids beyond a shorter mask may not come. If nothing is allowed the request ends.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Take in the token that was chosen."""
        ...
