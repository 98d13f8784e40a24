# SPDX-License-Identifier: Apache-2.0
"""Typed messages and how OpenAI's shape becomes them."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest

from megamoe.models.deepseek_v4.chat import (
    AssistantMessage,
    DeveloperMessage,
    LatestReminder,
    SystemMessage,
    Tool,
    ToolCall,
    ToolResult,
    UserMessage,
    read_messages,
    read_tools,
)

FUNCTION = {"name": "f", "parameters": {"type": "object"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


# known answers


def test_every_role() -> None:
    read = read_messages(
        [
            {"role": "system", "content": "s", "tools": [{"type": "function", "function": FUNCTION}]},
            {"role": "developer", "content": "d", "response_format": {"type": "object"}},
            {"role": "latest_reminder", "content": "r"},
            {"role": "user", "content": "u", "task": "title", "name": "anna"},
            {"role": "assistant", "content": None, "reasoning_content": "why", "tool_calls": [CALL]},
            {
                "role": "tool",
                "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}],
                "tool_call_id": "1",
            },
            {"role": "tool", "content": "z"},
            {"role": "assistant", "content": "so", "prefix": True},
        ]
    )
    assert read == [
        SystemMessage("s", (Tool(FUNCTION),)),
        DeveloperMessage("d", (), {"type": "object"}),
        LatestReminder("r"),
        UserMessage("u", "title"),
        AssistantMessage("", "why", (ToolCall("f", '{"a": 1}', "1"),)),
        ToolResult("1", "x\n\ny"),
        ToolResult(None, "z"),
        AssistantMessage("so", is_open=True),
    ]


def test_what_the_official_client_sends_back() -> None:
    answer = {
        "role": "assistant",
        "content": "a",
        "refusal": None,
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    assert read_messages([answer]) == [AssistantMessage("a")]


def test_any_mapping_is_a_schema() -> None:
    function = collections.OrderedDict(name="f", parameters=collections.ChainMap({"type": "object"}))
    assert read_tools([{"function": function}])[0].name == "f"


# refusals


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "wizard", "content": "a"}, "the role must be system, developer, .*; got 'wizard'"),
        ({"content": "a"}, "the role must be .*; got None"),
        ({"role": ["user"], "content": "a"}, "the role must be"),
        ("hello", "must be an object with role and content; got 'hello'"),
        ({"role": "user"}, "the content of a message of role 'user' must be text; got None"),
        (
            {"role": "tool", "content": None, "tool_call_id": "1"},
            "the content of a message of role 'tool' must be text",
        ),
        ({"role": "user", "content": 3}, "the content of a message of role 'user' must be text; got 3"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            "a part of the content must be .*images are not supported",
        ),
        ({"role": "user", "content": ["a"]}, "a part of the content must be"),
        ({"role": "user", "content": "a\ud800"}, "is not valid Unicode: surrogates not allowed at character 1"),
        ({"role": "user", "content": "a", "task": "sing"}, "a user message's task must be action, .*; got 'sing'"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "a message of role 'user' must be .*tool_calls"),
        ({"role": "assistant", "content": "a", "function_call": {"name": "f"}}, "must be .* got 'with function_call'"),
        ({"role": "assistant", "content": "a", "tool_calls": [3]}, "a tool call must be .*; got 3"),
        ({"role": "assistant", "tool_calls": [CALL, CALL]}, "ids of one message's tool calls must be .*; got '1'"),
        (
            {"role": "assistant", "tool_calls": [CALL], "prefix": True},
            "an open assistant message's tool_calls must be none",
        ),
        (
            {"role": "assistant", "content": "a", "reasoning_content": 3},
            "the reasoning of a message of role 'assistant'",
        ),
        ({"role": "tool", "content": "a", "tool_call_id": ""}, "a tool result's call id must be"),
        ({"role": "tool", "content": "a", "tool_call_id": 3}, "a tool result's call id must be"),
        ({"role": "developer", "content": ""}, "a developer message's content must be text that is not empty"),
        ({"role": "system", "content": "s", "tools": [{"type": "web"}]}, r"tools\[0\] must be an object"),
        ({"role": "system", "content": "s", "response_format": "json"}, "a response format must be a JSON schema"),
        ({"role": "system", "content": "s", "response_format": {"a": {1}}}, "the response format is not JSON"),
    ],
)
def test_a_bad_message_is_named(message: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"messages\[1\]:? .*{reason}"):
        read_messages([{"role": "user", "content": "fine"}, message])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("", "are not JSON"),
        ("{", "are not JSON"),
        ("[1]", "must be a JSON object as text"),
        ('"a"', "must be a JSON object as text"),
        ('{"a": NaN}', "are not JSON .NaN is not JSON"),
        ("[" * 100_000, "are not JSON"),
        ({"a": 1}, "are not JSON"),
        (None, "are not JSON"),
        ('{"a\\" string=\\"true\\">b": 1}', "an argument name of the call to 'f' must be"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_arguments(arguments: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^chat: .*{reason}"):
        ToolCall("f", arguments)


@pytest.mark.parametrize("name", ["", 'a"b', "a\nb", "a>b", "<", None, 3])
def test_bad_tool_names(name: Any) -> None:
    with pytest.raises(ValueError, match=r"^chat: a tool's name must be text"):
        ToolCall(name, "{}")
    with pytest.raises(ValueError, match=r"^chat: a tool's name must be text"):
        Tool({"name": name})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: read_tools([{"type": "function"}]), r"tools\[0\] must be"),
        (lambda: read_tools(["f"]), r"tools\[0\] must be"),  # type: ignore[list-item]
        (lambda: read_tools([{"function": "f"}]), "a tool must be an object with a name"),
        (lambda: read_tools([{"function": {"name": "f", "x": float("nan")}}]), "tool 'f' is not JSON"),
        (lambda: read_tools([{"function": FUNCTION}] * 2), "tools must be a different name for every tool"),
        (lambda: SystemMessage("s", [Tool(FUNCTION)]), "a system message's tools must be a tuple of Tool"),  # type: ignore[arg-type]
        (
            lambda: AssistantMessage("a", tool_calls=(3,)),
            "an assistant message's tool_calls must be a tuple of ToolCall",
        ),  # type: ignore[arg-type]
    ],
)
def test_bad_parts(make: Callable[[], object], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^chat: {reason}"):
        make()
