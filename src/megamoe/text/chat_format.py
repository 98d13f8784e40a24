# SPDX-License-Identifier: Apache-2.0
"""How a model is spoken to: conversations → token ids, answer ids → events.

    chat = ChatFormat.for_model(tokenizer, model.config)
    prompt = chat.encode(read_messages(request["messages"]), thinking=True)
    parser = chat.parser(thinking=prompt.thinking, stops=request["stop"])
    for ids in generated: events += parser.feed(ids)
    events += parser.finish()

Which format a model has depends on its tokenizer alone. If it has DeepSeek-V4's control tokens the format is
"deepseek-v4"; if it has none of the role tokens it is "plain", a transcript in words for models that were never taught
a format; anything between is refused. `ChatFormat.name` says which one it is, for the server to show.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from megamoe.models.deepseek_v4.chat import (
    CONTROL_TOKENS,
    EFFORT_PREFIXES,
    AnswerParser,
    AssistantMessage,
    ContentDelta,
    Control,
    DeveloperMessage,
    Event,
    Fault,
    LatestReminder,
    Malformed,
    Mended,
    Message,
    ReasoningDelta,
    Release,
    Slip,
    SystemMessage,
    Tool,
    ToolCall,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    ToolResult,
    UserMessage,
    encode,
    read_messages,
    read_tools,
)
from megamoe.models.deepseek_v4.chat.protocol import ASSISTANT, DSML, EOS, THINK_END, USER
from megamoe.text.detokenizer import Detokenizer
from megamoe.text.stop import StopMatcher
from megamoe.text.tokenizer import Tokenizer

__all__ = [  # messages and events besides the formats: whoever stands above text imports them from here
    "DSML",
    "THINK_END",
    "AnswerStream",
    "AssistantMessage",
    "ChatConfig",
    "ChatFormat",
    "ContentDelta",
    "DeepSeekV4Format",
    "DeveloperMessage",
    "EncodedPrompt",
    "Event",
    "Fault",
    "LatestReminder",
    "Malformed",
    "Mended",
    "Message",
    "PlainFormat",
    "ReasoningDelta",
    "Release",
    "Slip",
    "SystemMessage",
    "Tool",
    "ToolCall",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
    "ToolResult",
    "UserMessage",
    "read_messages",
    "read_tools",
]


class ChatConfig(Protocol):
    """What a chat format needs of a model's configuration."""

    @property
    def bos_token_id(self) -> int | None:
        """The id every sequence starts with, if the model has one."""
        ...

    @property
    def chat_release(self) -> str:
        """Which release's effort tiers it was trained with: "preview" or "0731"."""
        ...


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A conversation as the model reads it.

    Attributes:
        ids: the token ids, BOS included.
        text: the same to be looked at (without BOS if that is no part of the format); text that spells a control
            token looks like one here.
        thinking: the answer begins with reasoning: what to pass to `ChatFormat.parser`.
    """

    ids: list[int]
    text: str
    thinking: bool


class ChatFormat(abc.ABC):
    """A way of writing conversations.

    Attributes:
        name: "deepseek-v4" or "plain".
        efforts: the effort tiers, the default one first; empty if there is no thinking.
        has_tools: tools and tool calls can be expressed.
        stops: stop strings that belong to the format and end an answer besides the request's own.
    """

    name: str
    efforts: tuple[str, ...] = ()
    has_tools: bool = False
    stops: tuple[str, ...] = ()

    @staticmethod
    def for_model(tokenizer: Tokenizer, config: ChatConfig, *, release: str | None = None) -> ChatFormat:
        """Return the format a model's tokenizer calls for.

        Args:
            tokenizer: the model's.
            config: the model's.
            release: "preview" or "0731", instead of what the config says (a conversion may have lost the keys).

        Raises:
            ValueError: the tokenizer has a part of DeepSeek-V4's control tokens, or an unknown release.
        """
        known = [one.value for one in Release]
        chosen = config.chat_release if release is None else release
        if chosen not in known:
            raise ValueError(f"chat: unknown release {chosen!r}; allowed are {', '.join(known)}.")
        added = tokenizer.added_ids
        missing = [token for token in CONTROL_TOKENS if token not in added]
        if not missing:
            return DeepSeekV4Format(tokenizer, Release(chosen))
        if USER in added or ASSISTANT in added:
            raise ValueError(
                f"chat: {tokenizer.path} has a part of DeepSeek-V4's control tokens; missing are {', '.join(missing)}. "
                "Use the tokenizer.json that belongs to the weights."
            )
        return PlainFormat(tokenizer, config.bos_token_id)

    @property
    def has_thinking(self) -> bool:
        """Whether the model can be asked to reason first."""
        return bool(self.efforts)

    @abc.abstractmethod
    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        thinking: bool = False,
        effort: str | None = None,
        response_format: Mapping[str, Any] | None = None,
    ) -> EncodedPrompt:
        """Encode a conversation for the model to continue.

        Args:
            messages: the conversation; the last one is not a finished answer.
            tools: what the model may call.
            thinking: reason first.
            effort: a tier of `efforts`; None is the default one. Only with `thinking`.
            response_format: a JSON schema to show the model.

        Raises:
            ValueError: something does not fit together, or the format has no way of saying it; names the message.
        """

    @abc.abstractmethod
    def parser(
        self,
        *,
        thinking: bool,
        tools: Sequence[Tool] = (),
        stops: Iterable[str] = (),
        include_stop_str: bool = False,
        min_tokens: int = 0,
    ) -> AnswerStream:
        """Return a parser for one answer.

        Args:
            thinking: `EncodedPrompt.thinking` of its prompt.
            tools: what the model was shown; their schemas say what a call does not say of its parameters.
            stops: the request's stop strings; they end the content, and are looked for nowhere else.
            include_stop_str: the content ends with the stop string of the request that was found, instead of before
                it.
            min_tokens: content of this many first tokens is not searched for stop strings.

        Raises:
            TypeError, ValueError: unusable stop strings.
        """


class AnswerReader(Protocol):
    """What AnswerStream drives: text and control tokens in, events out."""

    def text(self, text: str) -> list[Event]:
        """Read ordinary characters."""
        ...

    def control(self, token: str) -> list[Event]:
        """Read a control token."""
        ...

    def finish(self) -> list[Event]:
        """End the answer."""
        ...

    @property
    def withheld(self) -> str:
        """What Malformed events reported."""
        ...


class AnswerStream:
    """Token ids of one answer → events, up to a stop string in its content.

    Attributes:
        num_tokens: how many tokens were read, up to the one that completed the stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        reader: AnswerReader,
        controls: Mapping[int, str],
        stops: StopMatcher,
        *,
        min_tokens: int = 0,
        strip_start: bool = False,
    ) -> None:
        """Begin before the first token.

        Args:
            tokenizer: the model's.
            reader: gets text and control tokens.
            controls: id → text of the tokens that are control tokens; all others are text.
            stops: gets the content.
            min_tokens: content of this many first tokens is not searched for stop strings.
            strip_start: white space at the start of the content is not part of it.
        """
        self.num_tokens = 0
        self._detokenizer = Detokenizer(tokenizer)
        self._reader = reader
        self._controls = controls
        self._stops = stops
        self._min_tokens = min_tokens
        self._strip_start = strip_start

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the answer, or None."""
        return self._stops.matched

    @property
    def withheld(self) -> str:
        """Everything that Malformed events reported, as text, to be logged."""
        return self._reader.withheld

    def feed(self, token_ids: Sequence[int]) -> list[Event]:
        """Read tokens and return what is certain; nothing is read beyond a stop string."""
        events: list[Event] = []
        for token_id in token_ids:
            if self._stops.matched is not None:
                break
            self.num_tokens += 1
            control = self._controls.get(token_id)
            if control is None:
                read = self._reader.text(self._detokenizer.add(token_id))
            else:  # a control token ends the text: bytes before it become no character with bytes after it
                read = self._reader.text(self._detokenizer.finish()) + self._reader.control(control)
            events += self._stopped(read)
        return events

    def finish(self) -> list[Event]:
        """End the answer and return what was held; nothing after a stop string."""
        if self._stops.matched is not None:
            return []
        events = self._stopped(self._reader.text(self._detokenizer.finish()) + self._reader.finish())
        return events + self._content(self._stops.finish())

    def _content(self, text: str) -> list[Event]:
        if self._strip_start:
            text = text.lstrip()
            self._strip_start = not text
        return [ContentDelta(text)] if text else []

    def _stopped(self, read: Iterable[Event]) -> list[Event]:
        """Return the events with their content up to a stop string."""
        events: list[Event] = []
        for event in read:
            if isinstance(event, ContentDelta):
                events += self._content(self._stops.feed(event.text, may_stop=self.num_tokens > self._min_tokens))
                if self._stops.matched is not None:
                    break
                continue
            if isinstance(event, ToolCallStart):  # content before a call cannot go on
                events += self._content(self._stops.finish())
            events.append(event)
        return events


class DeepSeekV4Format(ChatFormat):
    """DeepSeek-V4's own encoding, see megamoe.models.deepseek_v4.chat."""

    name = "deepseek-v4"
    has_tools = True

    def __init__(self, tokenizer: Tokenizer, release: Release) -> None:
        """Take a tokenizer that has every control token."""
        self.release = release
        self.efforts = tuple(EFFORT_PREFIXES[release])
        self._tokenizer = tokenizer
        self._ids = tokenizer.added_ids
        self._controls = {token_id: token for token, token_id in self._ids.items()}

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        thinking: bool = False,
        effort: str | None = None,
        response_format: Mapping[str, Any] | None = None,
    ) -> EncodedPrompt:
        """Encode a conversation, see ChatFormat."""
        prompt = encode(
            messages,
            release=self.release,
            thinking=thinking,
            effort=effort,
            tools=tools,
            response_format=response_format,
        )
        if prompt.pieces[-1] == Control(EOS):
            raise ValueError(
                'chat: the last message is a finished answer. Add a user message, or say "prefix": true in it for an '
                "answer that goes on with it."
            )
        ids: list[int] = []
        for piece in prompt.pieces:
            ids += self._tokenizer.encode_text(piece) if isinstance(piece, str) else [self._ids[piece.token]]
        return EncodedPrompt(ids, prompt.text, prompt.thinking)

    def parser(
        self,
        *,
        thinking: bool,
        tools: Sequence[Tool] = (),
        stops: Iterable[str] = (),
        include_stop_str: bool = False,
        min_tokens: int = 0,
    ) -> AnswerStream:
        """Return a parser, see ChatFormat. Every added token of the tokenizer is a control token."""
        matcher = StopMatcher(stops, include_stop_str=include_stop_str)
        reader = AnswerParser(thinking=thinking, texts={tool.name: tool.text_parameters for tool in tools})
        return AnswerStream(self._tokenizer, reader, self._controls, matcher, min_tokens=min_tokens)


