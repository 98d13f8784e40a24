# SPDX-License-Identifier: Apache-2.0
"""From logits to token ids: what each request asks for, gathered into one call per step.

A row is one position of one request at which a token is needed; a request whose drafts are checked has several. The
random number of a row depends on the request's seed and on which of its tokens it is, and on nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from megamoe.engine.outputs import TokenLogprobs
from megamoe.engine.random_numbers import uniforms
from megamoe.engine.request import Request, Settings
from megamoe.ops.penalize import penalize
from megamoe.ops.sample import sample
from megamoe.ops.token_logprobs import token_logprobs

NO_TOKEN = -1  # nothing is allowed: the request ends


@dataclasses.dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row.

    Attributes:
        token_ids: per row; NO_TOKEN where nothing may be chosen.
        logprobs: per row; None where not asked for.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None


def sample_rows(logits: torch.Tensor, requests: Sequence[Request], ahead: Sequence[int]) -> Sampled:
    """Choose one token per row.

    Args:
        logits: [N, V] fp32; not changed.
        requests: [N] whose row it is.
        ahead: [N] how many drafts come between the request's last token and the row's.
    """
    needs_edits = wants_logprobs = False
    for request, offset in zip(requests, ahead, strict=True):
        if request.is_edited or len(request.ids) + offset < request.min_length:
            needs_edits = True
        if request.params.logprobs is not None:
            wants_logprobs = True
    edited, is_dead = logits, None
    if needs_edits:
        edited = logits.clone()
        _edit(edited, requests, ahead)
        # A row with nothing left is drawn from as the model made it, and its token dropped: no other row notices.
        is_dead = edited.amax(dim=-1) == -torch.inf
        edited = torch.where(is_dead[:, None], logits, edited)
    ids = _draw(edited, requests, ahead)
    chosen = ids if is_dead is None else ids.masked_fill(is_dead, NO_TOKEN)
    if not wants_logprobs:
        return Sampled(chosen.tolist(), None)
    return _with_logprobs(logits, ids, chosen, requests)


def choose_drafts(logits: torch.Tensor, ahead: int) -> torch.Tensor:
    """Return the most probable token of each row, [N] int64: the draft.

    A draft is not drawn at random. Checking it is then rejection sampling from a distribution that has all its mass at
    one token d: accept with probability p(d), else draw from p without d. Drawing from p and accepting if the result is
    d does both at once, with the very number that the token would have been drawn with had there been no draft. So
    speculation changes no token, sampled or not (docs/decisions/0007-engine.md has the price).
    """
    return logits.max(dim=-1).indices


def _draw(logits: torch.Tensor, requests: Sequence[Request], ahead: Sequence[int]) -> torch.Tensor:
    settings = _settings(tuple([request.settings for request in requests]), logits.device)
    if all([request.is_greedy for request in requests]):  # a list: twice as fast as a generator
        return sample(logits, **settings, uniform=settings["temperature"])  # zeros, and not looked at
    indices = [len(request.ids) - request.num_prompt + offset for request, offset in zip(requests, ahead, strict=True)]
    numbers = uniforms([request.seed for request in requests], indices)
    return sample(logits, **settings, uniform=_sent(torch.from_numpy(numbers), logits.device))


@functools.lru_cache(maxsize=64)
def _settings(rows: tuple[Settings, ...], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the arguments of `sample` that stay the same while the same requests decode."""
    temperature, top_p, min_p, top_k = zip(*rows, strict=True)
    settings = {
        "temperature": _sent(torch.tensor(temperature, dtype=torch.float32), device),
        "top_p": _sent(torch.tensor(top_p, dtype=torch.float32), device),
        "top_k": _sent(torch.tensor(top_k, dtype=torch.int64), device),
    }
    if any(min_p):
        settings["min_p"] = _sent(torch.tensor(min_p, dtype=torch.float32), device)
    return settings


