# SPDX-License-Identifier: Apache-2.0
"""A conversation as typed messages, and the way there from the shape of OpenAI's API.

Each class checks its own fields when it is made; what depends on the messages around it (does a tool result answer a
call?) is checked by the encoder.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from megamoe.models.deepseek_v4.chat.json_prefix import closed
from megamoe.models.deepseek_v4.chat.protocol import TASKS, Task

# DSML has no escapes: a name is what stands between quotes, so it cannot hold a quote, a bracket or a line break.
TOOL_NAME = re.compile(r'[^"<>\x00-\x1f]+')
# The end of a parameter's name in DSML; a key that holds it would be read back as a shorter one.
_END_OF_KEY = re.compile(r'" string="(true|false)">')


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function the model may call.

    Attributes:
        function: JSON object with at least "name"; usually "description" and "parameters" (a JSON schema). It is
            shown to the model as it is, keys in this order.
    """

    function: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Refuse what cannot be shown or called.

        Raises:
            ValueError: no usable name, or not JSON.
        """
        if not isinstance(self.function, Mapping):
            _refuse("a tool", self.function, "an object with a name")
        _check_tool_name(self.function.get("name"))
        to_json(self.function, f"tool {self.name!r}")

    @property
    def name(self) -> str:
        """What calls name it by."""
        return str(self.function["name"])

    @property
    def text_parameters(self) -> frozenset[str]:
        """The parameters that its schema says are text."""
        parameters = self.function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        if not isinstance(properties, Mapping):
            return frozenset()
        return frozenset(
            name for name, one in properties.items() if isinstance(one, Mapping) and one.get("type") == "string"
        )


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call the model made.

    Attributes:
        name: the tool's name.
        arguments: a JSON object as text.
        id: what the result refers to; None when there is no result.
    """

    name: str
    arguments: str
    id: str | None = None

    def __post_init__(self) -> None:
        """Refuse what DSML cannot express.

        Raises:
            ValueError: an unusable name, or arguments that are no JSON object.
        """
        _check_tool_name(self.name)
        self.parsed_arguments()

    def parsed_arguments(self) -> dict[str, Any]:
        """Return the arguments as an object."""
        try:
            parsed = json.loads(self.arguments, parse_constant=_refuse_constant)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"chat: the arguments of the call to {self.name!r} are not JSON ({error}); got "
                f"{self.arguments!r:.200}. Pass a JSON object as text, as the model's answer gave it."
            ) from error
        if not isinstance(parsed, dict):
            _refuse(f"the arguments of the call to {self.name!r}", self.arguments, "a JSON object as text")
        for key in parsed:
            if _END_OF_KEY.search(key):
                _refuse(f"an argument name of the call to {self.name!r}", key, 'a name without \'" string="true">\'')
        return parsed


@dataclasses.dataclass(frozen=True)
class SystemMessage:
    """Instructions. `tools` and `response_format` (a JSON schema) are shown after the text."""

    content: str = ""
    tools: tuple[Tool, ...] = ()
    response_format: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a field of the wrong kind."""
        _check_instructions("system", self.content, self.tools, self.response_format)


@dataclasses.dataclass(frozen=True)
class DeveloperMessage:
    """Instructions on the user's side of the conversation, as DeepSeek's search agents are given them.

    Not the "developer" of OpenAI's API, which means system. The text must not be empty. With thinking on and no tools
    anywhere, developer messages before the last user turn are left out of the prompt, as the released encoder does.
    """

    content: str
    tools: tuple[Tool, ...] = ()
    response_format: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a field of the wrong kind."""
        _check_instructions("developer", self.content, self.tools, self.response_format)
        if not self.content:
            _refuse("a developer message's content", self.content, "text that is not empty")


