# SPDX-License-Identifier: Apache-2.0
"""The fixed strings of DeepSeek-V4's prompt protocol: what the model was trained to read and write.

Every string here is data that has to match the released encoder byte for byte; the model's behaviour depends on it.
Source: `encoding/encoding_dsv4.py` of the DeepSeek-V4 releases (MIT licence, Copyright (c) DeepSeek): the preview
releases of April 2026 for the shared strings, 0731 for its effort table. Nothing else comes from there.
"""

from __future__ import annotations

import enum
from typing import Final, Literal, get_args

BOS: Final = "<｜begin▁of▁sentence｜>"
EOS: Final = "<｜end▁of▁sentence｜>"
USER: Final = "<｜User｜>"
ASSISTANT: Final = "<｜Assistant｜>"
LATEST_REMINDER: Final = "<｜latest_reminder｜>"
THINK_START: Final = "<think>"
THINK_END: Final = "</think>"
DSML: Final = "｜DSML｜"

Task = Literal["action", "query", "authority", "domain", "title", "read_url"]
TASKS: Final[tuple[Task, ...]] = get_args(Task)
TASK_TOKENS: Final[dict[Task, str]] = {task: f"<｜{task}｜>" for task in TASKS}

# All control tokens of the protocol; a tokenizer must have every one for this encoding to be used.
CONTROL_TOKENS: Final = (
    BOS,
    EOS,
    USER,
    ASSISTANT,
    LATEST_REMINDER,
    THINK_START,
    THINK_END,
    DSML,
    *TASK_TOKENS.values(),
)


class Release(enum.Enum):
    """Which effort table a checkpoint was trained with; everything else is the same."""

    PREVIEW = "preview"  # DeepSeek-V4-Flash and -Pro of April 2026, one MTP layer
    JULY = "0731"  # DeepSeek-V4-Flash-0731 and -Pro-0813, DSpark draft stages


_EFFORT_ABSOLUTE_MAXIMUM: Final = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
_EFFORT_BEYOND_MAXIMUM: Final = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the "
    "problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying "
    "cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain "
    "that no assumption remains unchecked and no error remains undiscovered.\n\n"
)
# Tier → text put before everything else in thinking mode. The first tier of a release is its default.
EFFORT_PREFIXES: Final[dict[Release, dict[str, str]]] = {
    Release.PREVIEW: {"high": "", "max": _EFFORT_ABSOLUTE_MAXIMUM},
    Release.JULY: {"low": "", "high": _EFFORT_ABSOLUTE_MAXIMUM, "max": _EFFORT_BEYOND_MAXIMUM},
}

RESPONSE_FORMAT: Final = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{schema}"

# Control tokens inside the text are the tokens themselves, as the released encoder's string is tokenized.
TOOLS: Final = """## Tools

You have access to a set of tools to help answer the user's question. \
You can invoke tools by writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. \
For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), \
you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

{schemas}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
