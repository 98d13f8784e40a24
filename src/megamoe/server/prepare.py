# SPDX-License-Identifier: Apache-2.0
"""From what a client asks to what the service does: token counts, sampling parameters, stop strings, seeds.

Every limit of the server that concerns one request is checked here, with an error that names the field.
"""

from __future__ import annotations

from collections.abc import Sequence

from megamoe.engine.sampling_params import SamplingParams
from megamoe.server.errors import ApiError
from megamoe.server.protocol import Sampling
from megamoe.server.settings import ServerSettings

DEFAULT_TEMPERATURE = 1.0  # OpenAI's default, and what DeepSeek's generation_config says


def check_model(request: Sampling, settings: ServerSettings) -> None:
    """Refuse another model than the one that is served."""
    if request.model != settings.model_name:
        raise ApiError(
            404,
            f"There is no model {request.model[:100]!r} here; the one that is served is {settings.model_name!r}.",
            param="model",
            code="model_not_found",
        )


def check_common(request: Sampling) -> None:
    """Refuse combinations that mean nothing, whatever the API."""
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs 'stream': true.", param="stream_options", code="invalid_value")
    for token_id, bias in (request.logit_bias or {}).items():
        if not -100 <= bias <= 100:
            raise ApiError(
                400,
                f"logit_bias must be -100 to 100; got {bias} for token {token_id}.",
                param="logit_bias",
                code="invalid_value",
            )


def num_choices(request: Sampling, num_prompts: int, settings: ServerSettings) -> int:
    """Return n after checking how many sequences the request comes to."""
    n = request.n or 1
    if n * num_prompts > settings.max_choices:
        raise ApiError(
            400,
            f"n times the number of prompts must be at most {settings.max_choices} on this server; got {n} times "
            f"{num_prompts}. Send several requests.",
            param="n",
            code="too_many_choices",
        )
    return n


def max_new_tokens(
    asked: int | None, default: int | None, num_prompt: int, settings: ServerSettings, *, prompt_param: str
) -> int:
    """Return how many tokens may be generated, after checking the prompt: what is asked for, cut to the room left.

    Clients ask for more than fits as a way of saying "as many as there are", and are told by the finish reason.

    Args:
        asked: what the request says.
        default: what it gets when it says nothing; None for all the room.
        num_prompt: tokens of the prompt.
        settings: the limits.
        prompt_param: the name of the field that has the prompt.
    """
    if num_prompt > settings.longest_prompt:
        raise ApiError(
            400,
            f"The prompt has {num_prompt} tokens; the limit is {settings.longest_prompt}. Shorten it.",
            param=prompt_param,
            code="context_length_exceeded",
        )
    room = settings.context - num_prompt + 1  # the last token is never fed back
    if settings.max_tokens is not None:
        room = min(room, settings.max_tokens)
    wanted = default if asked is None else asked
    return room if wanted is None else min(wanted, room)


def sampling_params(
    request: Sampling, *, max_tokens: int, logprobs: int | None, choice: int, vocab_size: int
) -> SamplingParams:
    """Return the parameters of one choice; a seeded request's choices draw with seeds that follow each other."""
    check_ids(request.stop_token_ids or (), vocab_size, "stop_token_ids")
    check_ids([int(token_id) for token_id in request.logit_bias or ()], vocab_size, "logit_bias")
    if request.min_tokens and request.min_tokens > max_tokens:
        raise ApiError(
            400,
            f"min_tokens must be at most max_tokens and what the context leaves, {max_tokens} here; got "
            f"{request.min_tokens}. Lower it.",
            param="min_tokens",
            code="invalid_value",
        )
    seed = None if request.seed is None else (request.seed + choice) % 2**63
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=DEFAULT_TEMPERATURE if request.temperature is None else float(request.temperature),
            top_p=_or(request.top_p, 1.0),
            top_k=max(request.top_k or 0, 0),
            min_p=_or(request.min_p, 0.0),
            presence_penalty=_or(request.presence_penalty, 0.0),
            frequency_penalty=_or(request.frequency_penalty, 0.0),
            repetition_penalty=_or(request.repetition_penalty, 1.0),
            logit_bias={int(token_id): float(bias) for token_id, bias in (request.logit_bias or {}).items()},
            seed=seed,
            stop_token_ids=tuple(request.stop_token_ids or ()),
            ignore_eos=bool(request.ignore_eos),
            min_tokens=request.min_tokens or 0,
            logprobs=logprobs,
        )
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_value") from error


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def stop_strings(request: Sampling) -> tuple[str, ...]:
    """Return the stop strings."""
    if request.stop is None:
        return ()
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Refuse ids outside the vocabulary."""
    bad = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
    if bad is not None:
        raise ApiError(
            400, f"{param}: token ids must be 0 to {vocab_size - 1}; got {bad}.", param=param, code="invalid_value"
        )
