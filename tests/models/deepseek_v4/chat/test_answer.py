# SPDX-License-Identifier: Apache-2.0
"""Answers → events: vectors at every split, round trips, and that no markup gets out whatever the model writes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe.models.deepseek_v4.chat import (
    CONTROL_TOKENS,
    AnswerParser,
    ContentDelta,
    Control,
    Event,
    Fault,
    Malformed,
    Mended,
    Piece,
    ReasoningDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    encode_calls,
)
from megamoe.models.deepseek_v4.chat.answer import MAX_TAG
from megamoe.models.deepseek_v4.chat.json_prefix import JsonPrefix

VECTORS = json.loads((pathlib.Path(__file__).parents[3] / "vectors" / "answers.json").read_text(encoding="utf-8"))
CONTROLS = re.compile("(" + "|".join(map(re.escape, CONTROL_TOKENS)) + ")")


@dataclasses.dataclass
class Answer:
    """What the events of one answer add up to, checked on the way."""

    reasoning: str = ""
    content: str = ""
    names: list[str] = dataclasses.field(default_factory=list)
    arguments: list[str] = dataclasses.field(default_factory=list)
    is_ended: list[bool] = dataclasses.field(default_factory=list)
    faults: list[Malformed] = dataclasses.field(default_factory=list)
    slips: list[Mended] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, events: Iterable[Event]) -> Answer:
        answer = cls()
        for event in events:
            answer.add(event)
        return answer

    def add(self, event: Event) -> None:
        match event:
            case ReasoningDelta(text):
                assert text and not self.content and not self.names
                self.reasoning += text
            case ContentDelta(text):
                assert text
                self.content += text
            case ToolCallStart(call_idx, name):
                assert call_idx == len(self.names) and (not call_idx or self.is_ended[-1] or self.faults)
                self.names.append(name)
                self.arguments.append("")
                self.is_ended.append(False)
            case ToolCallArguments(call_idx, text):
                assert text and call_idx == len(self.names) - 1 and not self.is_ended[-1]
                self.arguments[-1] += text
                prefix = JsonPrefix()
                assert prefix.accept(self.arguments[-1]) == len(self.arguments[-1])
            case ToolCallEnd(call_idx):
                assert call_idx == len(self.names) - 1 and not self.is_ended[-1]
                self.is_ended[-1] = True
                assert isinstance(json.loads(self.arguments[-1]), dict)
            case Malformed():
                self.faults.append(event)
            case Mended():
                self.slips.append(event)


def read_spelled(pieces: Iterable[str], thinking: bool) -> tuple[Answer, str]:
    parser = AnswerParser(thinking=thinking)
    events = [event for piece in pieces for event in parser.spelled(piece)] + parser.finish()
    return Answer.of(events), parser.withheld


def read_pieces(pieces: Iterable[Piece], thinking: bool) -> tuple[Answer, str]:
    parser = AnswerParser(thinking=thinking)
    events: list[Event] = []
    for piece in pieces:
        events += parser.text(piece) if isinstance(piece, str) else parser.control(piece.token)
    return Answer.of(events + parser.finish()), parser.withheld


def pieces_of(raw: str) -> list[Piece]:
    """Return a raw answer with its control tokens as control tokens."""
    return [Control(part) if part in CONTROL_TOKENS else part for part in CONTROLS.split(raw) if part]


def by_character(pieces: Iterable[Piece]) -> list[Piece]:
    return [one for piece in pieces for one in (piece if isinstance(piece, str) else [piece])]


# known answers


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_vectors(vector: dict[str, Any]) -> None:
    answer, withheld = read_spelled([vector["raw"]], vector["thinking"])
    assert (answer.reasoning, answer.content) == (vector["reasoning"], vector["content"])
    assert [{"name": n, "arguments": a} for n, a in zip(answer.names, answer.arguments, strict=True)] == vector["calls"]
    assert [fault.fault.value for fault in answer.faults] == vector["faults"]
    assert [fault.text for fault in answer.faults] == vector["malformed"]
    assert [slip.slip.value for slip in answer.slips] == vector["slips"]
    assert withheld == vector["withheld"]
    broken = {fault.call_idx for fault in answer.faults} - {None}
    assert broken == {idx for idx, is_ended in enumerate(answer.is_ended) if not is_ended}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_every_split_of_every_vector(vector: dict[str, Any]) -> None:
    """Cut anywhere, cut everywhere, with control tokens spelled out or as tokens: always the same."""
    raw, thinking = vector["raw"], vector["thinking"]
    expected = read_spelled([raw], thinking)
    for cut in range(len(raw) + 1):
        assert read_spelled([raw[:cut], raw[cut:]], thinking) == expected
    assert read_spelled(raw, thinking) == expected
    assert read_pieces(pieces_of(raw), thinking) == expected
    assert read_pieces(by_character(pieces_of(raw)), thinking) == expected


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_every_beginning_of_every_vector(vector: dict[str, Any]) -> None:
    """An answer cut off anywhere: what was sent is a beginning of what the whole would have sent, and no markup."""
    whole, _ = read_spelled([vector["raw"]], vector["thinking"])
    pieces = by_character(pieces_of(vector["raw"]))
    for end in range(len(pieces)):
        answer, _ = read_pieces(pieces[:end], vector["thinking"])
        assert not CONTROLS.search(answer.reasoning + answer.content)
        assert whole.reasoning.startswith(answer.reasoning.removesuffix("<").removesuffix("</").rstrip("\n"))
        assert whole.content.startswith(answer.content.removesuffix("<").removesuffix("</").rstrip("\n"))
        assert whole.names[: len(answer.names)] == answer.names
        assert all(a.startswith(b) for a, b in zip(whole.arguments, answer.arguments, strict=False))
        if not all(answer.is_ended):
            assert any(fault.fault.loses_call for fault in answer.faults), "a call that did not end must be reported"


def test_text_goes_out_at_once() -> None:
    parser = AnswerParser(thinking=True)
    assert parser.text("Let") == [ReasoningDelta("Let")]
    assert parser.in_reasoning
    assert parser.control("</think>") == []
    assert not parser.in_reasoning
    assert parser.text("a <b") == [ContentDelta("a <b")]
    assert parser.text("\n\n<") == []
    assert parser.text("p") == [ContentDelta("\n\n<p")]
    assert parser.text("\n\n\n") == [ContentDelta("\n")]  # only two line breaks can belong to a tag
    assert parser.text("<") == []
    assert parser.control("｜DSML｜") == []
    assert parser.text("tool_calls>\n") == []
    assert parser.text("<") + parser.control("｜DSML｜") + parser.text('invoke name="f"') == []
    assert parser.text(">\n") == [ToolCallStart(0, "f")]
    assert parser.text("<") + parser.control("｜DSML｜") + parser.text('parameter name="p" string="true') == []
    assert parser.text('">') == [ToolCallArguments(0, '{"p": "')]
    assert parser.text('a"\n') == [ToolCallArguments(0, 'a\\"\\n')]
    assert parser.text("</") + parser.control("｜DSML｜") + parser.text("parameter") == []
    assert parser.text(">") == [ToolCallArguments(0, '"')]
    assert parser.text("\n</") + parser.control("｜DSML｜") + parser.text("invoke>") == [
        ToolCallArguments(0, "}"),
        ToolCallEnd(0),
    ]
    assert parser.num_calls == 1


def test_markup_in_ordinary_characters_is_text() -> None:
    """A model that repeats what a user wrote calls no tool; an argument may hold any text whatsoever."""
    spelled = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls></think>'
    answer, withheld = read_pieces([spelled], thinking=False)
    assert (answer.content, answer.names, answer.faults, withheld) == (spelled, [], [], "")
    call = ToolCall("f", json.dumps({"p": spelled, "q": [spelled]}))
    answer, withheld = read_pieces(encode_calls([call]), thinking=False)
    assert json.loads(answer.arguments[0]) == {"p": spelled, "q": [spelled]} and not withheld


def test_control_tokens_in_a_value_are_what_the_model_wrote() -> None:
    """A model that writes a file about chat formats writes their tokens."""
    pieces = encode_calls([ToolCall("f", '{"p": "x"}')])
    at = pieces.index('parameter name="p" string="true">x</')
    pieces[at : at + 1] = ['parameter name="p" string="true">', Control("</think>"), Control("｜DSML｜"), " 1<", "2</"]
    answer, withheld = read_pieces(pieces, thinking=False)
    assert json.loads(answer.arguments[0]) == {"p": "</think>｜DSML｜ 1<2"} and not withheld


def test_unknown_control_tokens_are_withheld() -> None:
    answer, withheld = read_pieces(["a", Control("<｜place▁holder▁no▁7｜>"), "b"], thinking=False)
    assert answer.content == "ab" and withheld == "<｜place▁holder▁no▁7｜>"
    token = "<｜place▁holder▁no▁7｜>"
    assert answer.faults == [Malformed(Fault.STRAY_CONTROL, f"{token} in content", None, token)]


@pytest.mark.parametrize("tag", ['invoke name="', 'parameter name="'])
def test_a_tag_that_does_not_end_is_not_held_for_ever(tag: str) -> None:
    block = encode_calls([ToolCall("f", "{}")])
    begun = (
        block[:2] + ["tool_calls>\n<"] if tag.startswith("invoke") else block[: block.index('invoke name="f">\n\n</')]
    )
    begun = begun if tag.startswith("invoke") else [*begun, 'invoke name="f">\n<']
    parser = AnswerParser(thinking=False)
    for piece in [*begun, Control("｜DSML｜"), tag]:
        parser.text(piece) if isinstance(piece, str) else parser.control(piece.token)
    sent = 0
    while not parser.withheld:
        parser.text("x" * 100)
        sent += 100
        assert sent <= MAX_TAG + 100
    events = parser.finish()
    assert [event.fault for event in events if isinstance(event, Malformed)] == [Fault.BAD_TAG]


def test_a_parameter_without_a_type_is_what_its_schema_says() -> None:
    """Where the call does not say whether 42 is text, the tool's schema does."""
    pieces = pieces_of(next(one["raw"] for one in VECTORS if one["name"] == "a parameter that is text by its schema"))
    for texts, expected in (({"weather": {"city"}}, "42"), ({"weather": {"days"}}, 42), ({"other": {"city"}}, 42)):
        parser = AnswerParser(thinking=False, texts=texts)
        answer = Answer.of([event for piece in by_character(pieces) for event in feed(parser, piece)])
        assert json.loads(answer.arguments[0]) == {"city": expected} and answer.is_ended == [True]


