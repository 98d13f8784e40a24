# SPDX-License-Identifier: Apache-2.0
"""Messages → prompt, the way DeepSeek-V4 was trained to read it.

A prompt is a list of pieces: plain text (str) and control tokens (Control). Only this file writes control tokens, and
they become ids by name, while plain text is tokenized as characters; so nothing a user, a tool or a schema says can
become a control token, whatever it spells. Joined to one string, the pieces equal the released encoder's output.

    BOS [effort] {system}[\\n\\n{tools}][\\n\\n{response format}]
    <｜User｜>{user}<｜Assistant｜> then <think> or </think>
    assistant turns: {reasoning}</think>{content}{calls}EOS

Tool results become blocks of the user turn after the calls, in the order of the calls. Reasoning of turns before the
last user turn is dropped, unless some message carries tools.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megamoe.models.deepseek_v4.chat import protocol
from megamoe.models.deepseek_v4.chat.messages import (
    AssistantMessage,
    DeveloperMessage,
    LatestReminder,
    Message,
    SystemMessage,
    Tool,
    ToolCall,
    ToolResult,
    UserMessage,
    check_tool_names,
    to_json,
)
from megamoe.models.deepseek_v4.chat.protocol import EFFORT_PREFIXES, Release, Task


@dataclasses.dataclass(frozen=True)
class Control:
    """A control token, by its text."""

    token: str


Piece = str | Control


@dataclasses.dataclass(frozen=True)
class Prompt:
    """An encoded conversation.

    Attributes:
        pieces: plain text and control tokens; no two texts are neighbours.
        thinking: what the model writes next is reasoning, up to `</think>`.
    """

    pieces: tuple[Piece, ...]
    thinking: bool

    @property
    def text(self) -> str:
        """The prompt as one string, to be looked at: plain text that spells a control token looks like one."""
        return "".join(piece if isinstance(piece, str) else piece.token for piece in self.pieces)


def encode(
    messages: Sequence[Message],
    *,
    release: Release,
    thinking: bool,
    effort: str | None = None,
    tools: Sequence[Tool] = (),
    response_format: Mapping[str, Any] | None = None,
) -> Prompt:
    """Encode a conversation.

    Args:
        messages: not empty. A system message may stand anywhere; one at the very end is followed by the assistant's
            prefix, where the released encoder leaves the model without one.
        release: which effort tiers there are.
        thinking: the model reasons before it answers.
        effort: a tier of the release; None is its default, which adds nothing. Only with `thinking`.
        tools: shown on the first message, which must be a system message; without one an empty one is put there.
        response_format: a JSON schema, shown likewise.

    Returns:
        The prompt. It ends where the model is to write, or with EOS if the last message is a finished answer.

    Raises:
        ValueError: naming the message: no messages, a tool result without its call or for the second time, an open
            answer that is not last, calls or tools given twice, an unknown effort.
    """
    prefix = _effort_prefix(release, thinking, effort)
    turns = _turns(_with_instructions(messages, tools, response_format))
    drop = not any(turn.tools for turn in turns if isinstance(turn, SystemMessage | DeveloperMessage))
    if thinking and drop:
        last = _last_user(turns)
        turns = [turn for idx, turn in enumerate(turns) if idx >= last or not isinstance(turn, DeveloperMessage)]
    return _render(turns, prefix, thinking, drop)


def encode_calls(calls: Sequence[ToolCall]) -> list[Piece]:
    """Return how the model writes these calls after its content; nothing for none."""
    return _merged(_calls(calls))


# conversation → turns


@dataclasses.dataclass(frozen=True)
class _UserTurn:
    """A user's messages and tool results that follow each other without an answer between."""

    blocks: tuple[str, ...]
    task: Task | None


_Turn = SystemMessage | DeveloperMessage | AssistantMessage | LatestReminder | _UserTurn


