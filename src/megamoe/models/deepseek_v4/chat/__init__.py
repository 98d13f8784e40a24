# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4's prompt protocol: messages → prompt, answer → events. Pure Python, no tensors; see docs/chat.md."""

from __future__ import annotations

from megamoe.models.deepseek_v4.chat.answer import (
    AnswerParser,
    ContentDelta,
    Event,
    Fault,
    Malformed,
    Mended,
    ReasoningDelta,
    Slip,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from megamoe.models.deepseek_v4.chat.encoding import Control, Piece, Prompt, encode, encode_calls
from megamoe.models.deepseek_v4.chat.messages import (
    AssistantMessage,
    DeveloperMessage,
    LatestReminder,
    Message,
    SystemMessage,
    Tool,
    ToolCall,
    ToolResult,
    UserMessage,
    read_messages,
    read_tools,
)
from megamoe.models.deepseek_v4.chat.protocol import CONTROL_TOKENS, EFFORT_PREFIXES, Release, Task

__all__ = [
    "CONTROL_TOKENS",
    "EFFORT_PREFIXES",
    "AnswerParser",
    "AssistantMessage",
    "ContentDelta",
    "Control",
    "DeveloperMessage",
    "Event",
    "Fault",
    "LatestReminder",
    "Malformed",
    "Mended",
    "Message",
    "Piece",
    "Prompt",
    "ReasoningDelta",
    "Release",
    "Slip",
    "SystemMessage",
    "Task",
    "Tool",
    "ToolCall",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
    "ToolResult",
    "UserMessage",
    "encode",
    "encode_calls",
    "read_messages",
    "read_tools",
]
