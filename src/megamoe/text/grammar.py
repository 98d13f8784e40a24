# SPDX-License-Identifier: Apache-2.0
"""Grammars: which tokens keep an answer valid JSON, or a valid tool call.

The work is done by llguidance (extra `server`; docs/decisions/0009-server.md says why it and not another): it runs a
parser over the bytes of the vocabulary, so a grammar is over text and never cares where tokens begin and end.

A grammar covers the whole answer, with what may stand before the part that matters, such as thinking up to `</think>`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch

from megamoe.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

_ANY_TEXT = "/(?s:.*)/"
# Between the parts of JSON: nothing, a space, or a new line with its indentation. With any white space allowed, as JSON
# has it, a model can go on with line breaks until its tokens are used up, and some do.
_WHITE_SPACE = r"( |\r?\n[ \t]{0,64})?"
_UNBOUNDED = {"type", "title", "description", "default", "examples"}  # of a schema for any string


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
            self.error = _reason(self._matcher.get_error()) or "the grammar's parser failed"


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
            raise ValueError(f"grammar: {_reason(matcher.get_error())}")
        return Grammar(matcher, self._vocab_size)


def _reason(error: str) -> str:
    """Return what llguidance says is wrong, without where in our rules, and without the rules and its state."""
    said = re.split(r"^\s*\d+ \| |<state>|\n\n", error.strip(), maxsplit=1, flags=re.MULTILINE)[0]
    return re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", " ".join(said.split()))[:300]


class _Vocabulary:
    """What llguidance reads of a tokenizer. Added tokens are no text: grammars name them by id, text never is one."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> None:
        added = set(tokenizer.added_ids.values())
        texts = [
            b"" if token_id in added else tokenizer.token_bytes(token_id) for token_id in range(tokenizer.num_tokens)
        ]
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
class CallableTool:
    """A tool of which a grammar makes calls.

    Attributes:
        name: its name.
        parameters: JSON schema of an object, or None for none.
        is_strict: whether arguments must obey the schema; else any arguments are allowed.
    """

    name: str
    parameters: Mapping[str, Any] | None
    is_strict: bool


def json_rules(schema: Mapping[str, Any], *, after: int | None = None) -> str:
    """Return rules for an answer that is JSON obeying `schema`, preceded by any text that ends in the token `after`."""
    return "\n".join([*_before(after, "answer"), f"answer: {_json(schema)}"])


def tool_call_rules(
    tools: Sequence[CallableTool],
    dsml: int,
    *,
    after: int | None,
    is_forced: bool,
    is_single: bool,
    schema: Mapping[str, Any] | None = None,
) -> str:
    """Return rules for an answer whose tool calls obey their schemas, preceded by any text that ends in `after`.

    Args:
        tools: at least one.
        dsml: the control token of DeepSeek-V4's call markup, see docs/chat.md.
        after: the token that ends thinking, or None.
        is_forced: whether the answer is calls only; else it is text, then calls or none.
        is_single: whether one call is all.
        schema: what the answer must obey where it is not calls; None allows any text, also before calls.

    Raises:
        ValueError: the parameters of a strict tool are no object with named properties.
    """
    tag = f"<[{dsml}]>"
    names = [f"call_{place}" for place in range(len(tools))]
    block = f'{tag} "tool_calls>\\n" call{"" if is_single else "+"} "</" {tag} "tool_calls>"'
    if is_forced:
        lines = [*_before(after, "calls"), f'calls: "\\n\\n<" {block}']
    elif schema is not None:
        lines = [*_before(after, "(answer | calls)"), f'calls: "\\n\\n<" {block}']
        lines += [f"answer: {_json(schema)}"]
    else:
        lines = [*_before(after, "(TEXT | TEXT_BEFORE calls)"), f"calls: {block}", f"TEXT: {_ANY_TEXT}"]
        lines += ["TEXT_BEFORE: /(?s:.*)\\n\\n</"]
    lines += [f"call: {' | '.join(names)}", "VALUE: /(?s:.*)<\\//"]
    for name, tool in zip(names, tools, strict=True):
        lines += _call_rules(name, tool, tag)
    return "\n".join(lines)


def _before(after: int | None, answer: str) -> list[str]:
    if after is None:
        return [f"start: {answer}"]
    return [f"start: THOUGHT <[{after}]> {answer}", f"THOUGHT: {_ANY_TEXT}"]


def _call_rules(rule: str, tool: CallableTool, tag: str) -> list[str]:
    """Return the rules of one tool. A line break stands before each parameter; a call without any has an empty line."""
    begin = f'"<" {tag} {_quoted(f"""invoke name="{tool.name}">""")}'
    end = f'"\\n</" {tag} "invoke>\\n"'
    if not tool.is_strict:
        some = 'string=\\"true\\">', 'string=\\"false\\">'
        opening = f'"\\n<" {tag} "parameter name=\\"" /[^"\\n<>]+/ ("\\" {some[0]}" | "\\" {some[1]}")'
        return [f'{rule}: {begin} ({rule}_any+ | "\\n") {end}', f'{rule}_any: {opening} VALUE {tag} "parameter>"']
    schema = tool.parameters or {}
    if schema.get("type", "object") != "object" or {"anyOf", "oneOf", "allOf", "$ref"} & set(schema):
        raise ValueError(
            f"tools: the parameters of {tool.name!r} must be an object with 'properties' to be enforced; got one with "
            f"{', '.join(sorted(schema))}. Describe it with 'properties', or set 'strict' to false."
        )
    properties: Mapping[str, Any] = schema.get("properties") or {}
    required = schema.get("required") or []
    missing = [str(name) for name in required if name not in properties]
    if missing:
        raise ValueError(
            f"tools: {tool.name!r} requires {', '.join(missing)}, not described in its 'properties'. Add it there."
        )
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    parts, lines = [], []
    for place, (name, property_) in enumerate(properties.items()):
        parts.append(f"{rule}_{place}{'' if name in required else '?'}")
        lines += _parameter_rules(f"{rule}_{place}", name, property_, shared, tag)
    empty = [] if required else ['"\\n"']
    body = " | ".join([*([" ".join(parts)] if parts else []), *empty])
    return [f"{rule}: {begin} ({body}) {end}", *lines]


def _parameter_rules(rule: str, name: str, schema: Any, shared: Mapping[str, Any], tag: str) -> list[str]:
    """A plain string is written as it is up to the closing tag; everything else, and a bounded string, as JSON."""
    is_object = isinstance(schema, Mapping)
    choices: list[Any] = (schema.get("enum") or []) if is_object else []
    is_choice = bool(choices) and all(isinstance(choice, str) for choice in choices)
    is_text = is_object and schema.get("type") == "string" and set(schema) <= _UNBOUNDED
    raw = "true" if is_choice or is_text else "false"
    opening = f'"\\n<" {tag} {_quoted(f"""parameter name="{name}" string="{raw}">""")}'
    closing = f'{tag} "parameter>"'
    if is_choice:
        return [f'{rule}: {opening} ({" | ".join(_quoted(choice) for choice in choices)}) "</" {closing}']
    if is_text:
        return [f"{rule}: {opening} VALUE {closing}"]
    body = {**schema, **shared} if is_object else schema
    return [f'{rule}: {opening} {rule}_json "</" {closing}', f"{rule}_json: {_json(body)}"]


def _json(schema: Any) -> str:
    """Return the right side of a rule for JSON that obeys `schema`."""
    if not isinstance(schema, Mapping):  # true and false are schemas, too
        schema = {} if schema is True else {"not": {}}
    return f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': _WHITE_SPACE}})}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