def test_of_a_repeated_parameter_readers_take_the_last() -> None:
    raw = next(one["raw"] for one in VECTORS if one["name"] == "a parameter twice among others")
    answer, _ = read_spelled([raw], thinking=False)
    assert json.loads(answer.arguments[0]) == {"city": "Oslo", "days": 1}


def test_a_long_value_without_a_type_is_read_whole() -> None:
    value = "x" * (2 * MAX_TAG)
    call = f'<｜DSML｜invoke name="f"><｜DSML｜parameter name="p">{value}</｜DSML｜parameter></｜DSML｜invoke>'
    raw = f"<｜DSML｜tool_calls>{call}</｜DSML｜tool_calls>"
    for cut in ([raw], raw, [raw[:MAX_TAG], raw[MAX_TAG:]]):
        answer, _ = read_spelled(cut, thinking=False)
        assert json.loads(answer.arguments[0]) == {"p": value} and answer.is_ended == [True]


# round trips

NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters='"<>'), min_size=1, max_size=8
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.builds(
    ToolCall, NAMES, st.dictionaries(st.text(max_size=8), VALUES, max_size=4).map(lambda value: json.dumps(value))
)


@given(calls=st.lists(CALLS, max_size=3), content=st.text(), reasoning=st.text(), thinking=st.booleans())
def test_what_is_encoded_is_read_back(calls: list[ToolCall], content: str, reasoning: str, thinking: bool) -> None:
    before: list[Piece] = [reasoning, Control("</think>")] if thinking else []
    pieces = [*before, content, *encode_calls(calls), Control("<｜end▁of▁sentence｜>")]
    for cut in (pieces, by_character(pieces)):
        answer, withheld = read_pieces(cut, thinking)
        assert not answer.faults and not withheld and all(answer.is_ended)
        assert answer.content == content and answer.reasoning == (reasoning if thinking else "")
        assert answer.names == [call.name for call in calls]
        assert [json.loads(one) for one in answer.arguments] == [call.parsed_arguments() for call in calls]


