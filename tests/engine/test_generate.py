# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: which tokens, how many, why it ends, and what the model is asked to do."""

from __future__ import annotations

import pathlib

import pytest

from megamoe.engine.config import EngineConfig
from megamoe.engine.generate import config_for, generate_batch, generate_tokens
from megamoe.engine.sampling_params import SamplingParams

from ..fakes import BOS, EOS, FakeConfig, FakeModel, next_after

NOWHERE = pathlib.Path("nowhere")


def greedy(prompt: list[int], count: int) -> list[int]:
    """Return what the default FakeModel continues `prompt` with."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_after(ids))
    return ids[len(prompt) :]


def ids_and_reasons(model: FakeModel, prompt: list[int], params: SamplingParams) -> tuple[list[int], list[str | None]]:
    tokens = list(generate_tokens(model, prompt, params))
    return [token.token_id for token in tokens], [token.finish_reason for token in tokens]


# known answers


@pytest.mark.parametrize("count", [1, 2, 5])
def test_greedy_follows_the_model(count: int) -> None:
    prompt = [BOS, 40, 41]
    ids, reasons = ids_and_reasons(FakeModel(NOWHERE), prompt, SamplingParams(max_tokens=count))
    assert ids == greedy(prompt, count)
    assert reasons == [None] * (count - 1) + ["length"]


def test_no_tokens_asks_nothing_of_the_model() -> None:
    model = FakeModel(NOWHERE)
    assert ids_and_reasons(model, [BOS], SamplingParams(max_tokens=0)) == ([], [])
    assert model.steps == []


def test_end_of_sequence_is_the_last_token() -> None:
    model = FakeModel(NOWHERE, rule=lambda ids: EOS if len(ids) == 4 else next_after(ids))
    ids, reasons = ids_and_reasons(model, [BOS, 40], SamplingParams(max_tokens=20))
    assert ids == [*greedy([BOS, 40], 2), EOS]
    assert reasons == [None, None, "stop"]


def test_stop_ids_of_the_request_end_too() -> None:
    prompt = [BOS, 40]
    expected = greedy(prompt, 3)
    assert len(set(expected)) == 3
    params = SamplingParams(max_tokens=20, stop_token_ids=(expected[2],))
    assert ids_and_reasons(FakeModel(NOWHERE), prompt, params) == (expected, [None, None, "stop"])


def test_stop_at_the_last_allowed_token_is_a_stop() -> None:
    model = FakeModel(NOWHERE, rule=lambda ids: EOS)
    assert ids_and_reasons(model, [BOS], SamplingParams(max_tokens=1)) == ([EOS], ["stop"])


@pytest.mark.parametrize(("num_prompt", "num_new"), [(1, 64), (63, 2), (64, 1)])
def test_the_context_is_used_to_its_end(num_prompt: int, num_new: int) -> None:
    model = FakeModel(NOWHERE, config=FakeConfig(max_position_embeddings=64))
    ids, reasons = ids_and_reasons(model, [BOS] * num_prompt, SamplingParams(max_tokens=1000))
    assert len(ids) == num_new and reasons[-1] == "length"
    assert sum(model.steps) == 64


# properties


def test_the_prompt_is_fed_once_and_then_single_tokens() -> None:
    model = FakeModel(NOWHERE)
    ids_and_reasons(model, [BOS, 40, 41], SamplingParams(max_tokens=4))
    assert model.steps == [3, 1, 1, 1]


@pytest.mark.parametrize("num_prompt", [7, 8, 9, 16, 17])
def test_long_prompts_are_fed_in_parts(num_prompt: int) -> None:
    model = FakeModel(NOWHERE)
    prompt = [BOS, *range(40, 40 + num_prompt - 1)]
    config = EngineConfig(max_sequences=1, max_step_tokens=8, prefill_chunk=8)
    tokens = list(generate_tokens(model, prompt, SamplingParams(max_tokens=2), config))
    assert [token.token_id for token in tokens] == greedy(prompt, 2)
    assert max(model.steps) <= 8 and sum(model.steps) == num_prompt + 1


def test_a_batch_is_its_prompts_one_by_one() -> None:
    prompts = [[BOS, *range(10, 10 + length)] for length in (1, 9, 4, 30, 2, 2, 17, 5, 8, 11)]
    params = SamplingParams(max_tokens=6)
    model = FakeModel(NOWHERE)
    tokens = list(generate_batch(model, prompts, params))
    for idx, prompt in enumerate(prompts):
        assert [token.token_id for token in tokens if token.prompt_idx == idx] == greedy(prompt, 6)
    assert len(model.steps) < 30, "they run together"


def test_no_prompts_need_no_engine() -> None:
    model = FakeModel(NOWHERE)
    assert list(generate_batch(model, [], SamplingParams())) == [] and model.steps == []


def test_caches_hold_what_is_asked_for_and_no_more() -> None:
    config = config_for(FakeModel(NOWHERE), [[BOS] * 9, [BOS]], [SamplingParams(max_tokens=8)] * 2)
    assert (config.max_sequences, config.num_pages, config.prefix_cache) == (2, 2 * 2, False)
    assert config_for(FakeModel(NOWHERE), [[BOS] * 9] * 20, [SamplingParams(max_tokens=9)] * 20).num_pages == 8 * 3


def test_tokens_come_one_by_one() -> None:
    model = FakeModel(NOWHERE)
    tokens = generate_tokens(model, [BOS], SamplingParams(max_tokens=10))
    assert model.steps == []
    next(tokens)
    assert model.steps == [1]
    next(tokens)
    assert model.steps == [1, 1]


def test_a_seed_makes_sampling_reproducible(seed: int) -> None:
    def draw(use: int | None) -> list[int]:
        params = SamplingParams(max_tokens=12, temperature=3.0, seed=use)
        return ids_and_reasons(FakeModel(NOWHERE), [BOS], params)[0]

    assert draw(seed) == draw(seed)
    assert draw(seed) != draw(seed + 1)
    assert draw(None) != draw(None)


def test_every_step_draws_its_own_number(seed: int) -> None:
    flat = FakeModel(NOWHERE, rule=lambda ids: 40)
    params = SamplingParams(max_tokens=30, temperature=1e6, seed=seed)
    assert len(set(ids_and_reasons(flat, [BOS], params)[0])) > 10


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_narrow_sampling_is_greedy(narrow: dict[str, float], seed: int) -> None:
    params = SamplingParams(max_tokens=6, temperature=2.0, seed=seed, **narrow)  # type: ignore[arg-type]
    assert ids_and_reasons(FakeModel(NOWHERE), [BOS], params)[0] == greedy([BOS], 6)


# refusals


def test_prompts_that_do_not_fit() -> None:
    model = FakeModel(NOWHERE)
    params = SamplingParams(max_tokens=0)
    with pytest.raises(ValueError, match="prompt: got no token ids"):
        generate_tokens(model, [], params)
    with pytest.raises(ValueError, match=r"prompt: got 65 tokens; the context of model 'fake' is 64 tokens\. Shorten"):
        generate_tokens(model, [BOS] * 65, params)
    for token_id in (-1, 330):
        with pytest.raises(ValueError, match=f"prompt: token ids must be 0 to 329; got {token_id}"):
            generate_tokens(model, [BOS, token_id], params)
