# SPDX-License-Identifier: Apache-2.0
"""Text that appears token by token is the text of all tokens, and no character is ever taken back."""

from __future__ import annotations

import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe.text.detokenizer import Detokenizer
from megamoe.text.tokenizer import Tokenizer

from ..fakes import BOS, BYTES, EOS


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: pathlib.Path) -> Tokenizer:
    return Tokenizer(tokenizer_directory)


def ids_of(tokenizer: Tokenizer, content: bytes) -> list[int]:
    """Return one token per byte."""
    by_byte = {tokenizer.token_bytes(token_id): token_id for token_id in range(BYTES, BYTES + 256)}
    return [by_byte[bytes([value])] for value in content]


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.add, ids), detokenizer.finish()]


# known answers


def test_a_character_appears_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "a😀é".encode())
    assert pieces_of(tokenizer, ids) == ["a", "", "", "", "😀", "", "é", ""]


def test_special_tokens_do_not_split_a_character(tokenizer: Tokenizer) -> None:
    first, second = ids_of(tokenizer, "é".encode())
    assert pieces_of(tokenizer, [BOS, first, EOS, second]) == ["", "", "", "é", ""]


def test_an_unfinished_character_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    assert pieces_of(tokenizer, ids_of(tokenizer, b"a\xe2\x82")) == ["a", "", "", "\ufffd"]


def test_an_impossible_byte_is_replaced_at_once(tokenizer: Tokenizer) -> None:
    assert pieces_of(tokenizer, ids_of(tokenizer, b"\xffa\xe2b")) == ["\ufffd", "a", "", "\ufffdb", ""]


def test_nothing(tokenizer: Tokenizer) -> None:
    assert pieces_of(tokenizer, []) == [""]


# properties


@given(ids=st.lists(st.integers(0, 325), max_size=40))
def test_pieces_join_to_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@given(text=st.text(max_size=30))
def test_valid_text_is_never_delayed_beyond_its_character(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    shown = ""
    for end, token_id in enumerate(ids_of(tokenizer, text.encode()), start=1):
        shown += detokenizer.add(token_id)
        assert shown == text.encode()[:end].decode("utf-8", errors="ignore")
    assert detokenizer.finish() == ""