class PlainFormat(ChatFormat):
    """A transcript in words, for a tokenizer without role tokens:

        {system}

        User: {user}

        Assistant: {answer}

    The answer ends at EOS or where the model begins to write the user's next line. No thinking, no tools.
    """

    name = "plain"
    stops = ("\nUser:", "\nAssistant:")

    def __init__(self, tokenizer: Tokenizer, bos_token_id: int | None) -> None:
        """Take a tokenizer and the id that begins every prompt."""
        self._tokenizer = tokenizer
        self._bos_token_id = bos_token_id

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        thinking: bool = False,
        effort: str | None = None,
        response_format: Mapping[str, Any] | None = None,
    ) -> EncodedPrompt:
        """Encode a conversation, see ChatFormat."""
        for given, what in ((tools, "tools"), (thinking, "thinking"), (effort is not None, "effort")):
            if given:
                raise ValueError(f"chat: this model's format is plain text, which has no {what}. Leave {what} out.")
        if not messages:
            raise ValueError("chat: there are no messages. Pass at least one user message.")
        paragraphs = [self._paragraph(idx, message, len(messages)) for idx, message in enumerate(messages)]
        if response_format is not None:
            schema = json.dumps(dict(response_format), ensure_ascii=False)
            paragraphs.insert(0, f"Answers are JSON of this schema: {schema}")
        last = messages[-1]
        if not isinstance(last, AssistantMessage):
            paragraphs.append("Assistant:")
        text = "\n\n".join(filter(None, paragraphs))
        bos = [] if self._bos_token_id is None else [self._bos_token_id]
        return EncodedPrompt([*bos, *self._tokenizer.encode_text(text)], text, thinking=False)

    def _paragraph(self, idx: int, message: Message, num_messages: int) -> str:
        if isinstance(message, SystemMessage | DeveloperMessage):
            if message.tools or message.response_format is not None:
                raise ValueError(
                    f"chat: message {idx} has tools or a response format; this model's format is plain text, which has "
                    "neither in messages. Leave them out."
                )
            return message.content
        if isinstance(message, UserMessage) and message.task is None:
            return f"User: {message.content}"
        if isinstance(message, AssistantMessage) and not message.tool_calls:  # its reasoning is not shown again
            if message.is_open != (idx + 1 == num_messages):
                raise ValueError(
                    f"chat: message {idx} is {'open, but not' if message.is_open else 'a finished answer, and'} the "
                    'last. Only the last answer can be open ("prefix": true), and a finished one needs a user message '
                    "after it."
                )
            return f"Assistant: {message.content}"
        raise ValueError(
            f"chat: message {idx} is a {type(message).__name__} with what plain text cannot say (tools, tasks, "
            "reminders); this model's format has system, user and assistant messages only."
        )

    def parser(
        self,
        *,
        thinking: bool,
        tools: Sequence[Tool] = (),
        stops: Iterable[str] = (),
        include_stop_str: bool = False,
        min_tokens: int = 0,
    ) -> AnswerStream:
        """Return a parser, see ChatFormat. White space before the answer is not part of it."""
        if thinking:
            raise ValueError("chat: this model's format is plain text, which has no thinking. Leave thinking out.")
        matcher = StopMatcher(stops, include_stop_str=include_stop_str, hidden=self.stops)
        return AnswerStream(self._tokenizer, _PlainReader(), {}, matcher, min_tokens=min_tokens, strip_start=True)


class _PlainReader:
    """Content and nothing else."""

    withheld = ""

    def text(self, text: str) -> list[Event]:
        """Read ordinary characters."""
        return [ContentDelta(text)] if text else []

    def control(self, token: str) -> list[Event]:
        """Read a control token: it stands for nothing."""
        return []

    def finish(self) -> list[Event]:
        """End the answer: nothing is ever held."""
        return []
