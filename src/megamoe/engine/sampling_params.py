# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen and when a sequence ends; checked once, when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

MAX_INT = 2**63 - 1  # what an int64 tensor holds
MAX_LOGPROBS = 20  # most alternatives per token, as in OpenAI's API
MAX_STOP_TOKEN_IDS = 1024  # what every token of a request is compared with
MAX_LOGIT_BIASES = 4096  # what every step of a request copies to the device


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """What a request asks of sampling. The default is greedy and therefore reproducible to the token.

    The order of application: logit_bias, tokens that may not be chosen (a logits filter, min_tokens), penalties,
    temperature, top_k, min_p, top_p, then one draw.

    Attributes:
        max_tokens: most tokens to generate, 0 or more.
        min_tokens: until this many are generated, ids that would end the sequence are not chosen.
        temperature: divides the logits, at most 1e6; 0 takes the largest logit (the lowest id among equals).
        top_p: keep the most probable tokens that together reach this probability; 1e-9 to 1, 1 keeps all.
        top_k: keep this many of the most probable tokens; 0 keeps all.
        min_p: keep tokens at least this probable relative to the most probable one; in [0, 1], 0 keeps all.
        repetition_penalty: positive logits of tokens that occur in prompt or output are divided by it, negative ones
            multiplied; 1e-3 to 1e3, 1 for none.
        presence_penalty: subtracted from the logits of tokens that occur in the output; -2 to 2.
        frequency_penalty: subtracted once per occurrence in the output; -2 to 2.
        logit_bias: added to the logits of these tokens, at most 4,096; -1e6 to 1e6.
        seed: seeds this request's own random numbers, 0 to 2**63 - 1; None draws a fresh seed. Unused when greedy.
        stop_token_ids: ids that end the sequence besides the model's own end-of-sequence ids; at most 1,024.
        ignore_eos: the model's own end-of-sequence ids do not end it.
        logprobs: None for no log-probabilities, else how many alternatives to report per token, 0 to 20.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            TypeError: a field has the wrong type.
            ValueError: a field is out of its range.
        """
        _check_int("max_tokens", self.max_tokens)
        _check_int("min_tokens", self.min_tokens)
        # Bounds that fp32 holds: a value that is rounded to 0 or infinity would fail in the middle of a step of many.
        _check_number("temperature", self.temperature, lambda value: 0 <= value <= 1e6, "0 (greedy) to 1e6")
        _check_number("top_p", self.top_p, lambda value: 1e-9 <= value <= 1, "1e-9 to 1")
        _check_number("min_p", self.min_p, lambda value: 0 <= value <= 1, "0 to 1")
        _check_number("repetition_penalty", self.repetition_penalty, lambda value: 1e-3 <= value <= 1e3, "1e-3 to 1e3")
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), lambda value: -2 <= value <= 2, "-2 to 2")
        _check_int("top_k", self.top_k)
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"sampling: min_tokens must be at most max_tokens; got {self.min_tokens} and {self.max_tokens}."
            )
        if self.seed is not None:
            _check_int("seed", self.seed)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs)
            if self.logprobs > MAX_LOGPROBS:
                raise ValueError(f"sampling: logprobs must be at most {MAX_LOGPROBS}; got {self.logprobs}.")
        if type(self.ignore_eos) is not bool:
            raise TypeError(f"sampling: ignore_eos must be True or False; got {self.ignore_eos!r}.")
        # Frozen: the only places that set. Tuples and copies, so that no caller can change them later.
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @property
    def is_greedy(self) -> bool:
        """Whether no random number is needed."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _ids(name: str, values: Iterable[int]) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"sampling: {name} must be a sequence of ids; got {values!r}.")
    ids = tuple(values)
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise ValueError(f"sampling: {name} must have at most {MAX_STOP_TOKEN_IDS} ids; got {len(ids)}.")
    for token_id in ids:
        _check_int(name, token_id)
    return ids


def _biases(values: Mapping[int, float]) -> dict[int, float]:
    if not isinstance(values, Mapping):
        raise TypeError(f"sampling: logit_bias must map token ids to numbers; got {values!r}.")
    if len(values) > MAX_LOGIT_BIASES:
        raise ValueError(f"sampling: logit_bias must have at most {MAX_LOGIT_BIASES} entries; got {len(values)}.")
    for token_id, bias in values.items():
        _check_int("logit_bias", token_id)
        _check_number("logit_bias", bias, lambda value: -1e6 <= value <= 1e6, "-1e6 to 1e6")
    return dict(values)


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
