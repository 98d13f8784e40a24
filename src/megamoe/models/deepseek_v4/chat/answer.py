# SPDX-License-Identifier: Apache-2.0
"""What the model writes → reasoning, content and tool calls, while it is being written.

    {reasoning}</think>{content}\\n\\n<｜DSML｜tool_calls>\\n<｜DSML｜invoke name="f">\\n
    <｜DSML｜parameter name="p" string="true">text</｜DSML｜parameter>\\n</｜DSML｜invoke>\\n</｜DSML｜tool_calls>

**Markup is control tokens.** `text` takes ordinary characters, `control` takes control tokens; only the latter are
markup. A model that repeats a `<｜DSML｜tool_calls>` of its user in ordinary characters writes text, not a call.
`spelled` is for text whose control tokens are spelled out and cannot be told apart; there every spelling counts.

**Nothing is taken back, no markup gets out.** Characters that may turn out to belong to a tag ("\\n\\n<") are held
until that is decided; everything else goes out at once. Between tags of a block only white space may stand. Arguments
are sent as pieces of one JSON object: raw text is escaped as it comes, JSON is checked character by character. A block
with a call ends reasoning as `</think>` does, since models go straight from a thought to the call.

**What does not follow the grammar is withheld and reported,** never guessed at: one Malformed event where it is found.
Inside a block everything up to its end is skipped then; a call without ToolCallEnd must not be executed. Single
control tokens and closing tags that make no sense where they are cost nothing else. `withheld` has what was skipped.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Iterable
from typing import Final

from megamoe.models.deepseek_v4.chat import protocol
from megamoe.models.deepseek_v4.chat.json_prefix import JsonPrefix
from megamoe.models.deepseek_v4.chat.messages import TOOL_NAME

MAX_TAG: Final = 4096  # characters of a tag with its attributes; longer ones are malformed, so little is ever held


class Fault(enum.Enum):
    """Why something was withheld."""

    STRAY_CONTROL = "stray_control"  # a control token that means nothing where it is
    STRAY_TAG = "stray_tag"  # a DSML tag outside a block
    EMPTY_BLOCK = "empty_block"  # a block without a call
    BAD_TAG = "bad_tag"  # inside a block: text or another tag where a certain tag must be
    BAD_VALUE = "bad_value"  # a parameter that should be JSON and is not
    REPEATED_PARAMETER = "repeated_parameter"
    UNFINISHED = "unfinished"  # the answer ended inside a block


@dataclasses.dataclass(frozen=True)
class ReasoningDelta:
    """More reasoning."""

    text: str


@dataclasses.dataclass(frozen=True)
class ContentDelta:
    """More of what the user sees."""

    text: str


@dataclasses.dataclass(frozen=True)
class ToolCallStart:
    """A call begins; calls are numbered from 0 in the order they begin."""

    call_idx: int
    name: str


@dataclasses.dataclass(frozen=True)
class ToolCallArguments:
    """More of the call's arguments; joined up to ToolCallEnd they are one JSON object."""

    call_idx: int
    text: str


@dataclasses.dataclass(frozen=True)
class ToolCallEnd:
    """The call is complete and well-formed."""

    call_idx: int


@dataclasses.dataclass(frozen=True)
class Malformed:
    """Something was withheld. `call_idx` is the call it broke, None outside calls."""

    fault: Fault
    detail: str
    call_idx: int | None = None


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments | ToolCallEnd | Malformed

# A control token is one character while it is in the buffer: a surrogate, which text never contains.
_FIRST_MARK: Final = 0xD800
_MARK = re.compile("[\ud800-\udfff]")
_DSML: Final = chr(_FIRST_MARK)
_THINK_END: Final = chr(_FIRST_MARK + 1)
_SPELLED = re.compile("|".join(map(re.escape, protocol.CONTROL_TOKENS)))
_BEGINNINGS: Final = frozenset(token[:end] for token in protocol.CONTROL_TOKENS for end in range(1, len(token)))
_LONGEST_BEGINNING: Final = max(map(len, _BEGINNINGS))

