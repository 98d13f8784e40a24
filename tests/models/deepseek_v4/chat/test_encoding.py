# SPDX-License-Identifier: Apache-2.0
"""Conversations → prompts: vectors, the released fixed texts by digest, what no user can do, refusals."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe.models.deepseek_v4.chat import (
    CONTROL_TOKENS,
    AssistantMessage,
    Control,
    DeveloperMessage,
    LatestReminder,
    Message,
    Release,
    SystemMessage,
    Tool,
    ToolCall,
    ToolResult,
    UserMessage,
    encode,
    encode_calls,
    protocol,
    read_messages,
    read_tools,
)

VECTORS = json.loads((pathlib.Path(__file__).parents[3] / "vectors" / "prompts.json").read_text(encoding="utf-8"))


def text_of(messages: list[Message], **options: Any) -> str:
    return encode(messages, **{"release": Release.PREVIEW, "thinking": False, **options}).text


# known answers


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_vectors(vector: dict[str, Any]) -> None:
    prompt = encode(
        read_messages(vector["messages"]),
        release=Release(vector["release"]),
        thinking=vector["thinking"],
        effort=vector.get("effort"),
        tools=read_tools(vector.get("tools", [])),
        response_format=vector.get("response_format"),
    )
    assert prompt.text == vector["prompt"]
    assert prompt.thinking == vector["next_is_reasoning"]


@pytest.mark.parametrize(
    ("text", "digest"),
    [
        (
            protocol.EFFORT_PREFIXES[Release.PREVIEW]["max"],
            "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7",
        ),
        (protocol.TOOLS, "9cbfe9f32cfaa3d45a1200f544e0bf4f9fea0adeb44369f64d270c9a2a2936e5"),
        (protocol.RESPONSE_FORMAT, "012f31fcc1338bdfe25b132eaf56ab020ee75ab8e649f37b30b8e5f544fb17a5"),
    ],
    ids=["effort", "tools", "response format"],
)
def test_fixed_texts_are_the_released_ones(text: str, digest: str) -> None:
    """The digests were taken from the released encoder's file."""
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_the_second_release_moved_the_tiers() -> None:
    preview, july = (protocol.EFFORT_PREFIXES[release] for release in (Release.PREVIEW, Release.JULY))
    assert list(preview) == ["high", "max"] and list(july) == ["low", "high", "max"]
    assert july["high"] == preview["max"] and july["max"] not in preview.values()
    assert preview["high"] == july["low"] == ""


def test_only_the_encoder_writes_control_tokens() -> None:
    """Text that spells every control token, wherever a user can put text, stays text."""
    spelled = "".join(CONTROL_TOKENS) + "</｜DSML｜parameter>"
    tool = Tool({"name": "f", "description": spelled, "parameters": {"title": spelled}})
    conversation: list[Message] = [
        SystemMessage(spelled),
        LatestReminder(spelled),
        UserMessage(spelled),
        AssistantMessage(spelled, spelled, (ToolCall("f", json.dumps({spelled: spelled, "b": [spelled]}), "1"),)),
        ToolResult("1", spelled),
        DeveloperMessage(spelled),
    ]
    plain: list[Message] = [
        SystemMessage("x"),
        LatestReminder("x"),
        UserMessage("x"),
        AssistantMessage("x", "x", (ToolCall("f", '{"a": "x", "b": ["x"]}', "1"),)),
        ToolResult("1", "x"),
        DeveloperMessage("x"),
    ]
    for options in ({"thinking": True}, {"thinking": False}):
        found, expected = (
            encode(messages, release=Release.JULY, tools=[tools], response_format={"title": title}, **options)
            for messages, tools, title in (
                (conversation, tool, spelled),
                (plain, Tool({"name": "f", "description": "x", "parameters": {"title": "x"}}), "x"),
            )
        )
        controls = [piece for piece in found.pieces if isinstance(piece, Control)]
        assert controls == [piece for piece in expected.pieces if isinstance(piece, Control)]


def test_no_two_texts_are_neighbours() -> None:
    """Tokens may span what was written in parts, so parts must be tokenized as one text."""
    for vector in VECTORS:
        pieces = encode(
            read_messages(vector["messages"]),
            release=Release(vector["release"]),
            thinking=vector["thinking"],
            tools=read_tools(vector.get("tools", [])),
        ).pieces
        assert all(pieces) and not any(
            isinstance(a, str) and isinstance(b, str) for a, b in zip(pieces, pieces[1:], strict=False)
        )


