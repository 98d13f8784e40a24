# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen and when a sequence ends; checked once, when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

MAX_INT = 2**63 - 1  # what an int64 tensor holds


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """What a request asks of sampling. The default is greedy and therefore reproducible to the token.

    Attributes:
        max_tokens: most tokens to generate, 0 or more.
        temperature: divides the logits; 0 takes the largest logit (the lowest id among equals).
        top_p: keep the most probable tokens that together reach this probability; in (0, 1], 1 keeps all.
        top_k: keep this many of the most probable tokens; 0 keeps all.
        seed: seeds this request's own random numbers, 0 to 2**63 - 1; None draws a fresh seed. Unused when greedy.
        stop_token_ids: ids that end the sequence besides the model's own end-of-sequence ids.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            TypeError: a field has the wrong type.
            ValueError: a field is out of its range.
        """
        _check_int("max_tokens", self.max_tokens)
        _check_number("temperature", self.temperature, lambda value: 0 <= value < math.inf, "0 (greedy) or more")
        _check_number("top_p", self.top_p, lambda value: 0 < value <= 1, "more than 0 and at most 1")
        _check_int("top_k", self.top_k)
        if self.seed is not None:
            _check_int("seed", self.seed)
        if isinstance(self.stop_token_ids, str) or not isinstance(self.stop_token_ids, Iterable):
            raise TypeError(f"sampling: stop_token_ids must be a sequence of ids; got {self.stop_token_ids!r}.")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))  # frozen: the one place that sets
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id)

    @property
    def is_greedy(self) -> bool:
        """Whether no random number is needed."""
        return self.temperature == 0


def _check_int(name: str, value: int) -> None:
    if type(value) is not int:
        raise TypeError(f"sampling: {name} must be an integer; got {value!r}.")
    if not 0 <= value <= MAX_INT:
        raise ValueError(f"sampling: {name} must be {'0 or more' if value < 0 else 'below 2**63'}; got {value}.")


def _check_number(name: str, value: float, is_allowed: Callable[[float], bool], allowed: str) -> None:
    if type(value) not in (int, float):
        raise TypeError(f"sampling: {name} must be a number; got {value!r}.")
    if not is_allowed(value):
        raise ValueError(f"sampling: {name} must be {allowed}; got {value}.")
