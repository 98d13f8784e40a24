# SPDX-License-Identifier: Apache-2.0
"""Malformed answers, read by us and by vLLM 0.33's parser. Skipped where vllm is not installed.

Run as a script it prints the table of docs/chat.md. vLLM's parser is given the text, as its server gives it.
"""

from __future__ import annotations

import json
import pathlib
import types
from typing import Any

import pytest

from megamoe.models.deepseek_v4.chat import (
    AnswerParser,
    ContentDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)

PATH = pathlib.Path(__file__).parents[3] / "vectors" / "answers.json"
VECTORS = [
    one
    for one in json.loads(PATH.read_text(encoding="utf-8"))
    if not one["thinking"] and (set(one["faults"]) - {"stray_control"} or one["slips"])
]
Read = tuple[list[tuple[str, Any]], str]  # complete calls with their arguments, and the content


class Vocabulary:
    """A tokenizer that has no tokens: vLLM's parser then looks at the text alone."""

    def get_vocab(self) -> dict[str, int]:
        return {}

    def encode(self, text: str, **_: Any) -> list[int]:
        return []

    def decode(self, ids: Any, **_: Any) -> str:
        return ""

    all_special_tokens: tuple[str, ...] = ()
    all_special_ids: tuple[int, ...] = ()


def ours(raw: str) -> Read:
    parser = AnswerParser(thinking=False)
    names, arguments, ended, content = [], [], set(), ""
    for event in parser.spelled(raw) + parser.finish():
        match event:
            case ToolCallStart():
                names.append(event.name)
                arguments.append("")
            case ToolCallArguments():
                arguments[event.call_idx] += event.text
            case ToolCallEnd():
                ended.add(event.call_idx)
            case ContentDelta():
                content += event.text
    return [(names[idx], json.loads(arguments[idx])) for idx in sorted(ended)], content


def theirs(raw: str) -> Read:
    from vllm.parser.deepseek_v4 import DeepSeekV4Parser

    parser = DeepSeekV4Parser(Vocabulary(), None, chat_template_kwargs={"thinking": False})
    request = types.SimpleNamespace(tools=[{}], tool_choice="auto", messages=[], skip_special_tokens=False)
    found = parser.extract_tool_calls_from_content(raw, request)
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in found.tool_calls]
    return calls, found.content or ""


# Where the two differ: vLLM gives out a value that is no JSON as text, and ends what was cut off, so that a call can be
# executed that the model never completed; we give no call out as complete, and read True as true.
DIFFERENT = {
    "a parameter that is not closed",
    "a value that is no JSON",
    "a value that stops being JSON",
    "a control token in a call's name",
    "a control token in a parameter's name",
    "cut off inside a value",
    "a parameter with another attribute",
    "True for true",
    "True in a list",
    "a number with a leading zero",
    "a bare word",
    "a broken call before a complete one",
    "a broken call after a complete one",
    "a call without its end before another",
    "a tag without the control token",
    "cut off in the second call",
    "cut off after the name",
    "cut off in an untyped value",
    "a name that does not end",
}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda one: one["name"])
def test_calls_are_the_same_unless_listed(vector: dict[str, Any]) -> None:
    pytest.importorskip("vllm.parser.deepseek_v4", reason="vllm is not installed")
    is_equal = ours(vector["raw"])[0] == theirs(vector["raw"])[0]
    assert is_equal != (vector["name"] in DIFFERENT)


def main() -> None:
    def shown(calls: list[tuple[str, Any]]) -> str:
        texts = (f"{name}({json.dumps(one, ensure_ascii=False)})".replace("\n", "⏎") for name, one in calls)
        return ", ".join(f"`{text}`" for text in texts) or "none"

    print("| answer | ours | told as | vLLM 0.33.0 | its content has markup |\n| --- | --- | --- | --- | --- |")
    for vector in VECTORS:
        mine, other = ours(vector["raw"]), theirs(vector["raw"])
        told = ", ".join(f"`{name}`" for name in dict.fromkeys([*vector["faults"], *vector["slips"]]))
        what = "the same" if mine[0] == other[0] else shown(other[0])
        print(f"| {vector['name']} | {shown(mine[0])} | {told} | {what} | {'yes' if 'DSML' in other[1] else ''} |")


if __name__ == "__main__":
    main()