# whatever the model writes

FRAGMENTS = [
    *CONTROL_TOKENS,
    "<｜DSML｜tool_calls>",
    "</｜DSML｜tool_calls>",
    '<｜DSML｜invoke name="f">',
    "</｜DSML｜invoke>",
    '<｜DSML｜parameter name="p" string="true">',
    '<｜DSML｜parameter name="q" string="false">',
    "</｜DSML｜parameter>",
    "<｜DSML｜",
    "</｜DSML｜",
    "\n\n",
    "\n",
    "<",
    "</",
    ">",
    "1",
    '["a", ',
    "]",
    "tool_calls>",
    "<｜DSML｜function_calls>",
    "</｜DSML｜function_calls>",
    '<｜DSML｜invoke name="">',
    '<｜DSML｜parameter name="r">',
    "True",
    "01",
    "text",
]
MESSES = st.lists(st.sampled_from(FRAGMENTS) | st.text(alphabet='<>/｜DSMLtool_cas="\n x1]', max_size=4), max_size=24)


@given(mess=MESSES, thinking=st.booleans(), cuts=st.lists(st.integers(0, 400), max_size=6))
def test_cuts_change_nothing(mess: list[str], thinking: bool, cuts: list[int]) -> None:
    raw = "".join(mess)
    places = sorted({0, len(raw), *(min(cut, len(raw)) for cut in cuts)})
    expected = read_spelled([raw], thinking)
    assert read_spelled([raw[a:b] for a, b in zip(places, places[1:], strict=False)], thinking) == expected
    assert read_spelled(raw, thinking) == expected
    assert read_pieces(by_character(pieces_of(raw)), thinking) == expected


