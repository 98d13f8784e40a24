# SPDX-License-Identifier: Apache-2.0
"""Grammars over tokens: what they allow and refuse, token by token, with DeepSeek-V4's markup and without."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from megamoe.models.deepseek_v4.chat import ToolCall, encode_calls
from megamoe.text.grammar import CallableTool, GrammarCompiler, json_rules, tool_call_rules
from megamoe.text.tokenizer import Tokenizer

from ..fakes import EOS
from ..server.fakes import write_v4_tokenizer

VOCAB = 400  # more than the tokenizer has, as in released models
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"enum": ["x", "y"]}}},
    "required": ["a"],
    "additionalProperties": False,
}
PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1},
        "at": {"$ref": "#/$defs/Point"},
        "code": {"type": "string", "maxLength": 3},
    },
    "required": ["city", "days"],
    "$defs": {"Point": {"type": "object", "properties": {"x": {"type": "number"}}, "additionalProperties": False}},
}
TOOLS = [CallableTool("place", PLACE, True), CallableTool("now", None, True), CallableTool("loose", {}, False)]


class Setup:
    """A vocabulary with its compiler."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.tokenizer = Tokenizer(directory)
        self.compiler = GrammarCompiler(self.tokenizer, vocab_size=VOCAB, eos_token_ids=(EOS,))
        self.dsml = self.tokenizer.added_ids["｜DSML｜"]
        self.think_end = self.tokenizer.added_ids["</think>"]

    def walk(self, rules: str, ids: Sequence[int]) -> tuple[int, bool]:
        """Return how many of the tokens are allowed, and whether the answer may end after them."""
        grammar = self.compiler.compile(rules).filter()
        for place, token_id in enumerate(ids):
            if not bool(grammar.allowed()[token_id]):
                return place, bool(grammar.allowed()[EOS])
            grammar.accept(token_id)
        assert grammar.error is None
        return len(ids), bool(grammar.allowed()[EOS])

    def accepts(self, rules: str, *parts: str | Sequence[ToolCall]) -> bool:
        """Return whether the whole answer is allowed and may end there. Markup in strings is control tokens."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, str):
                ids += self.tokenizer.encode(part)
                continue
            for piece in encode_calls(part):
                text = isinstance(piece, str)
                ids += self.tokenizer.encode_text(piece) if text else [self.tokenizer.added_ids[piece.token]]
        count, may_end = self.walk(rules, ids)
        return count == len(ids) and may_end


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    directory = tmp_path_factory.mktemp("grammar")
    write_v4_tokenizer(directory)
    return Setup(directory)


# JSON


@pytest.mark.parametrize("text", ['{"a": 1}', '{"a":-20,"b":[]}', '{ "a" : 0, "b" : ["x", "y"] }'])
def test_json_that_obeys_the_schema(setup: Setup, text: str) -> None:
    assert setup.accepts(json_rules(SCHEMA), text)
    ids = setup.tokenizer.encode(text)
    for place in range(1, len(ids)):
        count, may_end = setup.walk(json_rules(SCHEMA), ids[:place])
        assert count == place and not may_end, "it must not end before it is complete"


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[1]", '{"a": "1"}', '{"a": 1.5}', '{"a": 1, "c": 2}', '{"b": []}', '{"a": 1, "b": ["z"]}', "Sure:"],
)
def test_json_that_does_not(setup: Setup, text: str) -> None:
    assert not setup.accepts(json_rules(SCHEMA), text)


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ('{"a":1,"b":["x"]}', True),
        ('{"a": 1, "b": ["x", "y"]}', True),
        ('{\n  "a": 1,\n  "b": [\n    "x"\n  ]\n}', True),
        ('{\n\t"a": 1\n}', True),
        ('{"a":  1}', False),
        ('{\n\n"a": 1}', False),
        ("{\n" + " " * 65 + '"a": 1}', False),
    ],
    ids=repr,
)
def test_white_space_is_bounded(setup: Setup, text: str, is_allowed: bool) -> None:
    """A model that loops in line breaks would fill the answer with them."""
    assert setup.accepts(json_rules(SCHEMA), text) is is_allowed
    assert setup.accepts(json_rules({**SCHEMA, "x-guidance": {"lenient": True}}), text) is is_allowed


def test_nothing_follows_the_json(setup: Setup) -> None:
    grammar = setup.compiler.compile(json_rules(SCHEMA)).filter()
    for token_id in setup.tokenizer.encode('{"a": 1}'):
        grammar.accept(token_id)
    allowed = grammar.allowed()
    assert allowed[EOS] and not allowed[setup.tokenizer.encode("x")[0]]


def test_thinking_comes_before_the_json(setup: Setup) -> None:
    rules = json_rules(SCHEMA, after=setup.think_end)
    assert setup.accepts(rules, 'Anything, even {"a": 2} and more.</think>{"a": 1}')
    assert setup.accepts(rules, '</think>{"a": 1}')
    assert not setup.accepts(rules, '{"a": 1}')
    assert not setup.accepts(rules, "Thinking</think>No.")
    spelled = setup.tokenizer.encode_text('x</think>{"a": 1}')
    assert not setup.walk(rules, spelled)[1], "only the control token ends thinking"


def test_the_mask_covers_the_model_s_vocabulary(setup: Setup) -> None:
    grammar = setup.compiler.compile(json_rules({"type": "object"})).filter()
    allowed = grammar.allowed()
    assert allowed.shape == (VOCAB,) and allowed.dtype is torch.bool
    assert allowed.any() and not allowed[setup.tokenizer.num_tokens :].any(), "an id without a token is never allowed"
    assert not allowed[list(setup.tokenizer.added_ids.values())].any(), "text is never a control token"


def test_filters_of_one_grammar_are_independent(setup: Setup) -> None:
    grammar = setup.compiler.compile(json_rules(SCHEMA))
    first, second = grammar.filter(), grammar.filter()
    before = second.allowed()
    first.accept(setup.tokenizer.encode("{")[0])
    assert torch.equal(second.allowed(), before) and not torch.equal(first.allowed(), before)


def test_a_token_that_is_not_allowed_is_reported(setup: Setup) -> None:
    grammar = setup.compiler.compile(json_rules(SCHEMA)).filter()
    grammar.accept(setup.tokenizer.encode("x")[0])
    assert grammar.error
    assert grammar.allowed().nonzero().flatten().tolist() == [EOS], "the sequence can only end"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "object", "not": {}}, "not"),
        ({"type": "string", "pattern": "(?=x)y"}, "look-around"),
        ({"type": "nonsense"}, "nonsense"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "grammar"),
    ],
    ids=str,
)
def test_schemas_that_cannot_be_enforced(setup: Setup, schema: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        setup.compiler.compile(json_rules(schema))
    assert "\n" not in str(caught.value)


# tool calls


def rules(setup: Setup, tools: Sequence[CallableTool] = TOOLS, **options: Any) -> str:
    return tool_call_rules(tools, setup.dsml, **{"after": None, "is_forced": False, "is_single": False, **options})


GOOD = [
    [ToolCall("place", '{"city": "Rome", "days": 3}')],
    [ToolCall("place", '{"city": "a <b> </c>\\n\\n<d", "unit": "C", "days": 3, "at": {"x": 1.5}}')],
    [ToolCall("now", "{}")],
    [ToolCall("loose", '{"anything": [1, {"a": null}], "else": "text"}')],
    [ToolCall("loose", "{}"), ToolCall("now", "{}"), ToolCall("place", '{"city": "", "days": 1}')],
]
BAD = [
    [ToolCall("place", '{"city": "Rome", "days": 0}')],
    [ToolCall("place", '{"city": "Rome", "days": "3"}')],
    [ToolCall("place", '{"city": "Rome"}')],
    [ToolCall("place", '{"city": "Rome", "unit": "K", "days": 3}')],
    [ToolCall("place", '{"city": "Rome", "days": 3, "more": 1}')],
    [ToolCall("place", '{"city": "Rome", "days": 3, "at": {"y": 1}}')],
    [ToolCall("now", '{"x": 1}')],
    [ToolCall("never", "{}")],
]


@pytest.mark.parametrize("is_forced", [True, False])
@pytest.mark.parametrize("calls", GOOD, ids=str)
def test_calls_that_obey(setup: Setup, calls: list[ToolCall], is_forced: bool) -> None:
    assert setup.accepts(rules(setup, is_forced=is_forced), calls)
    assert setup.accepts(rules(setup, is_forced=is_forced, after=setup.think_end), "Hm.\n\n<</think>", calls)


@pytest.mark.parametrize("is_forced", [True, False])
@pytest.mark.parametrize("calls", BAD, ids=str)
def test_calls_that_do_not(setup: Setup, calls: list[ToolCall], is_forced: bool) -> None:
    assert not setup.accepts(rules(setup, is_forced=is_forced), calls)


def test_text_is_free_unless_a_call_is_forced(setup: Setup) -> None:
    for text in ("No.", "", "a\n\n<b", "tool_calls>"):
        assert setup.accepts(rules(setup), text)
        assert not setup.accepts(rules(setup, is_forced=True), text)
    assert setup.accepts(rules(setup), "Let me look.\n\n< or not", GOOD[0])
    assert not setup.accepts(rules(setup, is_forced=True), "Let me look.", GOOD[0])


def test_one_call_at_most(setup: Setup) -> None:
    for is_forced in (True, False):
        single = rules(setup, is_forced=is_forced, is_single=True)
        assert setup.accepts(single, GOOD[0]) and not setup.accepts(single, [*GOOD[0], *GOOD[2]])


def test_calls_or_json(setup: Setup) -> None:
    either = rules(setup, schema=SCHEMA)
    assert setup.accepts(either, '{"a": 1}') and setup.accepts(either, GOOD[1])
    assert not setup.accepts(either, "text") and not setup.accepts(either, '{"a": 1}', GOOD[1])


def test_bounded_strings_are_written_as_json(setup: Setup) -> None:
    """Raw text has no end that a length could be checked at, so the parameter says that it is JSON."""
    ids = setup.tokenizer.encode
    start = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="place">'
    parts = [
        '\n<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>',
        '\n<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>',
        '\n<｜DSML｜parameter name="code" string="false">"abc"</｜DSML｜parameter>',
        "\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
    ]
    whole = ids(start + "".join(parts))
    assert setup.walk(rules(setup, is_forced=True), whole) == (len(whole), True)
    too_long = ids(start + "".join(parts).replace("abc", "abcd"))
    assert setup.walk(rules(setup, is_forced=True), too_long)[0] < len(too_long)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"type": "array"}, "must be an object"),
        ({"anyOf": [{"type": "object"}]}, "anyOf"),
        ({"type": "object", "required": ["x"]}, "requires x"),
    ],
    ids=str,
)
def test_parameters_that_cannot_be_enforced(setup: Setup, parameters: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rules(setup, [CallableTool("f", parameters, True)])
    assert rules(setup, [CallableTool("f", parameters, False)])


def test_names_are_quoted(setup: Setup) -> None:
    """Names with quotes, backslashes or other scripts break no rule."""
    properties = {'a"b': {"type": "integer"}, "c\\d": {"enum": ['"', "\\", "é😀"]}}
    tool = CallableTool("f", {"type": "object", "properties": properties, "required": ["c\\d"]}, True)
    assert setup.accepts(rules(setup, [tool]), [ToolCall("f", '{"c\\\\d": "é😀"}')])
