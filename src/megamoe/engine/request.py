# SPDX-License-Identifier: Apache-2.0
"""The state of one request between steps."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence

from megamoe.cache.prefix import PrefixNode
from megamoe.engine.logits_filter import LogitsFilter
from megamoe.engine.sampling_params import SamplingParams

Settings = tuple[float, float, float, int]
"""(temperature, top_p, min_p, top_k)"""


@dataclasses.dataclass(frozen=True, slots=True)
class NewRequest:
    """What `Engine.add_all` takes.

    Attributes:
        request_id: a name that no unfinished request has.
        prompt_ids: at least one id; begins with the model's BOS id if it has one.
        params: sampling and when to stop.
        logits_filter: restricts the tokens, or None.
    """

    request_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    logits_filter: LogitsFilter | None = None


class Request:
    """One request: its tokens, how many of them are computed, and where its rows are.

    Attributes:
        request_id: the caller's name for it.
        number: position in order of arrival; also its number in the page allocator.
        params: what it asks of sampling.
        logits_filter: restricts its tokens, or None.
        ids: prompt and generated tokens.
        num_prompt: tokens of the prompt.
        max_length: length at which it ends.
        stop_ids: ids that end it.
        settings: what the draw of a token depends on.
        seed: of its random numbers.
        can_draft: whether its next tokens may be guessed ahead.
        is_edited: whether its logits are changed before a token is drawn, min_tokens aside.
        is_greedy: whether it draws no numbers.
        min_length: length below which it must not end.
        num_computed: tokens whose rows are in the caches.
        num_cached: prompt tokens that were reused when it first ran.
        ring: its ring, or None while it waits.
        room: tokens its pages have room for.
        drafts: guesses at the tokens after `ids`.
        node: the last of its pages that is kept for reuse.
    """

    __slots__ = (
        "can_draft",
        "drafts",
        "ids",
        "is_edited",
        "is_greedy",
        "logits_filter",
        "max_length",
        "min_length",
        "node",
        "num_cached",
        "num_computed",
        "num_prompt",
        "number",
        "params",
        "request_id",
        "ring",
        "room",
        "seed",
        "settings",
        "stop_ids",
        "was_admitted",
    )

    def __init__(
        self,
        request_id: str,
        number: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        max_length: int,
        stop_ids: frozenset[int],
        logits_filter: LogitsFilter | None = None,
    ) -> None:
        """Start with nothing computed."""
        self.request_id = request_id
        self.number = number
        self.params = params
        self.logits_filter = logits_filter
        self.ids = list(prompt_ids)
        self.num_prompt = len(self.ids)
        self.max_length = max_length
        self.stop_ids = stop_ids
        self.settings: Settings = (params.temperature, params.top_p, params.min_p, params.top_k)
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        # Penalties and filters look at every token before, so guesses would have to be judged one after the other.
        self.can_draft = logits_filter is None and not params.has_penalties
        self.is_edited = bool(logits_filter is not None or params.logit_bias or params.has_penalties)
        self.is_greedy = params.is_greedy
        self.min_length = self.num_prompt + params.min_tokens if params.min_tokens else 0
        self.num_computed = 0
        self.num_cached = 0
        self.was_admitted = False
        self.ring: int | None = None
        self.room = 0
        self.drafts: list[int] = []
        self.node: PrefixNode | None = None

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.ids) - self.num_prompt
