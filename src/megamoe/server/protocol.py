# SPDX-License-Identifier: Apache-2.0
"""OpenAI's request and response types, as far as they mean something here, and our extensions.

Every type refuses fields it does not know, unless they say nothing: null, or a value of the table OFF that means that
the feature is not wanted. A field of OpenAI's that is listed but does nothing says so; one that would change the answer
and is not implemented is not listed. Types are strict: "5" is no number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from megamoe.engine.sampling_params import MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20


def _integral(value: Any) -> Any:
    """Return 5 for 5.0: JSON has one kind of number, and both are its integer 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _off_if_false(value: Any) -> Any:
    """Return None for false: a number says how many, and false asks for none."""
    return None if value is False else value


def _not_stored(value: bool) -> bool:
    if value:
        raise ValueError("must be false: nothing is stored here")
    return value


# Not Literal[False]: 0 would pass, being equal to it.
NotStored: TypeAlias = Annotated[bool, AfterValidator(_not_stored), WithJsonSchema({"type": "boolean", "const": False})]
Int: TypeAlias = Annotated[int, BeforeValidator(_integral)]
Count: TypeAlias = Annotated[Int, Field(ge=1, le=2**31 - 1)]
TokenId: TypeAlias = Annotated[Int, Field(ge=0, le=2**31 - 1)]
Name: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
NumLogprobs: TypeAlias = Annotated[
    Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None,
    BeforeValidator(_off_if_false),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0, "maximum": 20}, {"const": False}, {"type": "null"}]}),
]
# What clients send back with a conversation and no prompt shows.
Ignored: TypeAlias = Annotated[Any, Field(description="Accepted and without effect.")]
StopString: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


# Fields of other servers and of the other API, with the values that ask for nothing. Others are refused by name.
OFF: Final[dict[str, tuple[Any, ...]]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "dry_multiplier": (0,),
    "early_stopping": (False,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logprobs": (False,),
    "mirostat": (0,),
    "mm_processor_kwargs": ({},),
    "n_probs": (0,),
    "no_repeat_ngram_size": (0,),
    "priority": (0,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "separate_reasoning": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stream_reasoning": (True,),
    "suffix": ("",),
    "tfs_z": (1,),
    "top_a": (0,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "xtc_probability": (0,),
}


def _is_off(name: str, value: Any, neutral: Mapping[str, tuple[Any, ...]]) -> bool:
    """Return whether an unknown field says nothing. True is not 1 here."""
    same = (one for one in neutral.get(name, ()) if isinstance(one, bool) == isinstance(value, bool))
    return value is None or any(one == value for one in same)


def _describe_off(schema: dict[str, Any], kind: type[BaseModel]) -> None:
    """Say in the API's description which unknown fields are accepted."""
    schema["additionalProperties"] = {"type": "null"}
    for name, values in kind.off.items():  # type: ignore[attr-defined]
        if name not in kind.model_fields:
            description = "Accepted where it asks for nothing."
            schema["properties"][name] = {"enum": [*values, None], "description": description}


class Strict(BaseModel):
    """A part of a request.

    Attributes:
        off: unknown fields with the values that mean nothing.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True, json_schema_extra=_describe_off
    )
    off: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, fields: Any) -> Any:
        """Leave out unknown fields that say nothing, so that all others can be refused by their names."""
        if not isinstance(fields, dict):
            return fields
        known = {name for field, info in cls.model_fields.items() for name in (field, info.alias)}
        return {name: one for name, one in fields.items() if name in known or not _is_off(name, one, cls.off)}


class Answer(BaseModel):
    """A part of a response; only what was set is sent, None included."""

    model_config = ConfigDict(extra="forbid")


# requests


class StreamOptions(Strict):
    """How to stream."""

    include_usage: bool = Field(False, description="End with a chunk that has no choices and the usage.")
    continuous_usage_stats: bool = Field(False, description="Extension: every chunk has the usage so far.")
    include_obfuscation: bool = Field(False, description="Accepted and without effect: nothing is padded here.")


class Sampling(Strict):
    """What both APIs share: sampling, limits, and fields that identify a caller."""

    off = OFF

    model: Annotated[str, StringConstraints(min_length=1, max_length=512)] = Field(description="As in /v1/models.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy. Default 1.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Int | None = Field(
        None, ge=-1, le=2**31 - 1, description="Extension: keep this many tokens; 0 and -1 keep all."
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="Extension: keep tokens at least this probable, relative to the most probable."
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="Extension: 1 is none.")
    logit_bias: dict[Annotated[str, StringConstraints(pattern=r"^\d{1,9}$")], float] | None = Field(
        None, max_length=MAX_LOGIT_BIASES, description="Token id to a number from -100 to 100."
    )
    seed: Int | None = Field(None, description="Choice i of n draws with seed + i, modulo 2**63.")
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="Ends the answer before the first of these; matched in the model's raw text."
    )
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS, description="Extension.")
    ignore_eos: bool | None = Field(None, description="Extension: go on until a limit or another stop.")
    min_tokens: Int | None = Field(None, ge=0, le=2**31 - 1, description="Extension: no end before this many tokens.")
    n: Int | None = Field(None, ge=1, le=128, description="Choices per prompt.")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    user: str | None = Field(None, description="Accepted and without effect, like the three below.")
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = Field(None, description="There is one tier.")
    store: NotStored | None = Field(None, description="Nothing is stored.")


class TextPart(Strict):
    """Text in a message."""

    type: Literal["text"]
    text: str
    cache_control: Ignored = None
    prompt_cache_breakpoint: Ignored = None

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, fields: Any) -> Any:
        """Say what an image, a sound or a file is refused for: not the field it comes in."""
        kind = fields.get("type") if isinstance(fields, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError(
                "not_text", "this model reads text only; got a part of type {kind}", {"kind": kind}
            )
        return fields


Content: TypeAlias = str | Annotated[list[TextPart], Field(min_length=1)]


class SystemMessage(Strict):
    """Instructions."""

    role: Literal["system"]
    content: Content
    name: Ignored = None


class DeveloperMessage(Strict):
    """Instructions of a developer."""

    role: Literal["developer"]
    content: Content
    name: Ignored = None


class UserMessage(Strict):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: Ignored = None


class CalledFunction(Strict):
    """A function the model called. Its name is what the model wrote, which need not be one of a tool."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    arguments: str | None = Field(
        None, description="A JSON object. Empty and null are none; JSON that was cut off is closed where it ends."
    )
    parsed_arguments: Ignored = None


class CalledTool(Strict):
    """A tool call of an earlier turn."""

    id: str
    type: Literal["function"] | None = "function"
    function: CalledFunction
    index: Ignored = None


class AssistantMessage(Strict):
    """What the model said in an earlier turn, as it was answered."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[CalledTool], Field(max_length=128)] | None = None
    prefix: bool | None = Field(None, description="Extension: the answer goes on after this last message.")
    refusal: None = None
    audio: None = None
    function_call: None = None
    name: Ignored = None
    annotations: Ignored = None
    parsed: Ignored = None
    malformed_calls: Ignored = None


class ToolMessage(Strict):
    """What a tool returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: Ignored = None


Message: TypeAlias = Annotated[
    SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(Strict):
    """A function the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of an object.")
    strict: bool | None = Field(None, description="Make the arguments obey the schema.")


class Tool(Strict):
    """A tool."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """A function by name."""

    name: Name


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """A JSON object."""

    type: Literal["json_object"]


class JsonSchema(Strict):
    """A schema with a name."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, populate_by_name=True, json_schema_extra=_describe_off
    )

    name: Name
    schema_: dict[str, Any] = Field(alias="schema", description="JSON schema; what cannot be enforced is refused.")
    description: str | None = None
    strict: bool | None = Field(None, description="The schema is enforced either way.")


class JsonSchemaFormat(Strict):
    """JSON that obeys a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class Thinking(Strict):
    """DeepSeek's switch for thinking before the answer."""

    type: Literal["enabled", "disabled"]


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = Field(None, description="Older name of max_completion_tokens.")
    logprobs: bool | None = None
    top_logprobs: Int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="Only with logprobs.")
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="False ends the answer after the first call.")
    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    thinking: Thinking | None = Field(None, description="Extension: think before answering.")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="Anything but none switches thinking on."
    )
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None


