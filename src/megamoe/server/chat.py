# SPDX-License-Identifier: Apache-2.0
"""POST /v1/chat/completions: a conversation in, the next answer out, with reasoning and tool calls told apart."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from megamoe.engine.outputs import TokenLogprobs
from megamoe.server.completions import StreamUsage, token_text, usage
from megamoe.server.errors import ApiError
from megamoe.server.generation import Generation
from megamoe.server.prepare import (
    check_common,
    check_model,
    max_new_tokens,
    num_choices,
    sampling_params,
    stop_strings,
)
from megamoe.server.protocol import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    FunctionCall,
    FunctionCallDelta,
    JsonObjectFormat,
    JsonSchemaFormat,
    MalformedCall,
    NamedTool,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from megamoe.server.settings import ServerSettings
from megamoe.text.chat_format import (
    DSML,
    THINK_END,
    ChatFormat,
    ContentDelta,
    Event,
    Fault,
    Malformed,
    Mended,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    read_messages,
    read_tools,
)
from megamoe.text.grammar import CallableTool, Grammar, GrammarCompiler, json_rules, tool_call_rules
from megamoe.text.prompts import PromptEncoder
from megamoe.text.schema import SchemaError, checked
from megamoe.text.service import Piece, Request
from megamoe.text.tokenizer import Tokenizer

IGNORED = ("name", "annotations", "parsed", "malformed_calls")  # of messages: no prompt shows them


class Chat:
    """One request to /v1/chat/completions, checked and tokenized."""

    def __init__(
        self,
        request: ChatRequest,
        encoder: PromptEncoder,
        chat_format: ChatFormat,
        grammars: Callable[[], GrammarCompiler],
        settings: ServerSettings,
        fingerprint: str,
    ) -> None:
        """Check, tokenize and compile a grammar if one is asked for; may take a while.

        Raises:
            ApiError: naming the field that cannot be served.
        """
        check_model(request, settings)
        check_common(request)
        if request.top_logprobs and not request.logprobs:
            raise _refused("top_logprobs needs 'logprobs': true.", "top_logprobs")
        self._n = num_choices(request, 1, settings)
        self._request = request
        self._tokenizer = encoder.tokenizer
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": settings.model_name,
            "system_fingerprint": fingerprint,
        }
        tools = _tools(request)
        thinking, effort = _thinking(request, chat_format, settings)
        schema = _schema(request)
        try:
            shown = read_tools([tool.model_dump(exclude_unset=True) for tool in tools])
        except ValueError as error:
            raise _refused(str(error), "tools") from error
        try:
            prompt = chat_format.encode(
                read_messages([_message(message) for message in request.messages]),
                tools=shown,
                thinking=thinking,
                effort=effort,
                response_format=schema,
            )
        except ValueError as error:
            raise _refused(str(error), "messages") from error
        self._num_prompt = len(prompt.ids)
        self._think_end = encoder.tokenizer.added_ids.get(THINK_END) if prompt.thinking else None
        if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
            raise _refused("max_tokens and max_completion_tokens differ. Send the second only.", "max_tokens")
        asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        limit = max_new_tokens(asked, None, self._num_prompt, settings, prompt_param="messages")
        grammar = _grammar(request, tools, schema, encoder.tokenizer, self._think_end, grammars)
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        self.requests: list[Request[list[Event]]] = []
        for choice in range(self._n):
            reader = chat_format.parser(
                thinking=prompt.thinking, tools=shown, stops=stop_strings(request), min_tokens=request.min_tokens or 0
            )
            self.requests.append(
                Request(
                    prompt.ids,
                    sampling_params(
                        request, max_tokens=limit, logprobs=logprobs, choice=choice, vocab_size=encoder.vocab_size
                    ),
                    reader,
                    logits_filter=None if grammar is None else grammar.filter(),
                    timeout_s=settings.request_timeout_s,
                )
            )

    async def answer(self, generation: Generation[list[Event]]) -> dict[str, Any]:
        """Return the whole answer."""
        choices = self._choices(generation)
        async for idx, piece in generation.pieces():
            choices[idx].read(piece)
        answer = ChatAnswer(
            **self._head,
            object="chat.completion",
            choices=[choice.whole() for choice in choices],
            usage=self._usage(generation, choices),
        )
        return answer.model_dump(mode="json", exclude_unset=True)

    async def events(self, generation: Generation[list[Event]]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the answer's chunks."""
        choices = self._choices(generation)
        stats = StreamUsage(self._request.stream_options, lambda: self._usage(generation, choices))
        for choice in choices:
            yield self._chunk([choice.chunk(ChatDelta(role="assistant", content=""))], stats.of_chunk())
        pieces = generation.pieces()
        try:
            async for idx, piece in pieces:
                for chunk in choices[idx].read(piece):
                    yield self._chunk([chunk], stats.of_chunk())
        finally:
            await pieces.aclose()
        if stats.ends_with_usage:
            yield self._chunk([], {"usage": self._usage(generation, choices)})

    def _chunk(self, choices: list[ChatChunkChoice], usage: dict[str, Any]) -> dict[str, Any]:
        chunk = ChatChunk(**self._head, object="chat.completion.chunk", choices=choices, **usage)
        return chunk.model_dump(mode="json", exclude_unset=True)

    def _choices(self, generation: Generation[list[Event]]) -> list[_Choice]:
        wants_logprobs = bool(self._request.logprobs)
        return [
            _Choice(idx, self._tokenizer, self._think_end, wants_logprobs, generation.report) for idx in range(self._n)
        ]

    def _usage(self, generation: Generation[list[Event]], choices: Sequence[_Choice]) -> Usage:
        reasoning = sum(choice.num_reasoning for choice in choices)
        return usage(self._num_prompt, sum(generation.num_tokens), generation.cached_tokens, reasoning)


