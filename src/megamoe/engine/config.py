# SPDX-License-Identifier: Apache-2.0
"""What a user sets about an engine, and what follows from it for a model: page, ring and snapshot counts."""

from __future__ import annotations

import dataclasses

from megamoe.cache.pools import CacheSize, CapacityReport
from megamoe.engine.model import BatchModel

SNAPSHOT_SHARE = 0.25  # of the memory that rings leave, where num_snapshots is not given


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """What a user sets. Nothing here changes a token or a logprob, only how fast it comes and how many fit.

    Attributes:
        max_sequences: sequences that are computed at the same time; each has rings of its own.
        max_step_tokens: most tokens of all sequences in one step.
        prefill_chunk: most tokens of one sequence in one step.
        max_waiting: requests that may wait besides those for which a place to run is free; one more is refused.
        max_sequence_tokens: longest sequence, prompt included; None for the model's context.
        memory_bytes: bytes for rings, pages and snapshots together; unused where num_pages is given. On a GPU it is
            what weights, workspace and graphs leave (engine/memory.py).
        num_pages: pages for all sequences; None for what fits memory_bytes.
        tokens_per_page: positions a page covers, a multiple of every layer's ratio; None for the model's choice.
        prefix_cache: keep finished pages and share them with later requests that begin with the same tokens.
        num_snapshots: page boundaries from which a later request can continue; None for a share of the memory.
        speculative_tokens: draft tokens a step checks per sequence; 0 turns speculation off.
        decode_graphs: replay decode steps from captured graphs, on a device that has them.
    """

    max_sequences: int = 8
    max_step_tokens: int = 512
    prefill_chunk: int = 256
    max_waiting: int = 256
    max_sequence_tokens: int | None = None
    memory_bytes: int = 2**30
    num_pages: int | None = None
    tokens_per_page: int | None = None
    prefix_cache: bool = True
    num_snapshots: int | None = None
    speculative_tokens: int = 0
    decode_graphs: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            TypeError: a field has the wrong type.
            ValueError: a field is out of its range, or a step has no room for one prompt token beside a full batch.
        """
        at_least = {"max_sequences": 1, "max_step_tokens": 1, "prefill_chunk": 1, "max_waiting": 0, "memory_bytes": 1}
        at_least |= {"max_sequence_tokens": 1, "num_pages": 1, "tokens_per_page": 1, "num_snapshots": 0}
        at_least |= {"speculative_tokens": 0}
        optional = {"max_sequence_tokens", "num_pages", "tokens_per_page", "num_snapshots"}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if type(value) is not int:
                raise TypeError(f"engine: {name} must be an integer; got {value!r}.")
            if value < least:
                raise ValueError(f"engine: {name} must be {least} or more; got {value}.")
        for name in ("prefix_cache", "decode_graphs"):
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"engine: {name} must be True or False; got {getattr(self, name)!r}.")
        decoding = self.max_sequences * (1 + self.speculative_tokens)
        if self.max_step_tokens < decoding:
            raise ValueError(
                f"engine: max_step_tokens must be at least max_sequences * (1 + speculative_tokens) = {decoding}, so "
                f"that no sequence waits for another; got {self.max_step_tokens}."
            )
        if self.prefill_chunk < 1 + self.speculative_tokens:
            raise ValueError(
                f"engine: prefill_chunk must be at least 1 + speculative_tokens = {1 + self.speculative_tokens}; got "
                f"{self.prefill_chunk}."
            )

    @property
    def step_tokens(self) -> int:
        """The tokens for which the step area has room."""
        # A restored sequence owes its draft stage one row more than the step has tokens.
        return self.max_step_tokens + (self.max_sequences if self.speculative_tokens else 0)


@dataclasses.dataclass(frozen=True)
class EnginePlan:
    """What an EngineConfig comes to for one model.

    Attributes:
        size: rings, pages and the longest steps.
        num_snapshots: page boundaries kept.
        max_sequence_tokens: longest sequence.
        capacity: what the caches cost, bytes per token and bytes per sequence apart.
    """

    size: CacheSize
    num_snapshots: int
    max_sequence_tokens: int
    capacity: CapacityReport


def smallest_capacity(config: EngineConfig, model: BatchModel) -> CapacityReport:
    """Return what the least caches cost: rings, the step area, one page, and one snapshot where prefixes are kept."""
    return _report(config, model, 1, int(config.prefix_cache and config.num_snapshots != 0))


def _report(config: EngineConfig, model: BatchModel, num_pages: int, num_snapshots: int) -> CapacityReport:
    per_page = model.tokens_per_page if config.tokens_per_page is None else config.tokens_per_page
    size = CacheSize(config.max_sequences, num_pages, per_page, 1 + config.speculative_tokens, config.step_tokens)
    return model.capacity(size, num_snapshots, with_drafts=config.speculative_tokens > 0)


def resolve(config: EngineConfig, model: BatchModel) -> EnginePlan:
    """Return page, ring and snapshot counts for a model.

    Raises:
        ValueError: the longest sequence is beyond the model's context, a page is not whole in every layer, or the
            memory holds less than one page beside the rings.
    """
    context = model.config.max_position_embeddings
    longest = context if config.max_sequence_tokens is None else config.max_sequence_tokens
    if longest > context:
        raise ValueError(f"engine: max_sequence_tokens must be at most {context}, the model's context; got {longest}.")
    per_page = model.tokens_per_page if config.tokens_per_page is None else config.tokens_per_page

    one = _report(config, model, 1, 1)
    enough = config.max_sequences * -(-longest // per_page)  # every sequence at its longest
    wanted = config.num_snapshots
    if config.num_pages is not None:
        num_pages = config.num_pages
        num_snapshots = num_pages if wanted is None else wanted
    else:
        spare = config.memory_bytes - config.max_sequences * one.bytes_per_sequence - one.step_area_bytes
        share = int(SNAPSHOT_SHARE * spare) // max(one.bytes_per_snapshot, 1)
        num_snapshots = max(0, min(share, 2 * enough)) if wanted is None else wanted
        if not config.prefix_cache:
            num_snapshots = 0
        spare -= num_snapshots * one.bytes_per_snapshot
        # Beyond `enough` for running sequences, pages only serve prefix reuse.
        num_pages = min(spare // max(one.bytes_per_page, 1), enough * (3 if config.prefix_cache else 1))
        if num_pages < 1:
            raise ValueError(
                f"engine: memory_bytes {config.memory_bytes:,} leaves no page of {one.bytes_per_page:,} bytes beside "
                f"{config.max_sequences} sequences of {one.bytes_per_sequence:,}, {num_snapshots} snapshots of "
                f"{one.bytes_per_snapshot:,} and a step area of {one.step_area_bytes:,}. Raise it, or lower "
                f"max_sequences or max_step_tokens."
            )
    if not config.prefix_cache:
        num_snapshots = 0
    capacity = _report(config, model, num_pages, num_snapshots)
    return EnginePlan(capacity.size, num_snapshots, longest, capacity)