class CompletionRequest(Sampling):
    """Body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    ) = Field(description="One text or several, or their token ids. BOS is put before a text, not before ids.")
    max_tokens: Count | None = Field(None, description="Default 16.")
    logprobs: NumLogprobs = None
    echo: bool | None = Field(None, description="Put the prompt before the completion; not with logprobs.")
    best_of: Int | None = Field(None, ge=1, le=128, description="Only equal to n.")


# responses


class ErrorBody(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """Any answer that is not 2xx."""

    error: ErrorBody


class PromptDetails(Answer):
    """Of the prompt's tokens."""

    cached_tokens: int


class CompletionDetails(Answer):
    """Of the completion's tokens."""

    reasoning_tokens: int


class Usage(Answer):
    """Tokens counted; a prompt counts once, whatever n is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TopLogprob(Answer):
    """A token that could have come, with ln of its probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """One entry per generated token, those of reasoning and markup included."""

    content: list[TokenLogprob] | None
    refusal: None


class FunctionCall(Answer):
    """A call."""

    name: str
    arguments: str


class ToolCall(Answer):
    """A call with its id."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class MalformedCall(Answer):
    """What a model wrote where a tool call should be, and why it could not be read as one."""

    text: str
    reason: str


class ChatMessage(Answer):
    """The model's answer."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: None


class ChatChoice(Answer):
    """One of n answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    malformed_calls: list[MalformedCall] | None = None


class ChatAnswer(Answer):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class FunctionCallDelta(Answer):
    """A part of a call."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Answer):
    """A part of a call; the first of a call has id, type and name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta


class ChatDelta(Answer):
    """What is new."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    malformed_calls: list[MalformedCall] | None = None


class ChatChunkChoice(Answer):
    """What is new in one choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatChunk(Answer):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str


class CompletionLogprobs(Answer):
    """Parallel lists, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(Answer):
    """One completion, or what is new in it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionAnswer(Answer):
    """Answer of POST /v1/completions, and each of its streamed events."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str


class ModelCard(Answer):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    recipe: str


class ModelList(Answer):
    """Answer of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class HealthAnswer(Answer):
    """Answer of GET /health and /ready."""

    status: Literal["ok", "ready"]
