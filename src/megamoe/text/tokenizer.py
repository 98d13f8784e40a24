# SPDX-License-Identifier: Apache-2.0
"""tokenizer.json: strings to token ids, token ids to bytes.

Encoding is done by the `tokenizers` library. Decoding is done here, by bytes: in a byte-level vocabulary every token
stands for a fixed byte string, so text is their concatenation read as UTF-8 (an invalid sequence becomes U+FFFD), and a
detokenizer can work token by token. tests/text/test_tokenizer.py holds this against the library's own decoder.

Nothing is added to a text: the BOS id comes from the model's config, and whoever builds a prompt puts it there.
`encode` reads the texts of added tokens (`<｜end▁of▁sentence｜>`) as those tokens, as someone who types a prompt
expects; `encode_text` reads them as the characters they are: what a user of a chat writes can never become markup.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Iterable

import tokenizers

FILE_NAME = "tokenizer.json"


def check_tokenizer(directory: pathlib.Path) -> None:
    """Refuse a checkpoint without tokenizer.json; cheap, so that it can come before the weights.

    Raises:
        ValueError: there is none.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        raise ValueError(
            f"tokenizer: no file {path}. Copy tokenizer.json from the release that the weights come from: conversions "
            "and quantizations keep it."
        )


class Tokenizer:
    """A byte-level tokenizer.

    Attributes:
        path: the file it was read from.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Read tokenizer.json of a checkpoint directory.

        Raises:
            OSError: the file is missing or cannot be read.
            ValueError: the file is no tokenizer, or not a byte-level one.
        """
        self.path = pathlib.Path(directory) / FILE_NAME
        content = self.path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except ValueError as error:
            raise ValueError(
                f"tokenizer: {self.path} is not a tokenizer.json ({error}). Copy the file again."
            ) from error
        decoder = json.loads(content).get("decoder") or {}
        if decoder.get("type") != "ByteLevel":
            raise ValueError(
                f"tokenizer: {self.path} has decoder {decoder.get('type')!r}; only 'ByteLevel' is supported. "
                "Use the tokenizer.json that belongs to a DeepSeek checkpoint."
            )
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = {id_ for id_, token in added.items() if token.special}
        self._added_ids = {token.content: id_ for id_, token in added.items()}
        self._bytes: dict[int, bytes] = {}

    @property
    def num_tokens(self) -> int:
        """One more than the largest id it can produce."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def added_ids(self) -> dict[str, int]:
        """The added tokens, special or not: text → id. These are the ones `encode_text` never produces."""
        return dict(self._added_ids)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with nothing added before or after; texts of added tokens become those tokens.

        Raises:
            ValueError: the text holds surrogates, which no UTF-8 file can.
        """
        _check_unicode(text)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of `text` as plain characters: never the id of an added token, whatever the text spells.

        Raises:
            ValueError: the text holds surrogates, which no UTF-8 file can.
        """
        _check_unicode(text)
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same vocabulary without added tokens; made when first needed, a large one takes half a second."""
        content = json.loads(self._tokenizer.to_str())
        content["added_tokens"] = []
        return tokenizers.Tokenizer.from_str(json.dumps(content))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Special tokens, and ids without a token, stand for nothing."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token stands for: none for special tokens and for ids that have no token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> bytes:
        token = None if token_id < 0 or token_id in self._special_ids else self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if all(character in _BYTE_OF_CHARACTER for character in token):
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        return token.encode("utf-8")  # an added token is spelled as itself


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"tokenizer: the text is not valid Unicode: {error.reason} at character {error.start}. "
            "Pass text that was decoded from valid UTF-8."
        ) from error


def _byte_alphabet() -> dict[str, int]:
    """Return which byte each character of a byte-level vocabulary stands for.

    Printable Latin-1 bytes are spelled as themselves; the 68 others as the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
