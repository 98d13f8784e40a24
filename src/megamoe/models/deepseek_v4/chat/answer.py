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

**What can be read is read.** Models slip: a call without its block, a block of another name or without its end, a
parameter that does not say whether it is text, one given twice, True for true. Where only one reading is possible it is
taken, and a Mended event says so. **Everything else that does not follow the grammar is withheld and reported,** never
guessed at: one Malformed event, with the text, where reading goes on. A broken call ends at the next call, or at the
end of the call or of the block; the calls around it are read. A call without ToolCallEnd must not be executed.
`withheld` has what was skipped.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from megamoe.models.deepseek_v4.chat import protocol
from megamoe.models.deepseek_v4.chat.json_prefix import JsonPrefix
from megamoe.models.deepseek_v4.chat.messages import TOOL_NAME

MAX_TAG: Final = 4096  # characters of a tag with its attributes; longer ones are malformed, so little is ever held


class Fault(enum.Enum):
    """Why something was withheld.

    Attributes:
        loses_call: whether it may have been a call, or a part of one.
    """

    STRAY_CONTROL = "stray_control"  # a control token that means nothing where it is
    STRAY_TAG = "stray_tag"  # a DSML tag outside a block
    EMPTY_BLOCK = "empty_block"  # a block without a call
    BAD_TAG = "bad_tag"  # inside a block: text or another tag where a certain tag must be
    BAD_VALUE = "bad_value"  # a parameter that should be JSON and is not
    UNFINISHED = "unfinished"  # the answer ended inside a call or tag

    @property
    def loses_call(self) -> bool:
        """Whether what was withheld may have been a call, or a part of one."""
        return self in (Fault.BAD_TAG, Fault.BAD_VALUE, Fault.UNFINISHED)


class Slip(enum.Enum):
    """What was read although it does not follow the grammar."""

    NO_BLOCK = "no_block"  # a call outside a block
    MISNAMED_BLOCK = "misnamed_block"
    OPEN_CALL = "open_call"  # the next call, or the end of the block, where the end of the call must be
    OPEN_BLOCK = "open_block"  # the answer ended after a call, before the end of the block
    UNTYPED_PARAMETER = "untyped_parameter"  # without string="true" or "false"
    REPEATED_PARAMETER = "repeated_parameter"
    PYTHON_LITERAL = "python_literal"  # True, False or None where JSON has true, false or null


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
    """Something was withheld.

    Attributes:
        fault: why.
        detail: the same in words.
        call_idx: the call it broke, None outside calls.
        text: what was written, control tokens spelled out; of a broken call all of it.
    """

    fault: Fault
    detail: str
    call_idx: int | None = None
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Mended:
    """Something was read that does not follow the grammar. `call_idx` is the call it is in, None outside calls."""

    slip: Slip
    detail: str
    call_idx: int | None = None


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments | ToolCallEnd | Malformed | Mended

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
_MAX_NAME: Final = 24
_MAX_SPACE: Final = 64  # white space after a block of another name, while it is not certain that it is one
_TAG_NAME = re.compile(f"[A-Za-z_]{{0,{_MAX_NAME}}}")
_CALL: Final = f'<{_DSML}invoke name="'
_PARAMETER: Final = f'<{_DSML}parameter name="'
_END_OF_BLOCK: Final = f"</{_DSML}tool_calls>"
_END_OF_CALL: Final = f"</{_DSML}invoke>"
_END_OF_PARAMETER: Final = f"</{_DSML}parameter>"
_AFTER_NAME = re.compile('">')
_AFTER_KEY = re.compile('" string="(true|false)">')
_UNTYPED_KEY = re.compile('[^"\ud800-\udfff]*">')
_ANY_END = re.compile(f"</{_DSML}({_TAG_NAME.pattern})(>?)")
# Where a broken call may end: its own end, the next call, or the end of a block of whatever name.
_STOPS = re.compile(
    f"{re.escape(_END_OF_CALL)}|{re.escape(_CALL)}|</{_DSML}(?!invoke>|parameter>){_TAG_NAME.pattern}>|{_THINK_END}"
)
_PYTHON_LITERALS: Final = {"True": "true", "False": "false", "None": "null"}