# from the request


def _refused(message: str, param: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


def _message(message: Any) -> dict[str, Any]:
    """Return a message as the chat format reads it: what OpenAI calls developer is V4's system."""
    fields: dict[str, Any] = message.model_dump(exclude_none=True)
    for name in IGNORED:
        fields.pop(name, None)
    for call in fields.get("tool_calls", ()):
        call.pop("index", None)
        call["function"].pop("parsed_arguments", None)
    if fields["role"] == "developer":
        fields["role"] = "system"
    return fields


def _tools(request: ChatRequest) -> tuple[Tool, ...]:
    """Return the tools the model is shown."""
    tools = tuple(request.tools or ())
    choice = request.tool_choice
    if choice is not None and not tools:
        if choice in ("none", "auto"):
            return ()
        raise _refused("tool_choice needs tools.", "tool_choice")
    if isinstance(choice, NamedTool) and choice.function.name not in {tool.function.name for tool in tools}:
        raise _refused(f"tool_choice names {choice.function.name!r}, which is not among the tools.", "tool_choice")
    return () if choice == "none" else tools


def _thinking(request: ChatRequest, chat_format: ChatFormat, settings: ServerSettings) -> tuple[bool, str | None]:
    """Return whether to think and the format's effort tier."""
    effort = request.reasoning_effort
    if request.thinking is None and effort is None:
        return settings.thinking and chat_format.has_thinking, None
    is_on = effort != "none" if request.thinking is None else request.thinking.type == "enabled"
    if effort is not None and is_on != (effort != "none"):
        raise _refused("thinking and reasoning_effort contradict each other. Send one of them.", "reasoning_effort")
    if is_on and not chat_format.has_thinking:
        raise _refused(
            f"The chat format of this model, {chat_format.name!r}, has no thinking. Leave it out.",
            "reasoning_effort" if request.thinking is None else "thinking",
        )
    tiers = {"high": "high", "xhigh": "max", "max": "max"}  # what is less than high is the default tier
    tier = tiers.get(effort or "")
    return is_on, tier if is_on and tier in chat_format.efforts else None


def _schema(request: ChatRequest) -> Mapping[str, Any] | None:
    """Return the JSON schema of the answer, or None for text."""
    if isinstance(request.response_format, JsonObjectFormat):
        return {"type": "object"}
    if isinstance(request.response_format, JsonSchemaFormat):
        return request.response_format.json_schema.schema_
    return None


def _grammar(
    request: ChatRequest,
    tools: Sequence[Tool],
    schema: Mapping[str, Any] | None,
    tokenizer: Tokenizer,
    think_end: int | None,
    grammars: Callable[[], GrammarCompiler],
) -> Grammar | None:
    """Return the grammar the answer must follow, or None for any text."""
    is_forced = request.tool_choice == "required" or isinstance(request.tool_choice, NamedTool)
    is_single = request.parallel_tool_calls is False or isinstance(request.tool_choice, NamedTool)
    is_bound = is_forced or (bool(tools) and is_single) or any(tool.function.strict for tool in tools)
    if schema is None and not is_bound:
        return None
    if request.ignore_eos or request.min_tokens:
        raise _refused(
            "ignore_eos and min_tokens cannot be combined with response_format or bound tool calls, whose grammar says "
            "where the answer ends. Leave them out.",
            "ignore_eos" if request.ignore_eos else "min_tokens",
        )
    if schema is not None:
        schema = _checked(schema, "response_format.json_schema.schema")
    try:
        if schema is not None and not tools:
            return grammars().compile(json_rules(schema, after=think_end))
        named = request.tool_choice.function.name if isinstance(request.tool_choice, NamedTool) else None
        callable_ = []
        for idx, tool in enumerate(tools):
            if named not in (None, tool.function.name):
                continue
            parameters: Mapping[str, Any] | None = tool.function.parameters
            is_strict = is_forced if tool.function.strict is None else tool.function.strict
            if is_strict and parameters is not None:
                parameters = _checked(parameters, f"tools.{idx}.function.parameters")
            callable_.append(CallableTool(tool.function.name, parameters, is_strict=is_strict))
        dsml = tokenizer.added_ids[DSML]
        rules = tool_call_rules(
            callable_, dsml, after=think_end, is_forced=is_forced, is_single=is_single, schema=schema
        )
        return grammars().compile(rules)
    except ValueError as error:
        raise _refused(str(error), "tools" if tools else "response_format") from error


def _checked(schema: Mapping[str, Any], param: str) -> Mapping[str, Any]:
    """Return a schema that a grammar can be made of, or name the place in it that is wrong."""
    try:
        result: Mapping[str, Any] = checked(schema)
    except SchemaError as error:
        raise _refused(str(error), f"{param}.{error.place}" if error.place else param) from error
    return result


# to the answer


@dataclasses.dataclass
class _Call:
    """A tool call as far as it has come."""

    id: str
    name: str
    arguments: str = ""


class _Choice:
    """One answer as far as it has come.

    Attributes:
        num_reasoning: tokens up to the end of thinking.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        think_end: int | None,
        wants_logprobs: bool,
        report: Callable[[Malformed | Mended], None],
    ) -> None:
        self.num_reasoning = 0
        self._index = index
        self._tokenizer = tokenizer
        self._think_end = think_end
        self._logprobs: list[TokenLogprob] | None = [] if wants_logprobs else None
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[_Call] = []
        self._malformed: list[MalformedCall] = []
        self._has_lost_calls = False
        self._report = report
        self._finish_reason: Any = None

    def read(self, piece: Piece[list[Event]]) -> list[ChatChunkChoice]:
        """Take in a piece and return the chunks it makes; the piece's logprobs are in the first of them."""
        for token_id in piece.token_ids:
            if self._think_end is not None:
                self.num_reasoning += 1
                if token_id == self._think_end:
                    self._think_end = None
        deltas = [delta for event in [*piece.read, *(piece.rest or [])] if (delta := self._delta(event)) is not None]
        new = None
        if self._logprobs is not None and piece.logprobs:
            new = [self._entry(one) for one in piece.logprobs]
            self._logprobs += new
        if piece.finish_reason is not None:
            self._finish_reason = piece.finish_reason
            if self._has_lost_calls:  # "stop" would say that the answer is complete, "tool_calls" that its calls are
                self._finish_reason = "length"
            elif piece.finish_reason == "stop" and self._calls:
                self._finish_reason = "tool_calls"
        if not deltas and (new or piece.finish_reason is not None):
            deltas = [ChatDelta()]
        if piece.finish_reason is not None and self._malformed:
            deltas[-1].malformed_calls = self._malformed
        chunks = [self.chunk(delta) for delta in deltas]
        if new:
            chunks[0].logprobs = ChatLogprobs(content=new, refusal=None)
        if self._finish_reason is not None:
            chunks[-1].finish_reason = self._finish_reason
        return chunks

    def chunk(self, delta: ChatDelta) -> ChatChunkChoice:
        """Return a chunk of this choice."""
        return ChatChunkChoice(index=self._index, delta=delta, logprobs=None, finish_reason=None)

    def whole(self) -> ChatChoice:
        """Return the complete choice: what its chunks add up to, calls that broke off included."""
        calls = [
            ToolCall(id=call.id, type="function", function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in self._calls
        ]
        content = "".join(self._content)
        message: dict[str, Any] = {"content": None if calls and not content else content}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if calls:
            message["tool_calls"] = calls
        return ChatChoice(
            index=self._index,
            message=ChatMessage(role="assistant", refusal=None, **message),
            logprobs=None if self._logprobs is None else ChatLogprobs(content=self._logprobs, refusal=None),
            finish_reason=self._finish_reason,
            **({"malformed_calls": self._malformed} if self._malformed else {}),
        )

    def _delta(self, event: Event) -> ChatDelta | None:
        match event:
            case ContentDelta():
                self._content.append(event.text)
                return ChatDelta(content=event.text)
            case ReasoningDelta():
                self._reasoning.append(event.text)
                return ChatDelta(reasoning_content=event.text)
            case ToolCallStart():
                call = _Call(f"call_{uuid.uuid4().hex[:24]}", event.name)
                self._calls.append(call)
                function = FunctionCallDelta(name=call.name, arguments="")
                start = ToolCallDelta(index=event.call_idx, id=call.id, type="function", function=function)
                return ChatDelta(tool_calls=[start])
            case ToolCallArguments():
                self._calls[event.call_idx].arguments += event.text
                more = ToolCallDelta(index=event.call_idx, function=FunctionCallDelta(arguments=event.text))
                return ChatDelta(tool_calls=[more])
            case ToolCallEnd():
                return None
            case Malformed():
                if event.fault is not Fault.STRAY_CONTROL:
                    self._malformed.append(MalformedCall(text=event.text, reason=event.fault.value))
                    self._report(event)
                self._has_lost_calls |= event.fault.loses_call
                return None
            case Mended():
                self._report(event)
                return None

    def _entry(self, one: TokenLogprobs) -> TokenLogprob:
        top = [TopLogprob(**self._token(token_id, logprob)) for token_id, logprob in one.top]
        return TokenLogprob(**self._token(one.token_id, one.logprob), top_logprobs=top)

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = token_text(self._tokenizer, token_id)
        return {"token": text, "logprob": logprob, "bytes": list(self._tokenizer.token_bytes(token_id)) or None}
