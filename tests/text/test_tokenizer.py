# SPDX-License-Identifier: Apache-2.0
"""Strings to ids and ids to bytes, against the tokenizers library's own decoder."""

from __future__ import annotations

import json
import pathlib

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from megamoe.text.tokenizer import Tokenizer

from ..fakes import BOS, BYTES, EOS, THINK, write_tokenizer

TEXTS = [
    "",
    " ",
    "def add(self, other):\n",
    "naïve café",
    "日本語",
    "😀👩‍💻",
    "\x00\x7f\x80\xad",
    "\ufeffa\ufffd",
    "a\r\n\tb",
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: pathlib.Path) -> Tokenizer:
    return Tokenizer(tokenizer_directory)


@pytest.fixture(scope="module")
def library(tokenizer_directory: pathlib.Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(tokenizer_directory / "tokenizer.json"))


# known answers


def test_every_byte_has_its_token(tokenizer: Tokenizer) -> None:
    found = {tokenizer.token_bytes(token_id) for token_id in range(BYTES, BYTES + 256)}
    assert found == {bytes([value]) for value in range(256)}


def test_special_and_unknown_ids_stand_for_nothing(tokenizer: Tokenizer) -> None:
    ids = [BOS, *tokenizer.encode("a"), EOS, tokenizer.num_tokens, 10**9, -1]
    assert tokenizer.decode(ids) == "a"


def test_added_token_that_is_not_special_is_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<think>") == [THINK]
    assert tokenizer.decode([THINK]) == "<think>"


def test_nothing_is_added(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    assert BOS not in tokenizer.encode("def") and EOS not in tokenizer.encode("def")


def test_special_text_is_the_special_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<｜begin▁of▁sentence｜>") == [BOS]


def test_num_tokens(tokenizer: Tokenizer, library: tokenizers.Tokenizer) -> None:
    assert tokenizer.num_tokens == library.get_vocab_size(with_added_tokens=True)


def test_added_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.added_ids == {"<｜begin▁of▁sentence｜>": BOS, "<｜end▁of▁sentence｜>": EOS, "<think>": THINK}


def test_text_is_characters_whatever_it_spells(tokenizer: Tokenizer) -> None:
    text = "a<think>b<｜end▁of▁sentence｜>"
    ids = tokenizer.encode_text(text)
    assert not {BOS, EOS, THINK} & set(ids) and tokenizer.decode(ids) == text


# properties


@given(text=st.text())
def test_text_without_added_tokens_is_encoded_alike(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode_text(text) == tokenizer.encode(text)


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_round_trip_of_edge_cases(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text())
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(ids=st.lists(st.integers(0, 325), max_size=40))
def test_decode_equals_the_library(tokenizer: Tokenizer, library: tokenizers.Tokenizer, ids: list[int]) -> None:
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)


# refusals


def test_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"not valid Unicode: surrogates not allowed at character 2"):
        tokenizer.encode("ab\udcff")
    with pytest.raises(ValueError, match=r"not valid Unicode: surrogates not allowed at character 2"):
        tokenizer.encode_text("ab\udcff")


def test_missing_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"nonsense", b"\xff\xfe", b'{"version":"1.0","model":{}}'], ids=repr
)
def test_damaged_file(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        Tokenizer(tmp_path)


def test_truncated_file(tmp_path: pathlib.Path) -> None:
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}], ids=str)
def test_other_decoders_are_refused(tmp_path: pathlib.Path, decoder: object) -> None:
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["decoder"] = decoder
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"only 'ByteLevel' is supported"):
        Tokenizer(tmp_path)
