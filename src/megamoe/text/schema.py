# SPDX-License-Identifier: Apache-2.0
"""Is this a JSON schema? Checked before a grammar is made of it, so that what is wrong is told with its place.

Only the types of keywords are checked, and whether references lead to something; what can be enforced is the business
of grammar.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

TYPES: Final = ("array", "boolean", "integer", "null", "number", "object", "string")
# Formats of strings that a grammar enforces. Others are annotations, as the standard has it: they are left out.
FORMATS: Final = frozenset(
    ["date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"],
)

_NAMED_SCHEMAS: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS_OF_SCHEMAS: Final = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS: Final = (
    *("additionalProperties", "additionalItems", "unevaluatedProperties", "unevaluatedItems", "items", "not"),
    *("contains", "propertyNames", "if", "then", "else"),
)
_NUMBERS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COUNTS: Final = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


class SchemaError(ValueError):
    """A schema that is none.

    Attributes:
        place: the keyword it is about, dotted; "" for the schema itself.
    """

    def __init__(self, place: str, message: str) -> None:
        """Keep the place beside the message."""
        super().__init__(message)
        self.place = place


def checked(schema: Any) -> Any:
    """Return a schema, without the formats that are annotations, after checking the types of its keywords.

    Raises:
        SchemaError: a keyword has a value of the wrong type, a reference leads nowhere, or to itself without end.
    """
    result = _checked(schema, "")
    _check_references(result, result, "")
    return result


def _checked(schema: Any, place: str) -> Any:
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, Mapping):
        raise _wrong(place, schema, "an object, true or false")
    result: dict[str, Any] = {}
    for key, value in schema.items():
        here = f"{place}.{key}" if place else str(key)
        if key in _NAMED_SCHEMAS:
            _need(here, value, lambda one: isinstance(one, Mapping), "an object of schemas")
            result[key] = {name: _checked(one, f"{here}.{name}") for name, one in value.items()}
        elif key in _LISTS_OF_SCHEMAS or key == "items" and isinstance(value, list):
            _need(here, value, lambda one: isinstance(one, list), "a list of schemas")
            result[key] = [_checked(one, f"{here}.{idx}") for idx, one in enumerate(value)]
        elif key in _SCHEMAS:
            result[key] = _checked(value, here)
        elif key == "format" and isinstance(value, str) and value not in FORMATS:
            continue
        else:
            _check_keyword(here, key, value)
            result[key] = value
    return result


def _check_keyword(place: str, key: str, value: Any) -> None:
    if key == "type":
        known = ", ".join(TYPES)
        names = value if isinstance(value, list) else [value]
        _need(place, value, lambda _: bool(names) and all(one in TYPES for one in names), f"one or several of {known}")
    elif key == "required":
        _need(
            place, value, lambda one: isinstance(one, list) and all(isinstance(n, str) for n in one), "a list of names"
        )
    elif key == "enum":
        _need(place, value, lambda one: isinstance(one, list) and bool(one), "a list of one value or more")
    elif key in ("pattern", "format", "$ref"):
        _need(place, value, lambda one: isinstance(one, str), "text")
    elif key in _NUMBERS:
        _need(place, value, lambda one: isinstance(one, int | float) and not isinstance(one, bool), "a number")
    elif key in _COUNTS:
        is_count = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == int(value)
        _need(place, value, lambda _: is_count, "a number, 0 or more")


def _need(place: str, value: Any, is_right: Callable[[Any], bool], allowed: str) -> None:
    if not is_right(value):
        raise _wrong(place, value, allowed)


def _wrong(place: str, value: Any, allowed: str) -> SchemaError:
    return SchemaError(place, f"schema: {place or 'it'} must be {allowed}; got {value!r:.100}.")


def _check_references(schema: Any, root: Any, place: str) -> None:
    """Refuse references, at any depth, that lead nowhere or only to themselves."""
    if not isinstance(schema, Mapping):
        return
    if _is_endless(schema, root, frozenset()):
        raise SchemaError(
            place, f"schema: {place or 'the schema'} refers to itself without end. Give it another way out."
        )
    for key, value in schema.items():
        here = f"{place}.{key}" if place else str(key)
        if key in _NAMED_SCHEMAS:
            for name, one in value.items():
                _check_references(one, root, f"{here}.{name}")
        elif key in _LISTS_OF_SCHEMAS or key == "items" and isinstance(value, list):
            for idx, one in enumerate(value):
                _check_references(one, root, f"{here}.{idx}")
        elif key in _SCHEMAS:
            _check_references(value, root, here)


def _is_endless(schema: Any, root: Any, visited: frozenset[str]) -> bool:
    """Return whether nothing but references to what was visited says what a value is."""
    if not isinstance(schema, Mapping):
        return False
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        if reference in visited:
            return True
        if _is_endless(_target(reference, root), root, visited | {reference}):
            return True
    if any(_is_endless(one, root, visited) for one in schema.get("allOf", ())):
        return True
    choices = [schema[key] for key in ("anyOf", "oneOf") if schema.get(key)]
    return any(all(_is_endless(one, root, visited) for one in several) for several in choices)


def _target(reference: str, root: Any) -> Any:
    found = root
    for part in reference.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdigit() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, Mapping) and name in found:
            found = found[name]
        else:
            raise SchemaError("$ref", f"schema: $ref {reference!r:.100} leads nowhere. Describe it below '$defs'.")
    return found
