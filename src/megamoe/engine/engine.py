# SPDX-License-Identifier: Apache-2.0
"""The engine's interface, until the engine is merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megamoe.engine.logits_filter import LogitsFilter
from megamoe.engine.outputs import EngineStats, RequestOutput
from megamoe.engine.sampling_params import SamplingParams


class Engine(Protocol):
    """Interface."""

    def add(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        logits_filter: LogitsFilter | None = None,
    ) -> None: ...
    def abort(self, request_id: str) -> bool: ...
    def step(self) -> list[RequestOutput]: ...
    def has_work(self) -> bool: ...
    def stats(self) -> EngineStats: ...
