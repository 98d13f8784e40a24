# SPDX-License-Identifier: Apache-2.0
"""Texts to prompts, for callers that have a tokenizer and know no model."""

from __future__ import annotations

import dataclasses

from megamoe.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class PromptEncoder:
    """What turning a text into a prompt depends on.

    Attributes:
        tokenizer: the model's.
        vocab_size: number of logits per token; ids are below it.
        bos_token_id: put before a text, or None.
        eos_token_ids: what ends a sequence.
    """

    tokenizer: Tokenizer
    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Return BOS and the ids of a text.

        Raises:
            ValueError: the text is not valid Unicode.
        """
        bos = [] if self.bos_token_id is None else [self.bos_token_id]
        return [*bos, *self.tokenizer.encode(text)]