@dataclasses.dataclass(frozen=True)
class UserMessage:
    """What the user says. `task` asks for one of the model's quick instructions instead of an answer."""

    content: str
    task: Task | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a field of the wrong kind."""
        _check_text("user", self.content)
        if self.task is not None and self.task not in TASKS:
            _refuse("a user message's task", self.task, ", ".join(TASKS))


@dataclasses.dataclass(frozen=True)
class AssistantMessage:
    """An answer: reasoning, then content, then calls.

    Attributes:
        content: what the user saw.
        reasoning: what came before `</think>`; dropped from earlier turns unless there are tools.
        tool_calls: in the order they were made; ids differ.
        is_open: the last message only: not ended, the model continues after `content`.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    is_open: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for a field of the wrong kind, or ids that repeat."""
        _check_text("assistant", self.content)
        _check_text("assistant", self.reasoning, "reasoning")
        _check_all("an assistant message's tool_calls", self.tool_calls, ToolCall)
        ids = [call.id for call in self.tool_calls if call.id is not None]
        repeated = sorted({one for one in ids if ids.count(one) > 1})
        if repeated:
            _refuse("ids of one message's tool calls", ", ".join(repeated), "a different id for every call")
        if self.is_open and self.tool_calls:
            _refuse("an open assistant message's tool_calls", len(self.tool_calls), "none: calls end an answer")


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """What a tool returned, as text.

    Attributes:
        call_id: the id of the call it answers; None for the first of the last answer's calls without a result.
        content: the text.
    """

    call_id: str | None
    content: str

    def __post_init__(self) -> None:
        """Raise ValueError for a field of the wrong kind."""
        if self.call_id is not None and (not isinstance(self.call_id, str) or not self.call_id):
            _refuse("a tool result's call id", self.call_id, "the id of the call it answers")
        _check_text("tool", self.content)


@dataclasses.dataclass(frozen=True)
class LatestReminder:
    """Circumstances of the conversation (date, place, app), placed before the user turn they belong to."""

    content: str

    def __post_init__(self) -> None:
        """Raise ValueError for a field of the wrong kind."""
        _check_text("latest_reminder", self.content)


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolResult | LatestReminder


def to_json(value: Any, what: str) -> str:
    """Return a value as the protocol writes JSON: one line, `, ` and `: `, characters unescaped.

    Raises:
        ValueError: not JSON (NaN, another type, nested too deeply); `what` names it.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_as_dict)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"chat: {what} is not JSON ({error}). Pass only what JSON can hold.") from error