_SPACE: Final = " \t\r\n"
_MAY_LEAD_TO_A_TAG = re.compile(r"(\n{1,2}(</?)?|</?)\Z")  # "\n\n<" comes before the tag of a block
_LEADS_TO_A_TAG = re.compile(r"\n{0,2}<(/?)\Z")
_MAY_LEAD_TO_THE_END = re.compile(r"</?\Z")
_TAG_NAME = re.compile("[a-z_]{0,16}")
_CALL: Final = f'<{_DSML}invoke name="'
_PARAMETER: Final = f'<{_DSML}parameter name="'
_END_OF_BLOCK: Final = f"</{_DSML}tool_calls>"
_END_OF_CALL: Final = f"</{_DSML}invoke>"
_END_OF_PARAMETER: Final = f"</{_DSML}parameter>"
_AFTER_NAME = re.compile('">')
_AFTER_KEY = re.compile('" string="(true|false)">')


class _State(enum.Enum):
    REASONING = enum.auto()
    CONTENT = enum.auto()
    BLOCK = enum.auto()  # inside tool_calls, outside any call
    CALL = enum.auto()  # inside a call, outside any parameter
    TEXT_VALUE = enum.auto()
    JSON_VALUE = enum.auto()
    SKIPPING = enum.auto()  # to the end of what is malformed


