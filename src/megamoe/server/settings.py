# SPDX-License-Identifier: Apache-2.0
"""What the operator of a server sets beside the engine."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """Limits and names of a server.

    Attributes:
        model_name: what clients call the model.
        recipe: the recipe's name, shown to clients.
        context: most tokens of prompt and answer together.
        api_key: what clients must send, or None for an open server.
        max_body_bytes: largest request body; None for 1 MiB and 16 bytes for every token of the context.
        body_timeout_s: how long a body may take to arrive.
        max_prompt_tokens: longest prompt; None for what the context allows.
        max_tokens: most tokens one choice gets, whatever it asks for; None for what the context leaves.
        max_choices: most sequences one request may ask for (n times its prompts).
        max_open_requests: API requests that may be open at the same time, waiting and streaming ones included.
        request_timeout_s: longest time from arrival to the last token.
        shutdown_timeout_s: how long running requests may go on after a signal to stop.
        thinking: whether chat completions think when the request does not say.
    """

    model_name: str
    recipe: str
    context: int
    api_key: str | None = None
    max_body_bytes: int | None = None
    body_timeout_s: float = 30.0
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_choices: int = 16
    max_open_requests: int = 512
    request_timeout_s: float = 600.0
    shutdown_timeout_s: float = 30.0
    thinking: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: a number is out of its range, or the key is empty or no text a header can carry.
        """
        for field in ("max_body_bytes", "max_tokens", "max_choices", "max_open_requests", "context"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"server: {field} must be 1 or more; got {value}.")
        for field in ("body_timeout_s", "request_timeout_s"):
            if not getattr(self, field) > 0:
                raise ValueError(f"server: {field} must be above 0; got {getattr(self, field)}.")
        if not self.shutdown_timeout_s >= 0:
            raise ValueError(f"server: shutdown_timeout_s must be 0 or more; got {self.shutdown_timeout_s}.")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(f"server: max_prompt_tokens must be 1 or more; got {self.max_prompt_tokens}.")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("server: the API key must be printable ASCII and not empty. Choose another one.")
        if self.api_key is not None and self.api_key != self.api_key.strip():
            raise ValueError("server: the API key begins or ends with a space. Choose another one.")

    @property
    def largest_body_bytes(self) -> int:
        """Most bytes of a request body: a prompt that fits the context must fit, escapes and instructions included."""
        return 2**20 + 16 * self.context if self.max_body_bytes is None else self.max_body_bytes

    @property
    def longest_prompt(self) -> int:
        """Most tokens of a prompt; one place of the context is left for an answer."""
        return min(self.context, self.max_prompt_tokens or self.context)
