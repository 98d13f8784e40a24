# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of one server. A registry of its own: two servers in one process do not share counters.

Counters of the engine are read when somebody asks; times are observed where they happen, in the event loop.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megamoe.engine.outputs import EngineStats

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Everything /metrics shows.

    Attributes:
        open_requests: requests whose body or answer is not complete.
        requests: answers by endpoint and HTTP status.
        disconnects: clients that left before their answer was complete.
        finished: choices by finish reason.
        malformed_calls: tool calls, or parts of them, that could not be read, by reason.
        mended_calls: tool calls that were read in spite of a slip, by reason.
        first_token_s: from arrival to the first token of each choice.
        token_s: per token after the first, what a step took that brought it.
        request_s: from arrival to the end of the answer.
    """

    def __init__(self, *, model_name: str, recipe: str, version: str) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector()
        self._registry.register(self._engine)
        info = Gauge("megamoe_info", "What is served.", ("model", "recipe", "version"), registry=self._registry)
        info.labels(model_name, recipe, version).set(1)
        self.open_requests = Gauge("megamoe_open_requests", "API requests under way.", registry=self._registry)
        self.requests = Counter(
            "megamoe_requests", "API requests answered.", ("endpoint", "status"), registry=self._registry
        )
        self.disconnects = Counter(
            "megamoe_client_disconnects", "Clients that left before their answer was complete.", registry=self._registry
        )
        self.finished = Counter(
            "megamoe_choices", "Choices that were completed, by finish reason.", ("reason",), registry=self._registry
        )
        self.malformed_calls = Counter(
            "megamoe_malformed_calls", "Tool calls that could not be read.", ("reason",), registry=self._registry
        )
        self.mended_calls = Counter(
            "megamoe_mended_calls", "Tool calls read in spite of a slip.", ("reason",), registry=self._registry
        )
        self.first_token_s = Histogram(
            "megamoe_time_to_first_token_seconds",
            "From the arrival of a request to the first token of a choice.",
            buckets=_FIRST_TOKEN_S,
            registry=self._registry,
        )
        self.token_s = Histogram(
            "megamoe_time_per_token_seconds",
            "Time between tokens of a choice after its first.",
            buckets=_TOKEN_S,
            registry=self._registry,
        )
        self.request_s = Histogram(
            "megamoe_request_seconds",
            "From the arrival of a request to the end of its answer.",
            buckets=_REQUEST_S,
            registry=self._registry,
        )

    def render(self, stats: EngineStats | None) -> bytes:
        """Return the text format; `stats` is None when the engine has ended."""
        self._engine.stats = stats
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Shows the last EngineStats."""

    def __init__(self) -> None:
        self.stats: EngineStats | None = None

    def describe(self) -> Iterator[Metric]:
        """Tell the registry the names without asking the engine."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's numbers."""
        stats = self.stats
        yield GaugeMetricFamily("megamoe_engine_up", "1 while the engine runs.", value=float(stats is not None))
        if stats is None:
            return
        gauges = {
            "megamoe_requests_waiting": ("Sequences in the queue.", stats.waiting),
            "megamoe_requests_running": ("Sequences being computed.", stats.running),
            "megamoe_cache_pages_used": ("Cache pages that running sequences hold.", stats.pages_used),
            "megamoe_cache_pages_cached": ("Cache pages kept for reuse.", stats.pages_cached),
            "megamoe_cache_pages": ("Cache pages there are.", stats.pages_total),
            "megamoe_prefix_hit_rate": ("Share of prompt tokens found in the cache.", stats.prefix_hit_rate),
            "megamoe_draft_acceptance_rate": ("Share of draft tokens that were right.", stats.acceptance_rate),
        }
        counters = {
            "megamoe_prefix_query_tokens": ("Prompt tokens looked up in the cache.", stats.prefix_query_tokens),
            "megamoe_prefix_hit_tokens": ("Prompt tokens found in the cache.", stats.prefix_hit_tokens),
            "megamoe_draft_tokens": ("Draft tokens checked.", stats.draft_tokens),
            "megamoe_draft_tokens_accepted": ("Draft tokens that were right.", stats.accepted_tokens),
            "megamoe_preemptions": ("Sequences that gave their pages back and start again.", stats.preemptions),
            "megamoe_engine_steps": ("Steps of the engine.", stats.steps),
            "megamoe_prompt_tokens": ("Prompt tokens computed.", stats.prompt_tokens),
            "megamoe_generated_tokens": ("Tokens generated.", stats.generated_tokens),
            "megamoe_sequences_finished": ("Sequences that ended by themselves.", stats.finished),
            "megamoe_sequences_aborted": ("Sequences that were given up.", stats.aborted),
            "megamoe_sequences_failed": ("Sequences that an error ended.", stats.failed),
        }
        for name, (help_, value) in gauges.items():
            yield GaugeMetricFamily(name, help_, value=value)
        for name, (help_, value) in counters.items():
            yield CounterMetricFamily(name, help_, value=value)
