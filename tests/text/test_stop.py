# SPDX-License-Identifier: Apache-2.0
"""Stop strings: the same wherever the text is cut, and nothing held that cannot become one."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megamoe.text.stop import StopMatcher, TextStream
from megamoe.text.tokenizer import Tokenizer

from ..fakes import BYTES, EOS


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: pathlib.Path) -> Tokenizer:
    return Tokenizer(tokenizer_directory)


def ids_of(tokenizer: Tokenizer, content: bytes) -> list[int]:
    """Return one token per byte."""
    by_byte = {tokenizer.token_bytes(token_id): token_id for token_id in range(BYTES, BYTES + 256)}
    return [by_byte[bytes([value])] for value in content]


def passed(pieces: list[str], stops: list[str], **options: Any) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, **options)
    text = "".join(map(matcher.feed, pieces)) + matcher.finish()
    return text, matcher.matched


def expected(text: str, stops: list[str], include: bool = False) -> tuple[str, str | None]:
    """Return the same by looking at the text one character at a time, from the beginning each time."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


# known answers


@pytest.mark.parametrize(
    ("text", "stops", "result"),
    [
        ("abc", [], ("abc", None)),
        ("abc", ["x"], ("abc", None)),
        ("abc", ["b"], ("a", "b")),
        ("abc", ["abcd"], ("abc", None)),  # begun and never finished
        ("abc", ["ab", "abc"], ("", "ab")),  # the one complete first
        ("xabcd", ["abcd", "bc"], ("xa", "bc")),
        ("xabc", ["bc", "abc", "c"], ("x", "abc")),  # ends at the same character: the longest
        ("aaab", ["aab"], ("a", "aab")),
        ("aabaabb", ["aabb"], ("aab", "aabb")),
        ("\n\n\nx", ["\n\n"], ("", "\n\n")),
        ("a😀b", ["😀"], ("a", "😀")),
        ("", ["a"], ("", None)),
    ],
)
def test_known(text: str, stops: list[str], result: tuple[str, str | None]) -> None:
    assert passed([text], stops) == passed(list(text), stops) == result
    assert passed([text], list(reversed(stops))) == result


def test_held_is_only_what_may_become_a_stop_string() -> None:
    matcher = StopMatcher(["</s>", "sun"])
    assert [matcher.feed(piece) for piece in ("a</", "b", "<", "<", "/s", "un")] == ["a", "</b", "", "<", "", "</"]
    assert matcher.matched == "sun"
    assert matcher.feed("more") == "" and matcher.finish() == ""


def test_include_and_hidden() -> None:
    assert passed(["a STOP b"], ["STOP"], include_stop_str=True) == ("a STOP", "STOP")
    assert passed(["a STOP b"], [], include_stop_str=True, hidden=["STOP"]) == ("a ", "STOP")


def test_text_that_may_not_stop_passes_whole() -> None:
    matcher = StopMatcher(["ab"])
    assert matcher.feed("xa") == "x"
    assert matcher.feed("b", may_stop=False) == "ab"
    assert matcher.feed("b") == "b" and matcher.matched is None


# properties

ALPHABET = "ab\n"
STOPS = st.lists(st.text(alphabet=ALPHABET, min_size=1, max_size=4), max_size=4)


@given(
    text=st.text(alphabet=ALPHABET, max_size=14), stops=STOPS, cuts=st.sets(st.integers(0, 14)), include=st.booleans()
)
@example(text="aabab", stops=["aba", "b"], cuts={2, 3}, include=False)
def test_cuts_change_nothing(text: str, stops: list[str], cuts: set[int], include: bool) -> None:
    places = [0, *sorted(cut for cut in cuts if 0 < cut < len(text)), len(text)]
    pieces = [text[a:b] for a, b in zip(places, places[1:], strict=False)]
    assert passed(pieces, stops, include_stop_str=include) == expected(text, stops, include)


@given(before=st.text(alphabet=ALPHABET, max_size=6), stop=st.text(alphabet=ALPHABET, min_size=1, max_size=3))
def test_a_stop_string_at_every_position_and_every_split(before: str, stop: str) -> None:
    text = before + stop + "tail"
    for cut in range(len(text) + 1):
        assert passed([text[:cut], text[cut:]], [stop]) == expected(text, [stop])


@given(text=st.text(alphabet=ALPHABET, max_size=12), stops=STOPS)
def test_what_is_held_begins_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for end, character in enumerate(text, start=1):
        shown += matcher.feed(character)
        if matcher.matched is not None:
            return
        held = text[len(shown) : end]
        assert shown + held == text[:end]
        assert not held or any(stop.startswith(held) for stop in stops)


# tokens


@given(text=st.text(max_size=12), stop=st.text(min_size=1, max_size=2), cut=st.integers(0, 48), include=st.booleans())
@example(text="a😀b", stop="😀", cut=3, include=False)
def test_tokens_and_bytes_change_nothing(tokenizer: Tokenizer, text: str, stop: str, cut: int, include: bool) -> None:
    """One token per byte, so that tokens split characters, fed in two batches."""
    ids = ids_of(tokenizer, text.encode())
    stream = TextStream(tokenizer, [stop], include_stop_str=include)
    shown = stream.feed(ids[:cut]) + stream.feed(ids[cut:]) + stream.finish()
    assert (shown, stream.matched_stop) == expected(text, [stop], include)
    complete = text.find(stop) + len(stop) if stop in text else len(text)
    assert stream.num_tokens == len(text[:complete].encode())


def test_an_unfinished_character_is_shown_in_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["x"])
    assert stream.feed([*ids_of(tokenizer, "a😀".encode()[:-1]), EOS]) == "a"
    assert stream.finish() == "\ufffd"
    stream = TextStream(tokenizer, ["\ufffd"])
    assert stream.feed(ids_of(tokenizer, "a😀".encode()[:-1])) + stream.finish() == "a"
    assert stream.matched_stop == "\ufffd"


def test_nothing_is_read_beyond_a_stop_string(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["b"])
    assert stream.feed(ids_of(tokenizer, b"abcd")) == "a"
    assert (stream.num_tokens, stream.feed(ids_of(tokenizer, b"e")), stream.finish()) == (2, "", "")
    assert stream.num_tokens == 2


def test_min_tokens(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["b"], min_tokens=2)
    assert stream.feed(ids_of(tokenizer, b"abab")) == "aba"
    assert (stream.matched_stop, stream.num_tokens) == ("b", 4)
    stream = TextStream(tokenizer, ["\ufffd"], min_tokens=9)
    assert stream.feed(ids_of(tokenizer, b"a\xe2")) + stream.finish() == "a\ufffd" and stream.matched_stop is None


# refusals


@pytest.mark.parametrize(
    ("stops", "error", "reason"),
    [
        ("abc", TypeError, "must be a sequence of strings; got 'abc'"),
        ([3], TypeError, "a stop string must be text; got 3"),
        (["a", ""], ValueError, "a stop string is empty"),
    ],
)
def test_unusable_stop_strings(stops: Any, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=f"^stop: .*{reason}"):
        StopMatcher(stops)
