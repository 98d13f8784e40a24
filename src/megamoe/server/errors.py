# SPDX-License-Identifier: Apache-2.0
"""Errors as OpenAI's API tells them: {"error": {"message", "type", "param", "code"}}.

Clients choose what to do by the status: the official client retries 408, 409, 429 and 5xx unless told not to by
`x-should-retry`, which is sent where trying again would only repeat the work.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """What a client is told instead of an answer.

    Attributes:
        status: HTTP status.
        message: what, got, allowed, remedy.
        param: the field of the request it is about, dotted; None if none.
        code: a stable word for programs; None if the type says it all.
        headers: more response headers, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON object."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JsonResponse:
        """Return the HTTP response."""
        return JsonResponse(self.body(), status=self.status, headers=self.headers)


class JsonResponse(Response):
    """JSON whose text may hold anything a request can: a lone surrogate becomes "?" instead of an error."""

    media_type = "application/json"

    def __init__(self, content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(encode_json(content), status_code=status, headers=dict(headers or {}))


def encode_json(content: Any) -> bytes:
    """Return JSON in UTF-8, without spaces."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", errors="replace")


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return the error for what pydantic found in a request, which is never empty.

    A field that does not exist here comes first: it usually explains the others, and it is refused by its name because
    ignoring it could change the meaning of the request.
    """
    unknown = [error for error in errors if error["type"] == "extra_forbidden"]
    # Of the members of a union, the one that had the right type says what is wrong with it.
    first = min(unknown or errors, key=lambda error: error["type"].endswith("_type"))
    path = _path(first["loc"], last_is_a_field=bool(unknown))
    more = f" ({len(errors) - 1} more not listed.)" if len(errors) > 1 else ""
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}.")
    if unknown:
        return ApiError(
            400,
            f"Field '{path}' is not supported here. It could change the meaning of the request, so it is refused "
            f"rather than ignored; remove it, or see the fields in /openapi.json.{more}",
            param=path,
            code="unsupported_parameter",
        )
    if not path:
        message = "The body must be a JSON object, sent with 'Content-Type: application/json'."
        return ApiError(400, message, code="invalid_value")
    return ApiError(400, f"Field '{path}': {first['msg']}.{more}", param=path, code="invalid_value")


def _path(location: Sequence[int | str], *, last_is_a_field: bool) -> str:
    """Return `messages.0.content` for a location: without where it came from and which member of a union failed."""
    parts: list[str] = []
    for place, part in enumerate(location):
        is_field = last_is_a_field and place == len(location) - 1
        if place == 0 and part in ("body", "query", "path", "header"):
            continue
        if isinstance(part, str) and not is_field and _is_union_member(part, parts, location[place - 1]):
            continue
        parts.append(str(part))
    return ".".join(parts)


def _is_union_member(part: str, before: Sequence[str], last: int | str) -> bool:
    """Return whether pydantic put a type's name or a tag there: `str`, `list[int]`, `TextPart`, a message's role.

    Args:
        part: what may be one.
        before: the path so far.
        last: what stands before it in pydantic's location: a tag and the field of its name follow each other.
    """
    if last == "response_format" or (len(before) == 2 and before[0] == "messages" and isinstance(last, int)):
        return part in ("text", "json_object", "json_schema", "system", "developer", "user", "assistant", "tool")
    return part in ("str", "int", "float", "bool") or part[:1].isupper() or "[" in part or "-" in part