def _with_instructions(
    messages: Sequence[Message], tools: Sequence[Tool], response_format: Mapping[str, Any] | None
) -> list[Message]:
    """Return the messages with tools and response format on the leading system message."""
    if not messages:
        raise ValueError("chat: there are no messages. Pass at least one user message.")
    if not tools and response_format is None:
        return list(messages)
    first = messages[0]
    rest = list(messages[1:]) if isinstance(first, SystemMessage) else list(messages)
    system = first if isinstance(first, SystemMessage) else SystemMessage()
    if tools and system.tools or response_format is not None and system.response_format is not None:
        raise ValueError("chat: the system message and the request both give tools or a response format. Give one.")
    check_tool_names(tools)
    return [
        dataclasses.replace(
            system,
            tools=tuple(tools) or system.tools,
            response_format=system.response_format if response_format is None else response_format,
        ),
        *rest,
    ]


@dataclasses.dataclass(frozen=True)
class _Result:
    """A tool result and which of the last answer's calls it belongs to."""

    place: int
    content: str


def _turns(messages: Sequence[Message]) -> list[_Turn]:
    """Return the turns: neighbouring user messages and tool results merged, results in the order of their calls."""
    turns: list[_Turn] = []
    blocks: list[UserMessage | _Result] = []  # of the user turn under way
    open_calls: list[str | None] = []  # ids of the last calls, in order
    answered: set[int] = set()
    for idx, message in enumerate(messages):
        if isinstance(message, UserMessage | ToolResult):
            last = blocks[-1] if blocks else None
            if isinstance(last, UserMessage) and last.task is not None:
                raise ValueError(
                    f"chat: message {idx} follows a task ({last.task}) directly. Put the task's answer between."
                )
            if isinstance(message, ToolResult):
                place = _place(idx, message, open_calls, answered)
                answered.add(place)
                blocks.append(_Result(place, message.content))
            else:
                blocks.append(message)
            continue
        if blocks:
            turns.append(_user_turn(blocks))
            blocks = []
        if isinstance(message, AssistantMessage):
            if message.is_open and idx + 1 < len(messages):
                raise ValueError(f"chat: message {idx} is open but not the last. Only the last answer can be.")
            if message.tool_calls:
                open_calls, answered = [call.id for call in message.tool_calls], set()
        turns.append(message)
    return [*turns, _user_turn(blocks)] if blocks else turns


def _place(idx: int, result: ToolResult, open_calls: Sequence[str | None], answered: set[int]) -> int:
    """Return which call a result belongs to; one without an id belongs to the first that has none yet."""
    fits = [place for place, call_id in enumerate(open_calls) if result.call_id in (None, call_id)]
    place = next((place for place in fits if place not in answered), None)
    if place is None:
        why = "was answered before" if fits else "is not one of the last answer's calls"
        ids = ", ".join(str(call_id) for call_id in open_calls) or "there are none"
        raise ValueError(
            f"chat: message {idx} is a tool result for call {result.call_id!r:.100}, which {why} ({ids:.200}). "
            "Put each result after its call, once."
        )
    return place


def _user_turn(blocks: Sequence[UserMessage | _Result]) -> _UserTurn:
    results = iter(sorted((b for b in blocks if isinstance(b, _Result)), key=lambda result: result.place))
    texts = [
        block.content if isinstance(block, UserMessage) else f"<tool_result>{next(results).content}</tool_result>"
        for block in blocks
    ]
    last = blocks[-1]
    return _UserTurn(tuple(texts), last.task if isinstance(last, UserMessage) else None)


def _last_user(turns: Sequence[_Turn]) -> int:
    """Return the index of the last turn on the user's side, -1 if there is none."""
    return max((idx for idx, turn in enumerate(turns) if isinstance(turn, _UserTurn | DeveloperMessage)), default=-1)


# turns → pieces


def _effort_prefix(release: Release, thinking: bool, effort: str | None) -> str:
    tiers = EFFORT_PREFIXES[release]
    if effort is None:
        return ""
    if effort not in tiers:
        raise ValueError(
            f"chat: unknown effort {effort!r}; release {release.value} has {', '.join(tiers)} "
            f"(default {next(iter(tiers))})."
        )
    if not thinking:
        raise ValueError(f"chat: effort {effort!r} was given without thinking. Turn thinking on or leave effort out.")
    return tiers[effort]