class AnswerParser:
    """Reads one answer.

    Attributes:
        withheld: everything that Malformed events reported, as text, to be logged.
    """

    def __init__(self, *, thinking: bool) -> None:
        """Begin before the first token.

        Args:
            thinking: the prompt ended with `<think>`, so reasoning comes first.
        """
        self.withheld = ""
        self._state = _State.REASONING if thinking else _State.CONTENT
        self._buffer = ""
        self._spelled = ""
        self._events: list[Event] = []
        self._marks: dict[str, str] = {protocol.DSML: _DSML, protocol.THINK_END: _THINK_END}
        self._texts: dict[str, str] = {mark: token for token, mark in self._marks.items()}
        self._num_calls = 0
        self._calls_in_block = 0
        self._before_block = self._state
        self._keys: set[str] = set()
        self._json = JsonPrefix()
        self._resume = self._state  # where to go on after what is skipped, and the tag that ends it
        self._skip_until = ""
        self._drop_space = False  # content after a block: white space between is no content
        self._is_finished = False
        self._steps = {
            _State.REASONING: self._free_text,
            _State.CONTENT: self._free_text,
            _State.BLOCK: self._block,
            _State.CALL: self._call,
            _State.TEXT_VALUE: self._value,
            _State.JSON_VALUE: self._value,
            _State.SKIPPING: self._skip,
        }

    @property
    def in_reasoning(self) -> bool:
        """Whether `</think>` is still to come."""
        return self._state is _State.REASONING or self._state is _State.SKIPPING and self._resume is _State.REASONING

    @property
    def num_calls(self) -> int:
        """How many calls have begun."""
        return self._num_calls

    def text(self, text: str) -> list[Event]:
        """Read ordinary characters and return what is certain now.

        Raises:
            ValueError: the text holds surrogates, or the answer was finished.
        """
        self._check_open()
        if _MARK.search(text):
            raise ValueError("answer: the text is not valid Unicode (it holds surrogates). Decode the bytes as UTF-8.")
        self._buffer += text
        return self._advance()

    def control(self, token: str) -> list[Event]:
        """Read a control token, given by its text, and return what is certain now. EOS stands for nothing.

        Raises:
            ValueError: the answer was finished.
        """
        self._check_open()
        if token != protocol.EOS:
            self._buffer += self._mark(token)
        return self._advance()

    def spelled(self, text: str) -> list[Event]:
        """Read text in which control tokens are spelled out, and return what is certain now.

        Raises:
            ValueError: the text holds surrogates, or the answer was finished.
        """
        self._check_open()
        self._spelled += text
        start = 0
        events: list[Event] = []
        for found in _SPELLED.finditer(self._spelled):
            events += self.text(self._spelled[start : found.start()]) + self.control(found.group())
            start = found.end()
        rest = self._spelled[start:]
        held = next((n for n in range(min(_LONGEST_BEGINNING, len(rest)), 0, -1) if rest[-n:] in _BEGINNINGS), 0)
        self._spelled = rest[len(rest) - held :]
        return _joined(events + self.text(rest[: len(rest) - held]))

    def finish(self) -> list[Event]:
        """End the answer and return what was held: text, or a report that a block is not complete.

        Raises:
            ValueError: the answer was finished before.
        """
        self._check_open()
        events = self.text(self._spelled)
        self._is_finished = True
        if self._state in (_State.REASONING, _State.CONTENT):
            if _MARK.search(self._buffer):
                self._report(Fault.UNFINISHED, "the answer ends inside a tag")
                self._withhold(self._buffer)
            else:
                self._emit_text(self._buffer)
        elif self._state is _State.SKIPPING:
            self._withhold(self._buffer)
        else:
            self._report(Fault.UNFINISHED, "the answer ends inside tool calls")
            self._withhold(self._buffer)
        self._buffer = ""
        return _joined(events + self._take())

    # the machine: each step looks at the buffer, takes what is decided and says whether to look again

    def _advance(self) -> list[Event]:
        while self._steps[self._state]():
            pass
        return self._take()

    def _free_text(self) -> bool:
        if self._drop_space:
            self._buffer = self._buffer.lstrip(_SPACE)
            self._drop_space = not self._buffer
        found = _MARK.search(self._buffer)
        if found is None:
            self._emit_text(self._take_buffer(_held_from(self._buffer, _MAY_LEAD_TO_A_TAG)))
            return False
        lead = _LEADS_TO_A_TAG.search(self._buffer[: found.start()]) if found.group() == _DSML else None
        if lead is not None:
            return self._tag(lead.start(), found.end(), is_closing=lead.group(1) == "/")
        self._emit_text(self._take_buffer(found.start()))
        if self._state is _State.REASONING and found.group() == _THINK_END:
            self._take_buffer(1)
            self._state = _State.CONTENT
        else:
            self._report(Fault.STRAY_CONTROL, f"{self._texts[found.group()]} in {self._state.name.lower()}")
            self._withhold(self._take_buffer(1))
        return True

    def _tag(self, lead: int, name_at: int, *, is_closing: bool) -> bool:
        """Read a tag in free text: `lead` is where the characters before it begin, `name_at` its name."""
        found = _TAG_NAME.match(self._buffer, name_at)
        assert found is not None  # the pattern matches nothing, too
        name, end = found.group(), found.end()
        if end == len(self._buffer) and len(name) < 16:  # the name may go on
            self._emit_text(self._take_buffer(lead))
            return False
        is_whole = self._buffer.startswith(">", end)
        if name == "tool_calls" and is_whole and not is_closing:
            self._emit_text(self._take_buffer(lead))
            self._take_buffer(end + 1 - lead)
            self._before_block, self._calls_in_block = self._state, 0
            self._state = _State.BLOCK
            return True
        tag = f"<{'/' if is_closing else ''}{protocol.DSML}{name}>"
        bracket = name_at - (3 if is_closing else 2)
        if is_closing or name not in ("tool_calls", "invoke", "parameter"):
            self._emit_text(self._take_buffer(bracket))
            self._report(Fault.STRAY_TAG, f"{tag} in {self._state.name.lower()}")
            self._withhold(self._take_buffer(end + is_whole - bracket))
            return True
        self._emit_text(self._take_buffer(lead))
        self._report(Fault.STRAY_TAG, f"{tag} in {self._state.name.lower()}")
        self._skip_to(f"</{_DSML}{name}>", self._state)
        return True

    def _block(self) -> bool:
        found = self._one_of(_CALL, _END_OF_BLOCK)
        if found == _END_OF_BLOCK:
            self._take_buffer(len(found))
            if not self._calls_in_block:
                self._report(Fault.EMPTY_BLOCK, "no call between <｜DSML｜tool_calls> and its end")
                self._withhold(f"<{_DSML}tool_calls>{found}")
            self._go_on(self._after_block)
            return True
        if found != _CALL:
            return found is None and self._break(Fault.BAD_TAG, "a call or the end of the block must follow")
        after = self._after_attribute(_CALL, _AFTER_NAME, "a call's name")
        if after is None:
            return self._state is _State.SKIPPING
        name = self._buffer[len(_CALL) : after.start()]
        if not TOOL_NAME.fullmatch(name):
            return self._break(Fault.BAD_TAG, "a call's name is empty or holds what a name cannot")
        self._take_buffer(after.end())
        self._emit(ToolCallStart(self._num_calls, name))
        self._num_calls += 1
        self._calls_in_block += 1
        self._keys = set()
        self._state = _State.CALL
        return True

    def _call(self) -> bool:
        found = self._one_of(_PARAMETER, _END_OF_CALL)
        if found == _END_OF_CALL:
            self._take_buffer(len(found))
            self._emit_arguments("}" if self._keys else "{}")
            self._emit(ToolCallEnd(self._num_calls - 1))
            self._state = _State.BLOCK
            return True
        if found != _PARAMETER:
            return found is None and self._break(Fault.BAD_TAG, "a parameter or the end of the call must follow")
        after = self._after_attribute(_PARAMETER, _AFTER_KEY, "a parameter's name")
        if after is None:
            return self._state is _State.SKIPPING
        key, is_text = self._buffer[len(_PARAMETER) : after.start()], after.group(1) == "true"
        if key in self._keys:
            return self._break(Fault.REPEATED_PARAMETER, f"parameter {key!r:.100} is given twice")
        self._take_buffer(after.end())
        before = ", " if self._keys else "{"
        self._keys.add(key)
        self._emit_arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: " + ('"' if is_text else ""))
        self._state, self._json = (_State.TEXT_VALUE if is_text else _State.JSON_VALUE), JsonPrefix()
        return True

    def _value(self) -> bool:
        found = _MARK.search(self._buffer)
        if found is None:
            self._emit_value(self._take_buffer(_held_from(self._buffer, _MAY_LEAD_TO_THE_END)))
            return False
        bracket = _MAY_LEAD_TO_THE_END.search(self._buffer[: found.start()]) if found.group() == _DSML else None
        if bracket is None:  # a control token that begins no tag is what the model wrote
            text = self._buffer[: found.start()] + self._texts[found.group()]
            self._take_buffer(found.end())
            self._emit_value(text)
            return True
        if self._emit_value(self._take_buffer(bracket.start())):
            return True  # and now skipping
        if len(self._buffer) < len(_END_OF_PARAMETER) and _END_OF_PARAMETER.startswith(self._buffer):
            return False
        if not self._buffer.startswith(_END_OF_PARAMETER):
            return self._break(Fault.BAD_TAG, "the end of the parameter must be the first tag after its value")
        if self._state is _State.TEXT_VALUE:
            self._emit_arguments('"')
        elif not self._json.is_complete:
            return self._break(Fault.BAD_VALUE, "a value that should be JSON is not complete")
        self._take_buffer(len(_END_OF_PARAMETER))
        self._state = _State.CALL
        return True

    def _skip(self) -> bool:
        end = self._buffer.find(self._skip_until)
        think_end = self._buffer.find(_THINK_END)
        if self._resume is _State.REASONING and think_end >= 0:
            self._withhold(self._take_buffer(think_end))
            self._state = self._resume
            return True
        if end < 0:
            self._withhold(self._take_buffer(max(0, len(self._buffer) - len(self._skip_until) + 1)))
            return False
        self._withhold(self._take_buffer(end + len(self._skip_until)))
        self._go_on(self._resume)
        return True

    # parts of a step

    def _one_of(self, *tags: str) -> str | None:
        """Return which tag the buffer begins with, after white space; "" if that is open, None if it is none."""
        self._buffer = self._buffer.lstrip(_SPACE)
        for tag in tags:
            if self._buffer.startswith(tag):
                return tag
        return "" if any(tag.startswith(self._buffer) for tag in tags) else None

    def _after_attribute(self, tag: str, after: re.Pattern[str], what: str) -> re.Match[str] | None:
        """Return the match of what ends the attribute that `tag` begins; None if that is open, or cannot come."""
        found = after.search(self._buffer, len(tag), MAX_TAG)
        if _MARK.search(self._buffer, len(tag), found.start() if found else len(self._buffer)):
            self._break(Fault.BAD_TAG, f"{what} holds control tokens")
            return None
        if found is None and len(self._buffer) >= MAX_TAG:
            self._break(Fault.BAD_TAG, f"{what} does not end")
        return found

    def _emit_value(self, text: str) -> bool:
        """Send more of a parameter's value; return whether it broke the call."""
        if self._state is _State.TEXT_VALUE:
            self._emit_arguments(json.dumps(text, ensure_ascii=False)[1:-1])
            return False
        accepted = self._json.accept(text)
        self._emit_arguments(text[:accepted])
        if accepted == len(text):
            return False
        self._buffer = text[accepted:] + self._buffer
        return self._break(Fault.BAD_VALUE, "a value that should be JSON is not")

    def _break(self, fault: Fault, detail: str) -> bool:
        """Report a fault inside a block and skip to its end."""
        self._report(fault, detail)
        self._skip_to(_END_OF_BLOCK, self._after_block)
        return True

    @property
    def _after_block(self) -> _State:
        """What follows a block: a call ends reasoning as </think> does, a block without one changes nothing."""
        return _State.CONTENT if self._calls_in_block else self._before_block

    def _go_on(self, state: _State) -> None:
        self._state, self._drop_space = state, state is _State.CONTENT

    def _skip_to(self, until: str, resume: _State) -> None:
        self._state, self._skip_until, self._resume = _State.SKIPPING, until, resume

    def _report(self, fault: Fault, detail: str) -> None:
        in_call = self._state in (_State.CALL, _State.TEXT_VALUE, _State.JSON_VALUE)
        self._emit(Malformed(fault, detail, self._num_calls - 1 if in_call else None))

    def _withhold(self, text: str) -> None:
        self.withheld += _MARK.sub(lambda found: self._texts[found.group()], text)

    def _mark(self, token: str) -> str:
        """Return the character that stands for a control token."""
        if token not in self._marks:
            mark = chr(_FIRST_MARK + len(self._marks))
            self._marks[token], self._texts[mark] = mark, token
        return self._marks[token]

    def _take_buffer(self, end: int) -> str:
        taken, self._buffer = self._buffer[:end], self._buffer[end:]
        return taken

    def _emit(self, event: Event) -> None:
        self._events.append(event)

    def _emit_text(self, text: str) -> None:
        if text:
            self._emit(ReasoningDelta(text) if self._state is _State.REASONING else ContentDelta(text))

    def _emit_arguments(self, text: str) -> None:
        if text:
            self._emit(ToolCallArguments(self._num_calls - 1, text))

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return _joined(events)

    def _check_open(self) -> None:
        if self._is_finished:
            raise ValueError("answer: the answer is finished. Make a new parser for the next one.")


def _held_from(text: str, pattern: re.Pattern[str]) -> int:
    """Return where the characters at the end begin that may belong to a tag."""
    found = pattern.search(text, max(0, len(text) - 4))
    return found.start() if found else len(text)


def _joined(events: Iterable[Event]) -> list[Event]:
    """Return the events with neighbouring pieces of the same text joined."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            joined[-1] = ReasoningDelta(last.text + event.text)
        elif isinstance(event, ContentDelta) and isinstance(last, ContentDelta):
            joined[-1] = ContentDelta(last.text + event.text)
        elif (
            isinstance(event, ToolCallArguments)
            and isinstance(last, ToolCallArguments)
            and last.call_idx == event.call_idx
        ):
            joined[-1] = ToolCallArguments(event.call_idx, last.text + event.text)
        else:
            joined.append(event)
    return joined
