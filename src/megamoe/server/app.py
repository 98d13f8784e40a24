# SPDX-License-Identifier: Apache-2.0
"""The routes.

    POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /v1/models/{id}
    GET /health   GET /ready    GET /metrics   GET /openapi.json   GET /docs   GET /

A route checks and tokenizes (in a worker thread, so that a long prompt stops nobody else), submits, and only then
answers: what is wrong with a request is told by a status, also when the answer will be streamed.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib.resources
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

import megamoe.server.protocol as protocol
from megamoe.server.chat import Chat
from megamoe.server.completions import Completion
from megamoe.server.errors import ApiError, JsonResponse, from_validation
from megamoe.server.generation import Generation
from megamoe.server.guard import ApiKey, BodyLimit, OpenRequests
from megamoe.server.metrics import Metrics
from megamoe.server.settings import ServerSettings
from megamoe.server.streaming import ClientGone, EventStream, unless_gone
from megamoe.text.chat_format import ChatFormat
from megamoe.text.grammar import GrammarCompiler
from megamoe.text.prompts import PromptEncoder
from megamoe.text.service import Request as TextRequest
from megamoe.text.service import Service, ServiceStopped

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STALLED_S = 120.0  # a step that takes longer than this is taken for stuck
FAILURES = 8  # so many failed requests with none that ended well between: it is not the requests
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": protocol.ErrorAnswer, "description": description}
    for status, description in {
        400: "The request is wrong, and says where.",
        401: "The API key is missing or wrong.",
        404: "There is no such model.",
        408: "The request took too long.",
        413: "The body is too large.",
        429: "The queue is full; Retry-After says when to try again.",
        500: "A defect of the server.",
        503: "The server is shutting down or has failed.",
    }.items()
}


class _Prepared(Protocol):
    """A request that was checked and tokenized, of either API."""

    @property
    def requests(self) -> Sequence[TextRequest[Any]]:
        """What the service is to do."""
        ...

    async def answer(self, generation: Generation[Any]) -> dict[str, Any]:
        """Return the whole answer."""
        ...

    def events(self, generation: Generation[Any]) -> Any:
        """Return the chunks, an async generator."""
        ...


class State:
    """What the routes share.

    Attributes:
        is_ready: set after warm-up, cleared when the server begins to shut down.
        ending: set when the server begins to shut down.
    """

    def __init__(
        self,
        service: Service,
        encoder: PromptEncoder,
        chat_format: ChatFormat,
        settings: ServerSettings,
        *,
        version: str,
    ) -> None:
        self.service = service
        self.encoder = encoder
        self.chat_format = chat_format
        self.settings = settings
        self.metrics = Metrics(model_name=settings.model_name, recipe=settings.recipe, version=version)
        self.fingerprint = f"megamoe-{version}-{settings.recipe}"
        self.started = int(time.time())
        self.is_ready = False
        self.ending = asyncio.Event()
        self._grammars: GrammarCompiler | None = None

    def grammars(self) -> GrammarCompiler:
        """Return the compiler of grammars, made when first needed; called in worker threads, where two may be made."""
        if self._grammars is None:
            self._grammars = GrammarCompiler(
                self.encoder.tokenizer, vocab_size=self.encoder.vocab_size, eos_token_ids=self.encoder.eos_token_ids
            )
        return self._grammars


def build_app(state: State, *, version: str) -> FastAPI:
    """Return the ASGI application. The service is started and stopped by whoever runs it."""
    settings = state.settings
    app = FastAPI(
        title="MegaMoE",
        version=version,
        summary="DeepSeek-V4 in NVFP4, behind OpenAI's API.",
        docs_url=None,  # the stock pages load scripts from elsewhere
        redoc_url=None,
    )
    _add_api(app, state)
    _add_operations(app, state)
    _add_pages(app)
    _add_errors(app)
    _describe_chunks(app)
    app.add_middleware(
        BodyLimit, max_bytes=settings.largest_body_bytes, timeout_s=settings.body_timeout_s, ending=state.ending
    )
    if settings.api_key is not None:
        app.add_middleware(ApiKey, key=settings.api_key)
    app.add_middleware(OpenRequests, limit=settings.max_open_requests, gauge=state.metrics.open_requests)
    return app


def _add_api(app: FastAPI, state: State) -> None:
    settings = state.settings
    card = protocol.ModelCard(
        id=settings.model_name,
        object="model",
        created=state.started,
        owned_by="megamoe",
        max_model_len=settings.context,
        recipe=settings.recipe,
    )

    async def serve(request: Request, endpoint: str, stream: bool, prepare: Callable[[], _Prepared]) -> Response:
        arrival = time.monotonic()
        metrics = state.metrics
        status = "error"
        is_streaming = False
        generation: Generation[Any] | None = None

        def done() -> None:
            if generation is not None:
                generation.cancel()  # whichever way this ended, nothing goes on for it
            metrics.requests.labels(endpoint, status).inc()
            metrics.request_s.observe(time.monotonic() - arrival)

        try:
            prepared = await asyncio.to_thread(prepare)
            generation = Generation[Any](state.service, metrics, prepared.requests, arrival=arrival)
            if not stream:
                answer = await unless_gone(request, _whole(prepared, generation))
                status = "200"
                return JsonResponse(answer)
            await unless_gone(request, generation.start())
            status = "200"
            is_streaming = True
            return EventStream(
                prepared.events(generation),
                timeout_s=settings.request_timeout_s + 30,
                on_end=done,
                on_disconnect=metrics.disconnects.inc,
            )
        except ClientGone:
            status = "disconnected"
            metrics.disconnects.inc()
            return Response(status_code=499)  # nobody reads it
        except ApiError as error:
            status = str(error.status)
            raise
        finally:
            if not is_streaming:
                done()

    @app.post(
        "/v1/chat/completions",
        response_model=protocol.ChatAnswer,
        responses={**_ERRORS, 200: _streamed(protocol.ChatAnswer, protocol.ChatChunk)},
        tags=["OpenAI"],
        summary="Answer a conversation",
    )
    async def chat_completions(body: protocol.ChatRequest, request: Request) -> Response:
        """Answer a conversation; with `stream` as server-sent events that end with `data: [DONE]`."""
        return await serve(
            request,
            "chat",
            bool(body.stream),
            lambda: Chat(body, state.encoder, state.chat_format, state.grammars, settings, state.fingerprint),
        )

    @app.post(
        "/v1/completions",
        response_model=protocol.CompletionAnswer,
        responses={**_ERRORS, 200: _streamed(protocol.CompletionAnswer, protocol.CompletionAnswer)},
        tags=["OpenAI"],
        summary="Continue a text",
    )
    async def completions(body: protocol.CompletionRequest, request: Request) -> Response:
        """Continue a text as it is; with `stream` as server-sent events that end with `data: [DONE]`."""
        return await serve(
            request,
            "completions",
            bool(body.stream),
            lambda: Completion(body, state.encoder, settings, state.fingerprint),
        )

    list_errors: dict[int | str, dict[str, Any]] = {401: _ERRORS[401], 429: _ERRORS[429]}

    @app.get("/v1/models", responses=list_errors, tags=["OpenAI"], summary="The model that is served")
    async def models() -> protocol.ModelList:
        """List the one model."""
        return protocol.ModelList(object="list", data=[card])

    @app.get(
        "/v1/models/{model:path}",
        responses={**list_errors, 404: _ERRORS[404]},
        tags=["OpenAI"],
        summary="One model",
    )
    async def model(model: str) -> protocol.ModelCard:
        """Describe the model, if it is this one."""
        if model != settings.model_name:
            raise ApiError(404, f"There is no model {model[:100]!r} here.", param="model", code="model_not_found")
        return card


async def _whole(prepared: _Prepared, generation: Generation[Any]) -> dict[str, Any]:
    await generation.start()
    return await prepared.answer(generation)


def _streamed(whole: type[BaseModel], chunk: type[BaseModel]) -> dict[str, Any]:
    """Describe a 200 answer that comes as JSON or, if asked for, as events; the schema is that of one event."""

    def holding(name: str) -> dict[str, Any]:
        schema = {"$ref": f"#/components/schemas/{name}"}
        return {"type": "string", "contentMediaType": "application/json", "contentSchema": schema}

    data = {
        "description": "A chunk as JSON; or [DONE], the last event; or an error, the last event when something failed.",
        "anyOf": [{"const": "[DONE]"}, holding(chunk.__name__), holding("ErrorAnswer")],
    }
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {
        "model": whole,
        "description": "The answer, or with `stream` its chunks as server-sent events.",
        "content": {"text/event-stream": {"schema": event}},
    }


def _describe_chunks(app: FastAPI) -> None:
    """Add the type of streamed chunks to the description of the API, which FastAPI cannot know of."""
    complete = app.openapi

    def openapi() -> dict[str, Any]:
        description = complete()
        schema = protocol.ChatChunk.model_json_schema(ref_template="#/components/schemas/{model}")
        types = description["components"]["schemas"]
        for name, one in {**schema.pop("$defs"), "ChatChunk": schema}.items():
            types.setdefault(name, one)
        return description

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


def _add_operations(app: FastAPI, state: State) -> None:
    unavailable: dict[int | str, dict[str, Any]] = {503: _ERRORS[503]}

    @app.get("/health", responses=unavailable, tags=["Operation"], summary="Is the process alive?")
    async def health() -> protocol.HealthAnswer:
        """Say ok unless the engine failed, is stuck or fails at everything; restart the process then."""
        if state.service.failed.is_set():
            raise ApiError(503, "The engine failed; the server's log says why.", code="engine_failed")
        if state.service.step_s > STALLED_S:
            raise ApiError(503, f"The engine's step takes more than {STALLED_S:g} s.", code="engine_stalled")
        if state.service.failures_in_a_row >= FAILURES:
            message = f"The last {state.service.failures_in_a_row} requests failed; the server's log says why."
            raise ApiError(503, message, code="engine_failing")
        return protocol.HealthAnswer(status="ok")

    @app.get("/ready", responses=unavailable, tags=["Operation"], summary="Should requests be sent here?")
    async def ready() -> protocol.HealthAnswer:
        """Say ready after warm-up and until the server begins to shut down."""
        await health()
        if not state.is_ready:
            raise ApiError(503, "The server is warming up or shutting down.", code="not_ready")
        return protocol.HealthAnswer(status="ready")

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        tags=["Operation"],
        summary="Prometheus metrics",
    )
    async def metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        try:
            stats = await state.service.stats()
        except ServiceStopped:
            stats = None
        return Response(state.metrics.render(stats), media_type=METRICS_TYPE)


def _add_pages(app: FastAPI) -> None:
    folder = importlib.resources.files("megamoe.server") / "page"
    for path, name in (("/", "index.html"), ("/docs", "docs.html")):
        html = (folder / name).read_text(encoding="utf-8")
        app.add_api_route(path, _page(html), include_in_schema=False, methods=["GET"])


def _page(html: str) -> Callable[[], Awaitable[Response]]:
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    async def page() -> Response:
        return HTMLResponse(html, headers=headers)

    return page


def _policy(html: str) -> str:
    """Return a policy that allows the page's own script and style, by their digests, and no other."""

    def digests(tag: str) -> str:
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        hashed = [base64.b64encode(hashlib.sha256(one.encode("utf-8")).digest()).decode("ascii") for one in contents]
        return " ".join(f"'sha256-{one}'" for one in hashed)

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _add_errors(app: FastAPI) -> None:
    """Whatever goes wrong is told in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        messages = {
            404: f"There is nothing at {request.url.path[:200]!r}; see /docs.",
            405: f"{request.method} is not allowed at {request.url.path[:200]!r}; see /docs.",
        }
        message = messages.get(error.status_code, str(error.detail))
        codes = {404: "not_found", 405: "method_not_allowed"}
        return ApiError(
            error.status_code, message, code=codes.get(error.status_code), headers=dict(error.headers or {})
        ).response()

    @app.exception_handler(500)
    async def defect(request: Request, error: Exception) -> Response:
        return ApiError(500, "The server failed at this request; its log says why.", code="internal_error").response()