def _render(turns: Sequence[_Turn], prefix: str, thinking: bool, drop: bool) -> Prompt:
    last = _last_user(turns)
    pieces: list[Piece] = [Control(protocol.BOS), prefix]
    reasons = False
    for idx, turn in enumerate(turns):
        follower = turns[idx + 1] if idx + 1 < len(turns) else None
        task = turn.task if isinstance(turn, _UserTurn) else None
        previous = turns[idx - 1] if idx else None
        keeps_reasoning = thinking and (not drop or idx > last)
        if isinstance(previous, _UserTurn) and previous.task is not None:
            keeps_reasoning = False  # the answer to a task has none
        pieces += _turn(turn, keeps_reasoning)
        if follower is not None and not isinstance(follower, AssistantMessage | LatestReminder):
            continue
        reasons = thinking and (not drop or idx >= last)
        start = Control(protocol.THINK_START if reasons else protocol.THINK_END)
        if task == "action":
            start = Control(protocol.THINK_START if thinking else protocol.THINK_END)
            pieces += [Control(protocol.ASSISTANT), start, Control(protocol.TASK_TOKENS[task])]
        elif task is not None:
            pieces.append(Control(protocol.TASK_TOKENS[task]))
        elif isinstance(turn, _UserTurn | DeveloperMessage) or isinstance(turn, SystemMessage) and follower is None:
            pieces += [Control(protocol.ASSISTANT), start]
        if task is not None or isinstance(turn, AssistantMessage):
            reasons = False  # a task's answer is bare; an answer given so far has its reasoning behind it
    return Prompt(tuple(_merged(pieces)), reasons)


def _turn(turn: _Turn, keeps_reasoning: bool) -> list[Piece]:
    if isinstance(turn, SystemMessage):
        return [turn.content, *_instructions(turn)]
    if isinstance(turn, DeveloperMessage):
        return [Control(protocol.USER), turn.content, *_instructions(turn)]
    if isinstance(turn, _UserTurn):
        return [Control(protocol.USER), "\n\n".join(turn.blocks)]
    if isinstance(turn, LatestReminder):
        return [Control(protocol.LATEST_REMINDER), turn.content]
    pieces: list[Piece] = [turn.reasoning, Control(protocol.THINK_END)] if keeps_reasoning else []
    pieces += [turn.content, *_calls(turn.tool_calls)]
    return pieces if turn.is_open else [*pieces, Control(protocol.EOS)]


def _instructions(message: SystemMessage | DeveloperMessage) -> Iterator[Piece]:
    if message.tools:
        before, after = protocol.TOOLS.split("{schemas}")
        yield "\n\n"
        yield from _with_controls(before)
        yield "\n".join(to_json(tool.function, f"tool {tool.name!r}") for tool in message.tools)
        yield from _with_controls(after)
    if message.response_format is not None:
        schema = to_json(message.response_format, "the response format")
        yield "\n\n" + protocol.RESPONSE_FORMAT.replace("{schema}", schema)


def _calls(calls: Sequence[ToolCall]) -> Iterator[Piece]:
    if not calls:
        return
    dsml = Control(protocol.DSML)
    yield from ("\n\n<", dsml, "tool_calls>\n")
    for call in calls:
        yield from ("<", dsml, f'invoke name="{call.name}">\n')
        for place, (key, value) in enumerate(call.parsed_arguments().items()):
            is_text = isinstance(value, str)
            yield from (
                "\n<" if place else "<",
                dsml,
                f'parameter name="{key}" string="{"true" if is_text else "false"}">',
            )
            yield value if is_text else to_json(value, f"argument {key!r} of the call to {call.name!r}")
            yield from ("</", dsml, "parameter>")
        yield from ("\n</", dsml, "invoke>\n")
    yield from ("</", dsml, "tool_calls>")


_CONTROLS = re.compile("|".join(map(re.escape, protocol.CONTROL_TOKENS)))


def _with_controls(text: str) -> Iterator[Piece]:
    """Yield one of our own texts with the control tokens in it as control tokens."""
    start = 0
    for found in _CONTROLS.finditer(text):
        yield text[start : found.start()]
        yield Control(found.group())
        start = found.end()
    yield text[start:]


def _merged(pieces: Iterator[Piece] | Sequence[Piece]) -> list[Piece]:
    """Return the pieces with neighbouring texts joined and empty ones left out: tokens may span them."""
    merged: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and merged and isinstance(merged[-1], str):
            merged[-1] += piece
        elif piece != "":
            merged.append(piece)
    return merged
