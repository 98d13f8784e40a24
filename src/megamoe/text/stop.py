# SPDX-License-Identifier: Apache-2.0
"""Stop strings in text that arrives in pieces.

What comes out does not depend on how the text was cut: of all stop strings in the whole text, the one that is complete
first counts (the longest of several that end at the same character). Held back is only what may still become one: the
longest end of the text that a stop string begins with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megamoe.text.detokenizer import Detokenizer
from megamoe.text.tokenizer import Tokenizer


class StopMatcher:
    """Passes text on until a stop string is complete.

    Attributes:
        stops: the stop strings, each once.
        matched: the stop string that ended the text, or None. What is fed after it is dropped.
    """

    def __init__(
        self, stops: Iterable[str] = (), *, include_stop_str: bool = False, hidden: Iterable[str] = ()
    ) -> None:
        """Begin before the first character.

        Args:
            stops: stop strings, none of them empty.
            include_stop_str: pass the matched stop string on as well; the text ends with it.
            hidden: further stop strings, which are never passed on.

        Raises:
            TypeError: one string instead of several, or something that is not text.
            ValueError: an empty stop string.
        """
        if isinstance(stops, str):
            raise TypeError(f"stop: stop strings must be a sequence of strings; got {stops!r}. Put it into a list.")
        self._hidden = frozenset(hidden)
        self.stops = tuple(dict.fromkeys([*stops, *sorted(self._hidden)]))
        for stop in self.stops:
            if not isinstance(stop, str):
                raise TypeError(f"stop: a stop string must be text; got {stop!r}.")
            if not stop:
                raise ValueError("stop: a stop string is empty, which would stop at once. Leave it out.")
        self.matched: str | None = None
        self._include_stop_str = include_stop_str
        self._held = ""
        self._beginnings = frozenset(stop[:end] for stop in self.stops for end in range(1, len(stop)))
        self._longest = max(map(len, self._beginnings), default=0)

    def feed(self, text: str, *, may_stop: bool = True) -> str:
        """Read on and return the text that is certain.

        Args:
            text: the next piece.
            may_stop: False passes this piece and everything held on without looking.
        """
        if self.matched is not None:
            return ""
        text, self._held = self._held + text, ""
        if not may_stop or not self.stops:
            return text
        ends = [(start + len(stop), start, stop) for stop in self.stops if (start := text.find(stop)) >= 0]
        if ends:
            end, start, self.matched = min(ends)
            return text[: end if self._include_stop_str and self.matched not in self._hidden else start]
        held = next((n for n in range(min(self._longest, len(text)), 0, -1) if text[-n:] in self._beginnings), 0)
        certain, self._held = text[: len(text) - held], text[len(text) - held :]
        return certain

    def finish(self) -> str:
        """Return what is held: the text has ended, it becomes no stop string any more."""
        text, self._held = self._held, ""
        return text


class TextStream:
    """Token ids → text of a plain completion, up to a stop string.

    Attributes:
        num_tokens: how many tokens were read, up to the one that completed the stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Iterable[str] = (), *, include_stop_str: bool = False, min_tokens: int = 0
    ) -> None:
        """Begin before the first token.

        Args:
            tokenizer: the model's.
            stops: see StopMatcher.
            include_stop_str: see StopMatcher.
            min_tokens: the text of this many tokens is not searched for stop strings.

        Raises:
            TypeError, ValueError: see StopMatcher.
        """
        self.num_tokens = 0
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopMatcher(stops, include_stop_str=include_stop_str)
        self._min_tokens = min_tokens

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._stops.matched

    def feed(self, token_ids: Sequence[int]) -> str:
        """Read tokens and return the text that is certain; nothing is read beyond a stop string."""
        text = ""
        for token_id in token_ids:
            if self._stops.matched is not None:
                break
            self.num_tokens += 1
            text += self._stops.feed(self._detokenizer.add(token_id), may_stop=self.num_tokens > self._min_tokens)
        return text

    def finish(self) -> str:
        """Return what is held: of a stop string, or of a character whose bytes never came."""
        if self._stops.matched is not None:
            return ""
        text = self._stops.feed(self._detokenizer.finish(), may_stop=self.num_tokens > self._min_tokens)
        return text + self._stops.finish()