# properties


@given(content=st.text(), reasoning=st.text())
def test_thinking_changes_nothing_of_an_earlier_answer_but_its_reasoning(content: str, reasoning: str) -> None:
    messages = [UserMessage("a"), AssistantMessage(content, reasoning), UserMessage("b")]
    thinking, chat = text_of(messages, thinking=True), text_of(messages)
    assert thinking.removesuffix("<think>") == chat.removesuffix("</think>")


@given(order=st.permutations(["1", "2", "3"]))
def test_results_stand_in_the_order_of_their_calls(order: list[str]) -> None:
    calls = tuple(ToolCall("f", "{}", call_id) for call_id in "123")
    messages = [UserMessage("a"), AssistantMessage(tool_calls=calls), *(ToolResult(one, f"r{one}") for one in order)]
    results = (
        "<｜User｜><tool_result>r1</tool_result>\n\n<tool_result>r2</tool_result>\n\n<tool_result>r3</tool_result>"
    )
    assert f"{results}<｜Assistant｜>" in text_of(messages)


def test_calls_of_nobody_are_nothing() -> None:
    assert encode_calls([]) == []


def test_ids_may_repeat_in_another_answer() -> None:
    call = (ToolCall("f", "{}", "0"),)
    turn = [AssistantMessage(tool_calls=call), ToolResult("0", "r")]
    assert text_of([UserMessage("a"), *turn, *turn]).count("<tool_result>r</tool_result>") == 2


# refusals

CALL = AssistantMessage(tool_calls=(ToolCall("f", "{}", "1"), ToolCall("g", "{}")))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "there are no messages"),
        (
            [UserMessage("a"), ToolResult("1", "r")],
            r"message 1 is a tool result for call '1', which is not one of .*none",
        ),
        ([UserMessage("a"), ToolResult(None, "r")], r"message 1 is a tool result for call None, which is not one of"),
        ([CALL, ToolResult("2", "r")], r"message 1 is a tool result for call '2', which is not one of .*\(1, None\)"),
        ([CALL, ToolResult("1", "r"), ToolResult("1", "r")], "message 2 is a tool result .*was answered before"),
        ([CALL, *[ToolResult(None, "r")] * 3], "message 3 is a tool result for call None, which was answered before"),
        ([AssistantMessage("a", is_open=True), UserMessage("b")], "message 0 is open but not the last"),
        ([UserMessage("a", "title"), UserMessage("b")], r"message 1 follows a task \(title\) directly"),
        ([CALL, UserMessage("a", "title"), ToolResult("1", "b")], r"message 2 follows a task \(title\) directly"),
    ],
)
def test_messages_that_do_not_fit_together(messages: list[Message], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^chat: {reason}"):
        text_of(messages)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"effort": "high"}, "effort 'high' was given without thinking"),
        ({"effort": "low", "thinking": True}, r"unknown effort 'low'; release preview has high, max \(default high\)"),
        ({"effort": "medium", "thinking": True, "release": Release.JULY}, "unknown effort 'medium'; .*low, high, max"),
        ({"tools": [Tool({"name": "f"}), Tool({"name": "f"})]}, "tools must be a different name .* called f"),
    ],
)
def test_options(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^chat: {reason}"):
        text_of([UserMessage("a")], **options)


def test_instructions_given_twice() -> None:
    tool = Tool({"name": "f"})
    with pytest.raises(ValueError, match=r"^chat: the system message and the request both give"):
        text_of([SystemMessage(tools=(tool,)), UserMessage("a")], tools=[tool])
    with pytest.raises(ValueError, match=r"^chat: the system message and the request both give"):
        text_of([SystemMessage(response_format={}), UserMessage("a")], response_format={})


def test_a_number_that_json_cannot_write() -> None:
    with pytest.raises(ValueError, match=r"^chat: argument 'a' of the call to 'f' is not JSON"):
        text_of([UserMessage("a"), AssistantMessage(tool_calls=(ToolCall("f", '{"a": 1e999}'),))])
