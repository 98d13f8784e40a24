# SPDX-License-Identifier: Apache-2.0
"""What an engine is configured with, and what that comes to."""

from __future__ import annotations

import pathlib

import pytest

from megamoe.engine.config import EngineConfig, resolve

from ..fakes import FakeConfig, FakeModel

NOWHERE = pathlib.Path("nowhere")


# known answers


def test_pages_follow_from_memory() -> None:
    model = FakeModel(NOWHERE, config=FakeConfig(max_position_embeddings=80))
    plan = resolve(EngineConfig(max_sequences=2, memory_bytes=2**30), model)
    assert plan.max_sequence_tokens == 80
    assert plan.size.num_pages == 3 * 2 * 10, "more pages than three full batches are of no use"
    one = plan.capacity
    tight = one.step_area_bytes + one.size.num_sequences * one.bytes_per_sequence + 10 * one.bytes_per_page
    small = resolve(EngineConfig(max_sequences=2, memory_bytes=tight, num_snapshots=0), model)
    assert (small.size.num_pages, small.num_snapshots) == (10, 0)
    assert small.capacity.total_bytes == tight


@pytest.mark.parametrize("memory_bytes", [8_000, 20_000, 10**6])
def test_what_is_planned_fits(memory_bytes: int) -> None:
    config = EngineConfig(max_sequences=2, max_step_tokens=64, prefill_chunk=4, memory_bytes=memory_bytes)
    plan = resolve(config, FakeModel(NOWHERE))
    assert plan.capacity.total_bytes <= memory_bytes and plan.size.num_pages >= 1


def test_explicit_numbers_are_taken() -> None:
    config = EngineConfig(num_pages=7, tokens_per_page=16, num_snapshots=3, max_sequence_tokens=50, prefill_chunk=9)
    plan = resolve(config, FakeModel(NOWHERE))
    assert (plan.size.num_pages, plan.size.tokens_per_page, plan.num_snapshots) == (7, 16, 3)
    assert (plan.max_sequence_tokens, plan.size.ring_tokens) == (50, 1)


def test_no_prefix_cache_no_snapshots() -> None:
    model = FakeModel(NOWHERE)
    assert resolve(EngineConfig(prefix_cache=False), model).num_snapshots == 0
    assert resolve(EngineConfig(prefix_cache=False, num_pages=5, num_snapshots=5), model).num_snapshots == 0


def test_rings_have_room_for_drafts() -> None:
    size = resolve(EngineConfig(max_sequences=3, max_step_tokens=40, speculative_tokens=2), FakeModel(NOWHERE)).size
    assert (size.ring_tokens, size.step_tokens) == (3, 43)


# refusals


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"max_sequences": 0}, ValueError, "max_sequences must be 1 or more; got 0"),
        ({"max_waiting": -1}, ValueError, "max_waiting must be 0 or more; got -1"),
        ({"num_pages": 0}, ValueError, "num_pages must be 1 or more; got 0"),
        ({"prefill_chunk": 1.5}, TypeError, "prefill_chunk must be an integer; got 1.5"),
        ({"max_step_tokens": True}, TypeError, "max_step_tokens must be an integer; got True"),
        ({"max_step_tokens": None}, TypeError, "max_step_tokens must be an integer; got None"),
        ({"prefix_cache": 1}, TypeError, "prefix_cache must be True or False"),
        ({"max_sequences": 8, "max_step_tokens": 15, "speculative_tokens": 1}, ValueError, "= 16, so that no sequence"),
        ({"prefill_chunk": 2, "speculative_tokens": 2}, ValueError, r"at least 1 \+ speculative_tokens = 3; got 2"),
    ],
    ids=str,
)
def test_fields_out_of_range(fields: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"engine: .*{message}"):
        EngineConfig(**fields)  # type: ignore[arg-type]


def test_what_does_not_fit_the_model() -> None:
    model = FakeModel(NOWHERE)
    with pytest.raises(ValueError, match="at most 64, the model's context; got 65"):
        resolve(EngineConfig(max_sequence_tokens=65), model)
    with pytest.raises(ValueError, match=r"memory_bytes 100 leaves no page of .* Raise it"):
        resolve(EngineConfig(memory_bytes=100), model)
