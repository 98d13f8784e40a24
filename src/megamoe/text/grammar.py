# SPDX-License-Identifier: Apache-2.0
"""Grammars: which tokens keep an answer valid JSON, or a valid tool call.

The work is done by llguidance (extra `server`; docs/decisions/0009-server.md says why it and not another): it runs a
parser over the bytes of the vocabulary, so a grammar is over text and never cares where tokens begin and end.

A grammar covers the whole answer, with what may stand before the part that matters, such as thinking up to `</think>`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch

from megamoe.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

ANY_TEXT = "/(?s:.*)/"


class GrammarFilter:
    """The engine's logits filter for one request: the state of its parser.

    Attributes:
        error: None, or why the parser could not go on; from then on only an end of sequence is allowed.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self.error: str | None = None

    def allowed(self) -> torch.Tensor:
        """Return which tokens may come next, [V] bool."""
        bits = numpy.frombuffer(self._matcher.compute_bitmask(), dtype=numpy.uint8)
        self._note_error()
        mask = numpy.zeros(self._vocab_size, dtype=numpy.bool_)
        known = numpy.unpackbits(bits, bitorder="little")[: self._vocab_size]
        mask[: len(known)] = known
        return torch.from_numpy(mask)

    def accept(self, token_id: int) -> None:
        """Go on with the token that was chosen."""
        self._matcher.consume_token(token_id)
        self._note_error()

    def _note_error(self) -> None:
        if self.error is None and self._matcher.is_error():
            self.error = self._matcher.get_error().strip() or "the grammar's parser failed"


class Grammar:
    """A checked grammar, from which every choice of a request gets a filter of its own."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def filter(self) -> GrammarFilter:
        """Return a filter at the beginning of an answer."""
        return GrammarFilter(self._matcher.deep_copy(), self._vocab_size)


class GrammarCompiler:
    """Makes grammars for one vocabulary. Making the first takes as long as reading the vocabulary."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        import llguidance  # of the extra, and only needed by requests that ask for a format

        self._llguidance = llguidance
        self._vocab_size = vocab_size
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer, eos_token_ids)),
            n_vocab=tokenizer.num_tokens,
            eos_token=list(eos_token_ids),
        )

    def compile(self, rules: str) -> Grammar:
        """Return the grammar for llguidance's dialect of Lark; `start` is the whole answer.

        Raises:
            ValueError: a schema cannot be enforced, or the grammar is too large.
        """
        matcher = self._llguidance.LLMatcher(self._tokenizer, self._llguidance.LLMatcher.grammar_from_lark(rules))
        if matcher.is_error():
            raise ValueError(f"grammar: {' '.join(matcher.get_error().split())}")
        return Grammar(matcher, self._vocab_size)