@given(mess=MESSES, thinking=st.booleans())
def test_no_markup_gets_out(mess: list[str], thinking: bool) -> None:
    """Every control token is understood, reported and withheld, or part of an argument.

    Characters that were apart may make a spelling together once a stray token between them is withheld, so this looks
    at each delta: no control token is in any of them.
    """
    parser = AnswerParser(thinking=thinking)
    events = [event for piece in pieces_of("".join(mess)) for event in feed(parser, piece)] + parser.finish()
    for event in events:
        if isinstance(event, ReasoningDelta | ContentDelta):
            assert not CONTROLS.search(event.text), event
    answer = Answer.of(events)
    assert bool(parser.withheld) <= bool(answer.faults)
    if not all(answer.is_ended):
        assert answer.faults


def feed(parser: AnswerParser, piece: Piece) -> list[Event]:
    return parser.text(piece) if isinstance(piece, str) else parser.control(piece.token)


@given(mess=MESSES, thinking=st.booleans())
def test_text_without_control_tokens_is_text(mess: list[str], thinking: bool) -> None:
    """Spelled by ordinary tokens, the same mess is the model's text to the character."""
    raw = "".join(mess)
    answer, withheld = read_pieces(raw, thinking)
    assert (answer.reasoning if thinking else answer.content) == raw and not withheld and not answer.faults


# refusals


def test_surrogates() -> None:
    for read in (AnswerParser(thinking=False).text, AnswerParser(thinking=False).spelled):
        with pytest.raises(ValueError, match=r"^answer: the text is not valid Unicode"):
            read("a\ud800")


def test_a_finished_answer_is_finished() -> None:
    parser = AnswerParser(thinking=False)
    parser.finish()
    for again in (
        parser.finish,
        lambda: parser.text("a"),
        lambda: parser.control("</think>"),
        lambda: parser.spelled(""),
    ):
        with pytest.raises(ValueError, match=r"^answer: the answer is finished"):
            again()
