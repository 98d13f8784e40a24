# SPDX-License-Identifier: Apache-2.0
"""JSON schemas: types of keywords, references, formats that are annotations."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe.text.grammar import GrammarCompiler, json_rules
from megamoe.text.schema import FORMATS, SchemaError, checked
from megamoe.text.tokenizer import Tokenizer

from ..fakes import EOS

NESTED = {"type": "object", "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/A"}}}}


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        (3, ""),
        ({"required": 3}, "required"),
        ({"required": ["a", 3]}, "required"),
        ({"enum": 3}, "enum"),
        ({"enum": []}, "enum"),
        ({"type": 3}, "type"),
        ({"type": "text"}, "type"),
        ({"type": ["string", 3]}, "type"),
        ({"properties": 3}, "properties"),
        ({"properties": {"a": 3}}, "properties.a"),
        ({"properties": {"a": {"items": {"enum": 3}}}}, "properties.a.items.enum"),
        ({"additionalProperties": 3}, "additionalProperties"),
        ({"anyOf": 3}, "anyOf"),
        ({"anyOf": [{"minLength": "x"}]}, "anyOf.0.minLength"),
        ({"items": [3]}, "items.0"),
        ({"prefixItems": {}}, "prefixItems"),
        ({"$defs": {"A": {"maximum": "9"}}}, "$defs.A.maximum"),
        ({"maxItems": -1}, "maxItems"),
        ({"maxItems": True}, "maxItems"),
        ({"pattern": 3}, "pattern"),
        ({"format": 3}, "format"),
        ({"$ref": 3}, "$ref"),
        ({"$ref": "#/$defs/no"}, "$ref"),
    ],
    ids=str,
)
def test_what_is_no_schema_is_told_with_its_place(schema: Any, place: str) -> None:
    with pytest.raises(SchemaError, match=r"^schema: ") as caught:
        checked(schema)
    assert caught.value.place == place


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}},
    ],
    ids=str,
)
def test_schemas_without_end(schema: dict[str, Any]) -> None:
    with pytest.raises(SchemaError, match="refers to itself without end"):
        checked(schema)


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"type": ["string", "null"], "enum": ["x", None]},
        {"type": "object", "properties": {"next": {"$ref": "#"}}},
        {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
        {**NESTED, "$defs": {"A": {"anyOf": [{"type": "integer"}, {"$ref": "#"}]}}},
        {
            "minLength": 1.0,
            "maxLength": 3,
            "minimum": -1,
            "const": {"anyOf": 3},
            "default": 3,
            "examples": 5,
            "x-mine": 1,
        },
    ],
    ids=str,
)
def test_schemas_stay_as_they_are(schema: Any) -> None:
    assert checked(schema) == schema


def test_unknown_formats_are_annotations() -> None:
    schema = {"type": "string", "format": "phone"}
    assert checked({"properties": {"format": schema, "b": {**schema, "format": "date"}}}) == {
        "properties": {"format": {"type": "string"}, "b": {"type": "string", "format": "date"}}
    }


def test_the_known_formats_are_enforced(tokenizer_directory: pathlib.Path) -> None:
    compiler = GrammarCompiler(Tokenizer(tokenizer_directory), vocab_size=330, eos_token_ids=(EOS,))
    for name in sorted(FORMATS):
        compiler.compile(json_rules(checked({"type": "string", "format": name})))
    with pytest.raises(ValueError, match=r"^grammar: Unknown format: phone$"):
        compiler.compile(json_rules({"type": "string", "format": "phone"}))


KEYS = ["type", "enum", "required", "properties", "items", "anyOf", "$ref", "$defs", "format", "minLength", "minimum"]
VALUES = st.recursive(
    st.sampled_from([3, "x", "#", "#/$defs/x", None, True, "string", [], {}, ["x"]]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from([*KEYS, "x"]), inner, max_size=3),
    max_leaves=8,
)


@given(schema=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_whatever_comes_is_read_or_refused(schema: dict[str, Any]) -> None:
    try:
        checked(schema)
    except SchemaError as error:
        assert str(error).startswith("schema: ")
