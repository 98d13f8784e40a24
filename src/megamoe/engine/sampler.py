# SPDX-License-Identifier: Apache-2.0
"""From logits to token ids: what each request asks for, gathered into one call per step.

A row is one position of one request at which a token is needed; a request whose drafts are checked has several. The
random number of a row depends on the request's seed and on which of its tokens it is, and on nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
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
    edited, dead_rows = logits, []
    if needs_edits:
        edited = logits.clone()
        _edit(edited, requests, ahead)
        # A row with nothing left is drawn from as the model made it, and its token dropped: no other row notices.
        is_dead = edited.amax(dim=-1) == -torch.inf
        edited[is_dead] = logits[is_dead]
        dead_rows = is_dead.nonzero()[:, 0].tolist()
    ids = _draw(edited, requests, ahead)
    token_ids: list[int] = ids.tolist()
    logprobs = _logprobs(logits, ids, requests) if wants_logprobs else None
    for row in dead_rows:
        token_ids[row] = NO_TOKEN
    return Sampled(token_ids, logprobs)


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
    return sample(logits, **settings, uniform=torch.from_numpy(numbers).to(logits.device))


@functools.lru_cache(maxsize=64)
def _settings(rows: tuple[Settings, ...], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the arguments of `sample` that stay the same while the same requests decode."""
    temperature, top_p, min_p, top_k = zip(*rows, strict=True)
    settings = {
        "temperature": torch.tensor(temperature, dtype=torch.float32, device=device),
        "top_p": torch.tensor(top_p, dtype=torch.float32, device=device),
        "top_k": torch.tensor(top_k, dtype=torch.int64, device=device),
    }
    if any(min_p):
        settings["min_p"] = torch.tensor(min_p, dtype=torch.float32, device=device)
    return settings


def _edit(logits: torch.Tensor, requests: Sequence[Request], ahead: Sequence[int]) -> None:
    """Apply biases, bans and penalties in place."""
    for row, (request, offset) in enumerate(zip(requests, ahead, strict=True)):
        params = request.params
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            logits[row, ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
        allowed = None if request.logits_filter is None else request.logits_filter.allowed()
        if allowed is not None:
            allowed = allowed[: logits.shape[1]].to(logits.device)
            logits[row, : len(allowed)].masked_fill_(~allowed, -torch.inf)
            logits[row, len(allowed) :] = -torch.inf
        if len(request.ids) + offset < request.min_length and request.stop_ids:
            kept = logits[row].clone()
            kept[torch.tensor(sorted(request.stop_ids), device=logits.device)] = -torch.inf
            if allowed is None or bool((kept > -torch.inf).any()):  # where a filter allows the end alone, it ends
                logits[row] = kept
    _penalize(logits, requests)


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
    repetition, presence, frequency = torch.from_numpy(factors).to(logits.device)
    penalize(
        logits,
        torch.tensor(rows, device=logits.device),
        torch.tensor(ids, device=logits.device),
        torch.tensor(counts, dtype=torch.float32, device=logits.device),
        repetition=repetition,
        presence=presence,
        frequency=frequency,
    )


def _logprobs(logits: torch.Tensor, ids: torch.Tensor, requests: Sequence[Request]) -> list[TokenLogprobs | None]:
    asked = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
    num_top = max(requests[row].params.logprobs or 0 for row in asked)
    at = torch.tensor(asked, device=logits.device)
    found = token_logprobs(logits[at], ids[at], num_top=num_top)
    result: list[TokenLogprobs | None] = [None] * len(requests)
    for row, token_id, chosen, top_ids, top in zip(
        asked, ids[at].tolist(), found.chosen.tolist(), found.top_ids.tolist(), found.top.tolist(), strict=True
    ):
        wanted = requests[row].params.logprobs or 0
        result[row] = TokenLogprobs(token_id, chosen, tuple(zip(top_ids[:wanted], top[:wanted], strict=True)))
    return result