def _sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return values of the host on the device, without waiting for what the device has to do before."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def _edit(logits: torch.Tensor, requests: Sequence[Request], ahead: Sequence[int]) -> None:
    """Apply biases, bans and penalties in place."""
    _add_biases(logits, requests)
    for row, (request, offset) in enumerate(zip(requests, ahead, strict=True)):
        allowed = None if request.logits_filter is None else request.logits_filter.allowed()
        if allowed is not None:
            allowed = _sent(allowed[: logits.shape[1]], logits.device)
            logits[row, : len(allowed)].masked_fill_(~allowed, -torch.inf)
            logits[row, len(allowed) :] = -torch.inf
        if len(request.ids) + offset < request.min_length and request.stop_ids:
            kept = logits[row].index_fill(0, _sent(torch.tensor(sorted(request.stop_ids)), logits.device), -torch.inf)
            if allowed is not None:  # where a filter allows the end alone, it ends
                kept = torch.where((kept > -torch.inf).any(), kept, logits[row])
            logits[row] = kept
    _penalize(logits, requests)


def _add_biases(logits: torch.Tensor, requests: Sequence[Request]) -> None:
    """Add the biases of all rows in place."""
    rows: list[int] = []
    ids: list[int] = []
    biases: list[float] = []
    for row, request in enumerate(requests):
        if request.params.logit_bias:
            ids.extend(request.params.logit_bias)
            biases.extend(request.params.logit_bias.values())
            rows.extend([row] * len(request.params.logit_bias))
    if rows:
        row_idx, token_ids = _sent(torch.tensor([rows, ids]), logits.device)
        logits[row_idx, token_ids] += _sent(torch.tensor(biases, dtype=logits.dtype), logits.device)


def _penalize(logits: torch.Tensor, requests: Sequence[Request]) -> None:
    """Apply penalties in place. Requests with penalties have no drafts, so each has one row."""
    rows: list[int] = []
    ids: list[int] = []
    counts: list[int] = []
    factors = np.zeros((3, len(requests)), dtype=np.float32)
    factors[0] = 1.0
    for row, request in enumerate(requests):
        params = request.params
        if not params.has_penalties:
            continue
        factors[:, row] = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        output = Counter(request.ids[request.num_prompt :])
        seen = output if params.repetition_penalty == 1 else set(request.ids)
        ids.extend(seen)
        counts.extend(output[token_id] for token_id in seen)
        rows.extend([row] * len(seen))
    if not ids:
        return
    repetition, presence, frequency = _sent(torch.from_numpy(factors), logits.device)
    row_idx, token_ids = _sent(torch.tensor([rows, ids]), logits.device)
    penalize(
        logits,
        row_idx,
        token_ids,
        _sent(torch.tensor(counts, dtype=torch.float32), logits.device),
        repetition=repetition,
        presence=presence,
        frequency=frequency,
    )


def _with_logprobs(
    logits: torch.Tensor, ids: torch.Tensor, chosen: torch.Tensor, requests: Sequence[Request]
) -> Sampled:
    """Return the chosen tokens, and log-probabilities of those that were drawn where they are asked for.

    All numbers come from the device together, as fp64, which holds every id and every fp32 value.
    """
    asked = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
    num_top = max(requests[row].params.logprobs or 0 for row in asked)
    if len(asked) < len(requests):
        at = _sent(torch.tensor(asked), logits.device)
        logits, ids = logits[at], ids[at]
    found = token_logprobs(logits, ids, num_top=num_top)
    parts = [chosen, ids, found.chosen, found.top_ids.flatten(), found.top.flatten()]
    numbers: list[float] = torch.cat([part.double() for part in parts]).tolist()
    sizes = itertools.accumulate([part.numel() for part in parts], initial=0)
    token_ids, drawn, logprobs, top_ids, top = (numbers[a:b] for a, b in itertools.pairwise(sizes))
    num_top = found.top.shape[1]
    result: list[TokenLogprobs | None] = [None] * len(requests)
    for index, row in enumerate(asked):
        first = index * num_top
        last = first + min(requests[row].params.logprobs or 0, num_top)
        best = zip(map(int, top_ids[first:last]), top[first:last], strict=True)
        result[row] = TokenLogprobs(int(drawn[index]), logprobs[index], tuple(best))
    return Sampled([int(token_id) for token_id in token_ids], result)