class _State(enum.Enum):
    REASONING = enum.auto()
    CONTENT = enum.auto()
    BLOCK = enum.auto()  # inside tool_calls, outside any call
    CALL = enum.auto()  # inside a call, outside any parameter
    TEXT_VALUE = enum.auto()
    JSON_VALUE = enum.auto()
    UNTYPED_VALUE = enum.auto()  # held to its end, which shows whether it is JSON
    SKIPPING = enum.auto()  # to the end of what is malformed


_IN_CALL: Final = (_State.CALL, _State.TEXT_VALUE, _State.JSON_VALUE, _State.UNTYPED_VALUE)


class AnswerParser:
    """Reads one answer.

    Attributes:
        withheld: everything that Malformed events reported, as text, to be logged.
    """

    def __init__(self, *, thinking: bool, texts: Mapping[str, Collection[str]] | None = None) -> None:
        """Begin before the first token.

        Args:
            thinking: the prompt ended with `<think>`, so reasoning comes first.
            texts: per tool the parameters that its schema says are text; looked at where a call does not say.
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
        self._is_orphan = False  # calls without a block
        self._is_faulty = False  # something was wrong in this block
        self._texts_of = texts or {}
        self._name = ""
        self._key = ""
        self._keys: set[str] = set()
        self._json = JsonPrefix()
        self._held_value = ""  # an untyped value, or what may become one of Python's literals
        self._raw = ""  # all of the call so far
        self._fault: tuple[Fault, str, int | None] | None = None  # what is skipped because of it, and how it began
        self._skipped = ""
        self._resume = self._state  # where to go on after what is skipped, and the tag that ends it; "" in a block
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
            _State.UNTYPED_VALUE: self._value,
            _State.SKIPPING: self._skip,
        }

    @property
    def in_reasoning(self) -> bool:
        """Whether `</think>` is still to come."""
        if self._state is _State.SKIPPING and self._skip_until:
            return self._resume is _State.REASONING
        return self._state is _State.REASONING

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
        rest = self._buffer
        if self._state is _State.SKIPPING:
            self._skipped += rest
            self._withhold(rest)
            self._end_skipping()
        elif self._state is _State.BLOCK and self._calls_in_block and not _MARK.search(rest):
            if not self._is_orphan:
                self._emit(Mended(Slip.OPEN_BLOCK, "the answer ends before the end of its block"))
                self._withhold(rest)
            elif rest:
                self._emit(ContentDelta(rest))
        elif self._state in (_State.REASONING, _State.CONTENT) and not _MARK.search(rest):
            self._emit_text(rest)
        else:
            in_call = self._state in _IN_CALL
            text = (self._raw if in_call else "") + rest
            if self._state is _State.BLOCK and not self._is_orphan and not self._calls_in_block:
                text = f"<{_DSML}tool_calls>{rest}"
            detail = "a call" if in_call else "tool calls" if self._state is _State.BLOCK else "a tag"
            self._withhold((self._held_value if in_call else "") + rest)
            self._report(Fault.UNFINISHED, f"the answer ends inside {detail}", text)
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
            token = self._take_buffer(1)
            self._withhold(token)
            self._report(Fault.STRAY_CONTROL, f"{self._texts[token]} in {self._state.name.lower()}", token)
        return True

    def _tag(self, lead: int, name_at: int, *, is_closing: bool) -> bool:
        """Read a tag in free text: `lead` is where the characters before it begin, `name_at` its name."""
        found = _TAG_NAME.match(self._buffer, name_at)
        assert found is not None  # the pattern matches nothing, too
        name, end = found.group(), found.end()
        is_whole = self._buffer.startswith(">", end)
        begin = None if is_closing else self._slip_of(name, name_at, end, is_whole)
        if end == len(self._buffer) and len(name) < _MAX_NAME or begin == "":  # the name, or what shows it, is to come
            self._emit_text(self._take_buffer(lead))
            return False
        if isinstance(begin, Slip) or name == "tool_calls" and is_whole and not is_closing:
            self._emit_text(self._take_buffer(lead))
            self._take_buffer((name_at - 2 if begin is Slip.NO_BLOCK else end + 1) - lead)
            self._before_block, self._calls_in_block, self._is_faulty = self._state, 0, False
            self._is_orphan = begin is Slip.NO_BLOCK
            if isinstance(begin, Slip):
                self._emit(Mended(begin, f"<{protocol.DSML}{name}> in {self._state.name.lower()}"))
            self._state = _State.BLOCK
            return True
        tag = f"<{'/' if is_closing else ''}{protocol.DSML}{name}>"
        bracket = name_at - (3 if is_closing else 2)
        if is_closing or name not in ("tool_calls", "invoke", "parameter"):
            self._emit_text(self._take_buffer(bracket))
            text = self._take_buffer(end + is_whole - bracket)
            self._withhold(text)
            self._report(Fault.STRAY_TAG, f"{tag} in {self._state.name.lower()}", text)
            return True
        self._emit_text(self._take_buffer(lead))
        # A call that is drafted in a thought is no part of the answer.
        fault = Fault.STRAY_TAG if self._state is _State.REASONING else Fault.BAD_TAG
        self._skip_to(f"</{_DSML}{name}>", fault, f"{tag} in {self._state.name.lower()}")
        return True

    def _slip_of(self, name: str, name_at: int, end: int, is_whole: bool) -> Slip | str | None:
        """Return how an opening tag outside a block begins calls all the same; "" if that is open, None if not."""
        if name == "invoke" and self._state is _State.CONTENT:
            tag = self._buffer[name_at - 2 : name_at - 2 + len(_CALL)]
            return Slip.NO_BLOCK if tag == _CALL else "" if _CALL.startswith(tag) else None
        if name in ("tool_calls", "invoke", "parameter") or not is_whole:
            return None
        after = self._buffer[end + 1 :]
        following = after.lstrip(_SPACE)[: len(_CALL)]
        if len(after) - len(after.lstrip(_SPACE)) > _MAX_SPACE:
            return None
        return Slip.MISNAMED_BLOCK if following == _CALL else "" if _CALL.startswith(following) else None

    def _block(self) -> bool:
        found = self._one_of(_CALL, _END_OF_BLOCK)
        if found == _END_OF_BLOCK:
            return self._end_block(found)
        if found == "":
            return False
        if found is None:
            end = _ANY_END.match(self._buffer)
            if (
                end is not None
                and end.end() == len(self._buffer)
                and not end.group(2)
                and len(end.group(1)) < _MAX_NAME
            ):
                return False
            if end is not None and end.group(2) and end.group(1) not in ("invoke", "parameter"):
                self._emit(Mended(Slip.MISNAMED_BLOCK, f"</{protocol.DSML}{end.group(1)}> ends a block"))
                return self._end_block(end.group())
            if self._is_orphan and (self._calls_in_block or self._is_faulty):
                self._go_on(self._after_block)
                return True
            return self._break(Fault.BAD_TAG, "a call or the end of the block must follow")
        after = self._after_attribute(_CALL, _AFTER_NAME, "a call's name")
        if after is None:
            return self._state is _State.SKIPPING
        name = self._buffer[len(_CALL) : after.start()]
        if not TOOL_NAME.fullmatch(name):
            return self._break(Fault.BAD_TAG, "a call's name is empty or holds what a name cannot", begun=len(_CALL))
        self._raw = self._take_buffer(after.end())
        self._emit(ToolCallStart(self._num_calls, name))
        self._num_calls += 1
        self._calls_in_block += 1
        self._name = name
        self._keys = set()
        self._state = _State.CALL
        return True

    def _end_block(self, tag: str) -> bool:
        self._take_buffer(len(tag))
        if not self._calls_in_block and not self._is_faulty:
            text = f"<{_DSML}tool_calls>{tag}"
            self._withhold(text)
            self._report(Fault.EMPTY_BLOCK, "no call between <｜DSML｜tool_calls> and its end", text)
        self._go_on(self._after_block)
        return True

    def _call(self) -> bool:
        found = self._one_of(_PARAMETER, _END_OF_CALL)
        if found == _END_OF_CALL:
            self._take_buffer(len(found))
            return self._end_call()
        if found == "":
            return False
        if found is None:
            rest = self._buffer
            end = _ANY_END.match(rest)
            is_open = end is not None and end.end() == len(rest) and not end.group(2) and len(end.group(1)) < _MAX_NAME
            if _CALL.startswith(rest) or is_open:
                return False
            is_end = end is not None and bool(end.group(2)) and end.group(1) not in ("invoke", "parameter")
            if not rest.startswith(_CALL) and not is_end:
                return self._break(Fault.BAD_TAG, "a parameter or the end of the call must follow")
            self._mend(Slip.OPEN_CALL, "the end of the call is missing")
        if found != _PARAMETER:  # the next call or the end of the block: what is complete ends here, too
            return self._end_call()
        after = self._after_attribute(_PARAMETER, _AFTER_KEY, "a parameter's name", otherwise=_UNTYPED_KEY)
        if after is None:
            return self._state is _State.SKIPPING
        is_typed = after.re is _AFTER_KEY
        self._key = self._buffer[len(_PARAMETER) : after.start() if is_typed else after.end() - len('">')]
        is_text = is_typed and after.group(1) == "true"
        self._take_buffer(after.end())
        if self._key in self._keys:  # readers of JSON take the last of two
            self._mend(Slip.REPEATED_PARAMETER, f"parameter {self._key!r:.100} is given twice")
        before = ", " if self._keys else "{"
        self._keys.add(self._key)
        self._emit_arguments(f"{before}{json.dumps(self._key, ensure_ascii=False)}: " + ('"' if is_text else ""))
        typed = _State.TEXT_VALUE if is_text else _State.JSON_VALUE
        self._state = typed if is_typed else _State.UNTYPED_VALUE
        self._json, self._held_value = JsonPrefix(), ""
        return True

    def _end_call(self) -> bool:
        self._emit_arguments("}" if self._keys else "{}")
        self._emit(ToolCallEnd(self._num_calls - 1))
        self._state = _State.BLOCK
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
        elif self._state is _State.UNTYPED_VALUE:
            self._end_untyped_value()
        elif self._held_value.strip(_SPACE) in _PYTHON_LITERALS:
            self._mend(Slip.PYTHON_LITERAL, f"{self._held_value.strip(_SPACE)} is not JSON")
            self._emit_arguments(_PYTHON_LITERALS[self._held_value.strip(_SPACE)])
        elif not self._json.is_complete:
            self._withhold(self._held_value)
            return self._break(Fault.BAD_VALUE, "a value that should be JSON is not complete")
        self._take_buffer(len(_END_OF_PARAMETER))
        self._held_value = ""
        self._state = _State.CALL
        return True

    def _end_untyped_value(self) -> None:
        """Send a value that did not say what it is: text where the schema says so, else JSON if it is JSON."""
        value = self._held_value
        self._mend(Slip.UNTYPED_PARAMETER, f"parameter {self._key!r:.100} does not say whether it is text")
        prefix = JsonPrefix()
        is_json = prefix.accept(value) == len(value) and prefix.is_complete
        is_text = not is_json or self._key in self._texts_of.get(self._name, ())
        self._emit_arguments(json.dumps(value, ensure_ascii=False) if is_text else value.strip(_SPACE))

    def _skip(self) -> bool:
        if self._skip_until:
            return self._skip_a_tag()
        start = 0
        while (stop := _STOPS.search(self._buffer, start)) is not None:
            if stop.group() != _THINK_END or self._after_block is _State.REASONING:
                break
            start = stop.end()  # content: the token means nothing here
        if stop is None:  # what may be the beginning of a stop stays
            held = self._buffer.rfind("<", max(0, len(self._buffer) - len(_CALL) - _MAX_NAME))
            self._skip_over(len(self._buffer) if held < 0 else held)
            return False
        self._skip_over(stop.end() if stop.group() == _END_OF_CALL else stop.start())
        self._state = _State.REASONING if stop.group() == _THINK_END else _State.BLOCK
        self._end_skipping()
        return True

    def _skip_a_tag(self) -> bool:
        """Skip to the tag that ends what began outside a block."""
        end = self._buffer.find(self._skip_until)
        think_end = self._buffer.find(_THINK_END)
        if self._resume is _State.REASONING and think_end >= 0 and (end < 0 or think_end < end):
            self._skip_over(think_end)
            self._state = self._resume
        elif end < 0:
            self._skip_over(max(0, len(self._buffer) - len(self._skip_until) + 1))
            return False
        else:
            self._skip_over(end + len(self._skip_until))
            self._go_on(self._resume)
        self._end_skipping()
        return True

    def _skip_over(self, end: int) -> None:
        text = self._take_buffer(end)
        self._skipped += text
        self._withhold(text)

    def _end_skipping(self) -> None:
        assert self._fault is not None
        fault, detail, call_idx = self._fault
        text = (self._raw if call_idx is not None else "") + self._skipped
        self._emit(Malformed(fault, detail, call_idx, self._as_text(text)))

    # parts of a step

    def _one_of(self, *tags: str) -> str | None:
        """Return which tag the buffer begins with, after white space; "" if that is open, None if it is none."""
        self._take_buffer(len(self._buffer) - len(self._buffer.lstrip(_SPACE)))
        for tag in tags:
            if self._buffer.startswith(tag):
                return tag
        return "" if any(tag.startswith(self._buffer) for tag in tags) else None

    def _after_attribute(
        self, tag: str, after: re.Pattern[str], what: str, *, otherwise: re.Pattern[str] | None = None
    ) -> re.Match[str] | None:
        """Return the match of what ends the attribute that `tag` begins; None if that is open, or cannot come.

        Args:
            tag: what the buffer begins with.
            after: what ends the attribute.
            what: names it in a report.
            otherwise: what may stand there instead, from the beginning of the attribute; taken if `after` cannot come.
        """
        found = after.search(self._buffer, len(tag), MAX_TAG)
        mark = _MARK.search(self._buffer, len(tag), found.start() if found else MAX_TAG)
        if mark is None and (found is not None or len(self._buffer) < MAX_TAG):
            return found
        instead = None if otherwise is None else otherwise.match(self._buffer, len(tag), MAX_TAG)
        if instead is not None:
            return instead
        why = "does not end" if mark is None else "holds control tokens"
        self._break(Fault.BAD_TAG, f"{what} {why}", begun=len(_CALL) if tag == _CALL else 0)
        return None

    def _emit_value(self, text: str) -> bool:
        """Send more of a parameter's value; return whether it broke the call."""
        if self._state is _State.TEXT_VALUE:
            self._emit_arguments(json.dumps(text, ensure_ascii=False)[1:-1])
            return False
        if self._state is _State.UNTYPED_VALUE:
            self._held_value += text
            return False
        if not self._json.has_begun and not self._held_value:
            space = len(text) - len(text.lstrip(_SPACE))
            self._emit_arguments(text[:space])
            text = text[space:]
        if self._held_value or not self._json.has_begun and text[:1] in ("T", "F", "N"):
            self._held_value += text
            if any(word.startswith(self._held_value.strip(_SPACE)) for word in _PYTHON_LITERALS):
                return False
            return self._break(Fault.BAD_VALUE, "a value that should be JSON is not", taken=self._held_value)
        accepted = self._json.accept(text)
        self._emit_arguments(text[:accepted])
        if accepted == len(text):
            return False
        return self._break(Fault.BAD_VALUE, "a value that should be JSON is not", taken=text[accepted:])

    def _break(self, fault: Fault, detail: str, *, begun: int = 0, taken: str = "") -> bool:
        """Note a fault inside a block and skip to where reading can go on.

        Args:
            fault: why.
            detail: the same in words.
            begun: characters of the buffer that belong to what is broken and may not end it.
            taken: what was taken from the buffer and is not sent.
        """
        self._is_faulty = True
        self._skip_to("", fault, detail)
        self._withhold(taken)
        self._skip_over(begun)
        return True

    @property
    def _after_block(self) -> _State:
        """What follows a block: a call ends reasoning as </think> does, a block without one changes nothing."""
        return _State.CONTENT if self._calls_in_block else self._before_block

    def _go_on(self, state: _State) -> None:
        self._state, self._drop_space = state, state is _State.CONTENT

    def _skip_to(self, until: str, fault: Fault, detail: str) -> None:
        self._fault = fault, detail, self._num_calls - 1 if self._state in _IN_CALL else None
        self._resume, self._skip_until, self._skipped = self._state, until, ""
        self._state = _State.SKIPPING

    def _report(self, fault: Fault, detail: str, text: str) -> None:
        call_idx = self._num_calls - 1 if self._state in _IN_CALL else None
        self._emit(Malformed(fault, detail, call_idx, self._as_text(text)))

    def _mend(self, slip: Slip, detail: str) -> None:
        self._emit(Mended(slip, detail, self._num_calls - 1))

    def _withhold(self, text: str) -> None:
        self.withheld += self._as_text(text)

    def _as_text(self, text: str) -> str:
        return _MARK.sub(lambda found: self._texts[found.group()], text)

    def _mark(self, token: str) -> str:
        """Return the character that stands for a control token."""
        if token not in self._marks:
            mark = chr(_FIRST_MARK + len(self._marks))
            self._marks[token], self._texts[mark] = mark, token
        return self._marks[token]

    def _take_buffer(self, end: int) -> str:
        taken, self._buffer = self._buffer[:end], self._buffer[end:]
        if self._state in _IN_CALL:
            self._raw += taken
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