class _Vocabulary:
    """What llguidance reads of a tokenizer. A special token stands for no text, so it gets a name no text can spell."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> None:
        texts = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.num_tokens)]
        self._encode = tokenizer.encode
        self.eos_token_id = eos_token_ids[0]
        self.bos_token_id = None
        self.special_token_ids = [token_id for token_id, text in enumerate(texts) if not text]
        self.tokens = [text or b"<special %d>" % token_id for token_id, text in enumerate(texts)]

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):  # the wrapper tries whether bytes would do
            raise TypeError(f"a text is needed; got {type(text).__name__}")
        return self._encode(text)


@dataclasses.dataclass(frozen=True)
class ToolMarkup:
    """How a model writes tool calls."""

    token: str = "｜DSML｜"

    @property
    def begin_calls(self) -> str:
        return f"\n\n<{self.token}tool_calls>\n"

    @property
    def end_calls(self) -> str:
        return f"</{self.token}tool_calls>"

    def begin_call(self, name: str) -> str:
        return f'<{self.token}invoke name="{name}">\n'

    @property
    def end_call(self) -> str:
        return f"</{self.token}invoke>\n"

    def begin_parameter(self, name: str, is_string: bool) -> str:
        return f'<{self.token}parameter name="{name}" string="{"true" if is_string else "false"}">'

    @property
    def end_parameter(self) -> str:
        return f"</{self.token}parameter>\n"


@dataclasses.dataclass(frozen=True)
class CallableTool:
    """A tool of which a grammar makes calls.

    Attributes:
        name: its name.
        parameters: JSON schema of an object, or None for none.
    """

    name: str
    parameters: Mapping[str, Any] | None


def json_rules(schema: Mapping[str, Any], *, after: str | None = None) -> str:
    """Return rules for an answer that is JSON obeying `schema`, preceded by any text that ends in `after`."""
    return "\n".join(_before(after, "answer") + [f"answer: %json {json.dumps(schema)}"])


def tool_call_rules(
    tools: Sequence[CallableTool], markup: ToolMarkup, *, after: str | None, is_forced: bool, is_single: bool
) -> str:
    """Return rules for an answer whose tool calls obey their schemas, preceded by any text that ends in `after`.

    Args:
        tools: at least one.
        markup: how the model writes calls.
        after: the text that ends thinking, or None.
        is_forced: whether the answer is calls only; else it is text, then calls or none.
        is_single: whether one call is all.

    Raises:
        ValueError: the parameters of a tool are no object with named properties.
    """
    calls = [f"call_{place}" for place in range(len(tools))]
    begin = json.dumps(markup.begin_calls)
    if is_forced:
        lines = [*_before(after, "calls"), f"calls: {begin} body"]
    else:
        lines = [
            *_before(after, "(text_and_calls | TEXT)"),
            "text_and_calls: text body",
            f"text[suffix={begin}]: {ANY_TEXT}",
            f"TEXT: {ANY_TEXT} & ~/(?s:.*){_in_regex(markup.begin_calls)}(?s:.*)/",
        ]
    lines += [
        f"body: call{'' if is_single else '+'} {json.dumps(markup.end_calls)}",
        f"call: {' | '.join(calls)}",
    ]
    for rule, tool in zip(calls, tools, strict=True):
        lines += _call_rules(rule, tool, markup)
    return "\n".join(lines)


def _before(after: str | None, answer: str) -> list[str]:
    if after is None:
        return [f"start: {answer}"]
    return [f"start: before {answer}", f"before[suffix={json.dumps(after)}]: {ANY_TEXT}"]


def _in_regex(text: str) -> str:
    """Return a regular expression for `text`, for use between slashes."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)


def _call_rules(rule: str, tool: CallableTool, markup: ToolMarkup) -> list[str]:
    schema = tool.parameters or {}
    if schema.get("type", "object") != "object" or {"anyOf", "oneOf", "allOf", "$ref"} & set(schema):
        raise ValueError(
            f"tools: the parameters of {tool.name!r} must be an object with 'properties' to be enforced; "
            f"got {sorted(schema)}. Describe it with 'properties', or use tool_choice 'auto' without 'strict'."
        )
    properties: Mapping[str, Any] = schema.get("properties") or {}
    required = schema.get("required") or []
    missing = [name for name in required if name not in properties]
    if missing:
        raise ValueError(f"tools: {tool.name!r} requires {missing}, which its 'properties' do not describe. Add them.")
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    parts, lines = [], []
    for place, (name, property_) in enumerate(properties.items()):
        parts.append(f"{rule}_{place}{'' if name in required else '?'}")
        lines += _parameter_rules(f"{rule}_{place}", name, property_, shared, markup)
    begin, end = json.dumps(markup.begin_call(tool.name)), json.dumps(markup.end_call)
    return [" ".join([f"{rule}: {begin}", *parts, end]), *lines]


def _parameter_rules(
    rule: str, name: str, schema: Any, shared: Mapping[str, Any], markup: ToolMarkup
) -> list[str]:
    """A plain string is written as it is up to the closing tag; everything else, and a bounded string, as JSON."""
    end = markup.end_parameter
    text, value = (json.dumps(markup.begin_parameter(name, is_string)) for is_string in (True, False))
    is_object = isinstance(schema, Mapping)
    choices = schema.get("enum") if is_object else None
    if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
        return [f"{rule}: {text} ({' | '.join(json.dumps(choice) for choice in choices)}) {json.dumps(end)}"]
    if is_object and schema.get("type") == "string" and set(schema) <= {"type", "description", "title", "default"}:
        return [f"{rule}: {text} {rule}_text", f"{rule}_text[suffix={json.dumps(end)}]: {ANY_TEXT}"]
    body = {**schema, **shared} if is_object else schema
    return [f"{rule}: {value} {rule}_json {json.dumps(end)}", f"{rule}_json: %json {json.dumps(body)}"]
