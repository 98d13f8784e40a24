# SPDX-License-Identifier: Apache-2.0
"""Text from a growing sequence of tokens, without ever taking a character back.

A character's bytes may be spread over several tokens. Bytes that do not yet make a character are held until the next
token completes them or proves them wrong; `finish` gives out what is left.
"""

from __future__ import annotations

import codecs

from megamoe.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns one sequence's tokens into text, one token at a time.

    The pieces returned by `add` and `finish` joined together equal `Tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        """Return the text that is certain after this token; often one word, empty inside a character."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Return the rest: empty, or U+FFFD where the sequence ended inside a character."""
        return self._decoder.decode(b"", final=True)