def read_tools(tools: Sequence[Mapping[str, Any]]) -> tuple[Tool, ...]:
    """Return the tools of an OpenAI request (`[{"type": "function", "function": {…}}, …]`).

    Raises:
        ValueError: another type, no function, no usable name, or two tools of one name.
    """
    read = []
    for idx, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or tool.get("type", "function") != "function" or "function" not in tool:
            _refuse(f"tools[{idx}]", tool, 'an object {"type": "function", "function": {"name": …}}')
        read.append(Tool(tool["function"]))
    check_tool_names(read)
    return tuple(read)


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return the messages of an OpenAI request, extended by what DeepSeek-V4 adds.

    Roles: system, developer (V4's, see DeveloperMessage), user (may have "task"), assistant (may have
    "reasoning_content", "tool_calls", and "prefix": true for an open one), tool, latest_reminder. Content is text, or
    a list of `{"type": "text", "text": …}` parts whose texts are joined by blank lines; null counts as empty for an
    assistant. Arguments of earlier calls may be absent or empty, and JSON that was cut off is closed where it ends.
    System and developer messages may have "tools" and "response_format". Other keys are refused.

    Raises:
        ValueError: naming the message and what is wrong with it.
    """
    read: list[Message] = []
    for idx, message in enumerate(messages):
        if not isinstance(message, Mapping):
            _refuse(f"messages[{idx}]", message, "an object with role and content")
        try:
            read.append(_read_message(message))
        except ValueError as error:
            raise ValueError(f"messages[{idx}]: {error}") from error
    return read


_KEYS = {
    "system": {"content", "tools", "response_format", "name"},
    "developer": {"content", "tools", "response_format", "name"},
    "user": {"content", "task", "name"},
    "assistant": {
        *("content", "reasoning_content", "tool_calls", "prefix", "name", "refusal", "audio", "function_call"),
        *("annotations", "parsed", "malformed_calls"),  # of answers, and nothing the prompt shows
    },
    "tool": {"content", "tool_call_id", "name"},
    "latest_reminder": {"content"},
}
_MUST_BE_EMPTY = ("refusal", "audio", "function_call")  # the official client sends them back, as null


def _read_message(message: Mapping[str, Any]) -> Message:
    role = message.get("role")
    if not isinstance(role, str) or role not in _KEYS:
        _refuse("the role", role, ", ".join(_KEYS))
    unknown = sorted(set(message) - _KEYS[role] - {"role"})
    unknown += [key for key in _MUST_BE_EMPTY if message.get(key)]
    if unknown:
        _refuse(f"a message of role {role!r}", f"with {', '.join(map(str, unknown))}", ", ".join(sorted(_KEYS[role])))
    content = _read_content(message.get("content"), role)
    if role == "user":
        return UserMessage(content, message.get("task"))
    if role == "assistant":
        return AssistantMessage(
            content,
            message.get("reasoning_content") or "",
            tuple(_read_call(call) for call in message.get("tool_calls") or ()),
            bool(message.get("prefix", False)),
        )
    if role == "tool":
        return ToolResult(message.get("tool_call_id"), content)
    if role == "latest_reminder":
        return LatestReminder(content)
    kind = SystemMessage if role == "system" else DeveloperMessage
    return kind(content, read_tools(message.get("tools") or ()), message.get("response_format"))


def _read_content(content: Any, role: str) -> str:
    if content is None and role == "assistant":
        return ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                _refuse("a part of the content", part, '{"type": "text", "text": …}; images are not supported')
        return "\n\n".join(part["text"] for part in content)
    _check_text(role, content)
    return str(content)


def _read_call(call: Any) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        _refuse("a tool call", call, '{"id": …, "type": "function", "function": {"name": …, "arguments": …}}')
    return ToolCall(function.get("name", ""), _read_arguments(function.get("arguments")), call.get("id"))


def _read_arguments(arguments: Any) -> Any:
    """Return the arguments of an earlier call as clients send them back: none at all, or cut off with their answer.

    What has no JSON in it is returned as it is, to be refused by name.
    """
    if arguments is None or isinstance(arguments, str) and not arguments.strip():
        return "{}"
    if not isinstance(arguments, str) or not arguments.lstrip().startswith("{"):
        return arguments
    try:
        json.loads(arguments, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return closed(arguments)
    return arguments


def check_tool_names(tools: Iterable[Tool]) -> None:
    """Refuse two tools of one name.

    Raises:
        ValueError: naming them.
    """
    names = [tool.name for tool in tools]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        _refuse("tools", f"several called {', '.join(repeated)}", "a different name for every tool")


def _check_instructions(
    role: str, content: str, tools: tuple[Tool, ...], response_format: Mapping[str, Any] | None
) -> None:
    _check_text(role, content)
    _check_all(f"a {role} message's tools", tools, Tool)
    check_tool_names(tools)
    if response_format is not None:
        if not isinstance(response_format, Mapping):
            _refuse("a response format", response_format, "a JSON schema (an object)")
        to_json(response_format, "the response format")


def _check_text(role: str, text: Any, what: str = "content") -> None:
    if not isinstance(text, str):
        _refuse(f"the {what} of a message of role {role!r}", text, "text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"chat: the {what} of a message of role {role!r} is not valid Unicode: {error.reason} at character "
            f"{error.start}. Pass text that was decoded from valid UTF-8."
        ) from error


def _check_all(what: str, values: Any, kind: type) -> None:
    if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
        _refuse(what, values, f"a tuple of {kind.__name__}")


def _check_tool_name(name: Any) -> None:
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        _refuse("a tool's name", name, "text that is not empty, without quotes, angle brackets and control characters")


def _as_dict(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse(what: str, got: Any, allowed: str) -> NoReturn:
    raise ValueError(f"chat: {what} must be {allowed}; got {got!r:.200}.")
