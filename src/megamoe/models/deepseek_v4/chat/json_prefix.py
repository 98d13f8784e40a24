# SPDX-License-Identifier: Apache-2.0
"""Is this text so far the beginning of one JSON value? Decided character by character, as the text arrives.

A tool call's arguments are sent on while the model still writes them, and what has been sent cannot be taken back; so
every character is checked before it goes out. Accepts exactly RFC 8259 (no NaN), nested at most MAX_DEPTH deep, since
readers recurse.
"""

from __future__ import annotations

import re
from typing import Final

MAX_DEPTH: Final = 128

_SPACE = " \t\n\r"
_DIGITS = "0123456789"
_HEX = "0123456789abcdefABCDEF"
_LITERALS = {"t": "true", "f": "false", "n": "null"}

# A character beyond U+FFFF is written as two escapes; the first alone is no Unicode.
_HALF_A_PAIR = re.compile(r"(?<!\\)((?:\\\\)*)\\u[dD][89abAB][0-9a-fA-F]{2}\Z")

# What a number may continue with, by what it has so far: state → ((characters, next state), …).
_NUMBER: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "minus": (("0", "zero"), ("123456789", "integer")),
    "zero": ((".", "point"), ("eE", "e")),
    "integer": ((_DIGITS, "integer"), (".", "point"), ("eE", "e")),
    "point": ((_DIGITS, "fraction"),),
    "fraction": ((_DIGITS, "fraction"), ("eE", "e")),
    "e": (("+-", "sign"), (_DIGITS, "exponent")),
    "sign": ((_DIGITS, "exponent"),),
    "exponent": ((_DIGITS, "exponent"),),
}
_WHOLE_NUMBER = {"zero", "integer", "fraction", "exponent"}


class JsonPrefix:
    """The state of reading one JSON value.

    Attributes:
        is_complete: what was accepted so far is a whole JSON value (more digits or spaces may still follow).
    """

    def __init__(self) -> None:
        # value, value or ], key, key or }, :, comma or end, done; string, escape, hex N, literal REST; _NUMBER
        self._state = "value"
        self._rest = ""  # of a literal, or the hex digits still due
        self._is_key = False
        self._open: list[str] = []  # brackets to be closed

    @property
    def is_complete(self) -> bool:
        """Whether the value may end here."""
        return self._state == "done" or not self._open and self._state in _WHOLE_NUMBER

    @property
    def has_begun(self) -> bool:
        """Whether anything but white space was accepted."""
        return self._state != "value" or bool(self._open)

    @property
    def can_be_closed(self) -> bool:
        """Whether `closing` after what was accepted makes it a whole value."""
        if self._state == "string":
            return not self._is_key
        return self._state in ("done", "comma or end", "value or ]", "key or }") or self._state in _WHOLE_NUMBER

    @property
    def closing(self) -> str:
        """What closes the string and the brackets that are open."""
        return ('"' if self._state == "string" else "") + "".join(reversed(self._open))

    def accept(self, text: str) -> int:
        """Read on and return how many characters still are a beginning of JSON; less than all means: no further."""
        for idx, character in enumerate(text):
            if not self._step(character):
                return idx
        return len(text)

    def _step(self, character: str) -> bool:
        state = self._state
        if state == "string":
            return self._in_string(character)
        if state in ("escape", "hex"):
            return self._in_escape(character)
        if state == "literal":
            matches, self._rest = character == self._rest[0], self._rest[1:]
            if not self._rest:
                self._end_value()
            return matches
        if state in _NUMBER:
            for characters, following in _NUMBER[state]:
                if character in characters:
                    self._state = following
                    return True
            if state not in _WHOLE_NUMBER:
                return False
            self._end_value()
        return character in _SPACE or self._between(character)

    def _in_string(self, character: str) -> bool:
        if character == "\\":
            self._state = "escape"
        elif character == '"':
            if self._is_key:
                self._state = ":"
            else:
                self._end_value()
        return character >= " "

    def _in_escape(self, character: str) -> bool:
        if self._state == "hex":
            self._rest = self._rest[1:]
            if not self._rest:
                self._state = "string"
            return character in _HEX
        if character == "u":
            self._state, self._rest = "hex", "0000"
            return True
        self._state = "string"
        return character in '"\\/bfnrt'

    def _between(self, character: str) -> bool:
        """Read a character that is neither space nor inside a scalar."""
        state = self._state
        if state == "comma or end" and character == ",":
            self._state = "key" if self._open[-1] == "}" else "value"
        elif state in ("comma or end", "value or ]", "key or }") and character == self._open[-1]:
            self._open.pop()
            self._end_value()
        elif state == ":" and character == ":":
            self._state = "value"
        elif state in ("key", "key or }") and character == '"':
            self._state, self._is_key = "string", True
        elif state in ("value", "value or ]"):
            return self._begin_value(character)
        else:
            return False
        return True

    def _begin_value(self, character: str) -> bool:
        if character == '"':
            self._state, self._is_key = "string", False
        elif character in "[{":
            self._open.append("]" if character == "[" else "}")
            self._state = "value or ]" if character == "[" else "key or }"
            return len(self._open) <= MAX_DEPTH
        elif character in _LITERALS:
            self._state, self._rest = "literal", _LITERALS[character][1:]
        elif character == "-":
            self._state = "minus"
        elif character in _DIGITS:
            self._state = "zero" if character == "0" else "integer"
        else:
            return False
        return True

    def _end_value(self) -> None:
        self._state = "comma or end" if self._open else "done"


def closed(text: str) -> str:
    """Return the longest beginning of a text that can be made one JSON value by closing what is open, so closed.

    A string that was cut off ends where it was cut; a key without a value, and a number or word that is not whole, are
    left out. "" if nothing remains.
    """
    reader = JsonPrefix()
    length = 0
    for idx, character in enumerate(text):
        if not reader.accept(character):
            break
        if reader.can_be_closed:
            length = idx + 1
    reader = JsonPrefix()
    reader.accept(text[:length])
    return _HALF_A_PAIR.sub(r"\1", text[:length]) + reader.closing if length else ""
