# SPDX-License-Identifier: Apache-2.0
"""Beginnings of JSON, against the standard library's reader."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megamoe.models.deepseek_v4.chat.json_prefix import MAX_DEPTH, JsonPrefix, closed

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def is_json(text: str) -> bool:
    """Whether the standard library reads it; NaN and infinities, which it would, aside."""
    try:
        json.loads(text, parse_constant=lambda name: 1 / 0)
    except (ValueError, ZeroDivisionError):
        return False
    return True


def read(text: str) -> tuple[int, bool]:
    prefix = JsonPrefix()
    accepted = prefix.accept(text)
    return accepted, accepted == len(text) and prefix.is_complete


# known answers


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("", 0),
        ("nul", 3),
        ("nil", 1),
        ("-", 1),
        ("01", 1),
        ("1.e", 2),
        ("1e+5", 4),
        ("+1", 0),
        (".5", 0),
        ("NaN", 0),
        ('"a\n"', 2),
        ('"\\x"', 2),
        ('"\\u12g4"', 5),
        ("[1,]", 3),
        ("[,", 1),
        ("{,", 1),
        ('{"a"}', 4),
        ('{"a":1,}', 7),
        ("{1:2}", 1),
        ("[}", 1),
        ("1 2", 2),
        ("{}{}", 2),
        ("'a'", 0),
        ("\ufeff1", 0),
        ("\u00a01", 0),
    ],
)
def test_where_it_stops(text: str, accepted: int) -> None:
    assert read(text)[0] == accepted


@pytest.mark.parametrize("text", ["0", "-0", "1.5e-3", "true", "null", '""', " [ ] ", '{"a": {}}', '"\\ud800"', "12 "])
def test_complete(text: str) -> None:
    assert read(text) == (len(text), True)


@pytest.mark.parametrize("text", ["", " ", "-", "1.", "1e", "tru", '"', '"\\', "[", '{"a":', "[1"])
def test_begun(text: str) -> None:
    assert read(text) == (len(text), False)


def test_depth() -> None:
    assert read("[" * MAX_DEPTH + "]" * MAX_DEPTH) == (2 * MAX_DEPTH, True)
    assert read("[" * (MAX_DEPTH + 1))[0] == MAX_DEPTH


# properties


@given(value=JSON, indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_every_value_is_accepted_at_every_length(value: object, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    prefix = JsonPrefix()
    assert all(prefix.accept(character) == 1 for character in text) and prefix.is_complete


@given(text=st.text(alphabet='{}[]:,"\\ntrufalse0123.eE+- \n', max_size=12))
@example("1.0")
@example('{"":0,"":[]}')
def test_complete_is_what_the_standard_library_reads(text: str) -> None:
    assert read(text)[1] == is_json(text)


@given(value=JSON, cut=st.integers(0, 200), junk=st.text(alphabet='{}[]:,"\\ntf0123.eE+- x', min_size=1, max_size=3))
def test_what_is_accepted_can_be_completed(value: object, cut: int, junk: str) -> None:
    """Whatever is accepted after junk was put in is the beginning of some value: shown by completing it."""
    text = json.dumps(value)
    broken = text[:cut] + junk + text[cut:]
    accepted = read(broken)[0]
    assert is_json(completed(broken[:accepted]))


def completed(text: str) -> str:
    """Return a JSON value that begins with `text`, which JsonPrefix accepted: tried out, shortest first."""
    prefix = JsonPrefix()
    prefix.accept(text)
    for _ in range(3 * MAX_DEPTH):
        if prefix.is_complete:
            return text
        for more in ('"', "]", "}", ":", "0", "n", "\\", "rue", "alse", "ull", *"ruealsx"):
            trial = JsonPrefix()
            trial.accept(text)
            if trial.accept(more) == len(more):
                text, prefix = text + more, trial
                break
        else:
            return text
    return text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ('{"city": "Ro', {"city": "Ro"}),
        ('{"a": [1, {"b": tru', {"a": [1, {}]}),
        ('{"a": 1, "b', {"a": 1}),
        ('{"a": 1, "b":', {"a": 1}),
        ('{"a": 12', {"a": 12}),
        ('{"a": 12.', {"a": 12}),
        ('{"a": "x\\', {"a": "x"}),
        ('{"a": "x\\u00', {"a": "x"}),
        ('{"a": "x\\ud83d', {"a": "x"}),
        ('{"a": "x\\\\ud83d', {"a": "x\\ud83d"}),
        ('{"a": "x\\ud83d\\ude00', {"a": "x😀"}),
        ('{"a": 0, "b": 01}', {"a": 0, "b": 0}),
        ('{"a": NaN}', {}),
        ("{", {}),
    ],
)
def test_what_was_cut_off_is_closed(text: str, expected: object) -> None:
    assert json.loads(closed(text)) == expected


def test_nothing_is_left_of_what_is_no_json() -> None:
    assert closed("") == closed("hello") == ""


@given(value=JSON, end=st.integers(0, 200))
def test_every_beginning_can_be_closed(value: object, end: int) -> None:
    """And closing a whole value changes nothing."""
    text = json.dumps({"a": value})
    assert closed(text) == text
    assert isinstance(json.loads(closed(text[: max(1, end)])), dict)
