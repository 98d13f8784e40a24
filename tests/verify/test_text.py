# SPDX-License-Identifier: Apache-2.0
"""A device that writes the CPU's text passes; one that is a little off is told apart from one that is wrong."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from megamoe.cli import main
from megamoe.models.deepseek_v4.model import Model
from megamoe.models.load import load
from megamoe.verify.text import compare, errors_of, led_along, report, sample_prompts, text_of


@pytest.fixture(scope="module")
def on_cpu() -> Model:
    return load("tiny")


def logits(seed: int = 0, num_positions: int = 200, vocab: int = 50) -> torch.Tensor:
    return torch.randn(num_positions, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_a_shift_of_all_logits_is_no_error() -> None:
    want = logits()
    assert float(errors_of(want + 5, want).max()) < 1e-5
    assert torch.allclose(errors_of(want + torch.tensor([1.0, -1.0]).repeat(25), want), torch.ones(200).double())


def test_another_token_counts_where_there_was_no_doubt() -> None:
    want = logits()
    got = want + 0.001 * logits(1)
    error, largest, _, in_doubt, swaps, _ = compare([got], [want])
    assert 0.001 < error <= largest < 0.006 and in_doubt <= 2 and swaps == ()
    best = want[17].topk(2)
    got[17, best.indices] = best.values.flip(0)  # two tokens change their places at one position
    found = compare([got[:10], got[10:]], [want[:10], want[10:]])[4]
    assert [(one.prompt, one.position, one.cpu, one.device) for one in found] == [(1, 7, *best.indices.tolist())]


def test_a_small_gap_is_doubt_and_much_of_it_fails(on_cpu: Model) -> None:
    want = logits()
    error, _, _, in_doubt, swaps, in_doubt_swaps = compare([want + logits(1)], [want])
    assert error > 2 and in_doubt > 100 and in_doubt_swaps > 20 and len(swaps) < 20


def test_a_model_beside_itself_writes_the_same(on_cpu: Model) -> None:
    seen = report(on_cpu, on_cpu, prompts=2, prompt_tokens=30, new_tokens=5)
    assert seen.passed and seen.error == 0.0 and seen.positions == 10
    assert all(one.same_tokens == 5 and one.text == one.cpu_text for one in seen.free)
    assert text_of(seen).endswith("the same text")


def test_a_model_that_is_wrong_is_noticed(on_cpu: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    other = load("tiny")
    right = other.head
    monkeypatch.setattr(other, "head", lambda *arguments: right(*arguments).roll(1, dims=-1))
    seen = report(other, on_cpu, prompts=2, prompt_tokens=30, new_tokens=5)
    assert not seen.passed and seen.error > 1
    assert "not the same text" in text_of(seen) and "cpu: " in text_of(seen)


def test_doubt_at_too_many_positions_fails_and_the_aim_is_told(on_cpu: Model) -> None:
    seen = report(on_cpu, on_cpu, prompts=1, prompt_tokens=10, new_tokens=2)
    assert "in doubt 0.0%: the aim of 1% is met" in text_of(seen)
    some = dataclasses.replace(seen, positions=100, in_doubt=8)
    assert some.passed and "in doubt 8.0%: the aim of 1% is missed" in text_of(some)
    many = dataclasses.replace(some, in_doubt=9)
    assert not many.passed and "DOUBT at more than 8% of the positions" in text_of(many)
    assert dataclasses.replace(many, recipe="w4a4").passed


def test_being_led_reads_the_tokens_it_is_given(on_cpu: Model) -> None:
    prompt, ids = torch.arange(3, 20), torch.tensor([9, 8, 7])
    want = on_cpu.logits(torch.cat((prompt, ids[:2])))[-3:]
    assert torch.equal(led_along(on_cpu, prompt, ids), want)


def test_prompts_begin_with_bos_and_are_parts_of_the_text(on_cpu: Model) -> None:
    prompts = sample_prompts(on_cpu, 8, 257)
    assert {len(one) for one in prompts} == {257} and {int(one[0]) for one in prompts} == {0}
    assert len({tuple(one.tolist()) for one in prompts}) == 8
    assert sample_prompts(on_cpu, 1, 5000)[0].shape == (5000,)  # longer than the text


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    counts = ["--prompts", "1", "--prompt-tokens", "10", "--decode-tokens", "2"]
    assert main(["verify", "--text", *counts, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["passed"] and seen["positions"] == 2 and seen["device"] == "cpu"
    assert main(["verify", "--text", "--layers"]) == 2
    assert "--layers goes with --model" in capsys.readouterr().err
    assert main(["verify", "--text", "--decode-tokens", "0"]) == 2
    assert "must be >= 1" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["w4a16", "w4a4"])
def test_a_gpu_writes_the_text_of_the_cpu(recipe: str, on_cpu: Model) -> None:
    model = load("tiny", recipe=recipe, device="cuda")
    beside = on_cpu if recipe == "w4a16" else load("tiny", recipe=recipe)
    seen = report(model, beside, prompts=8, prompt_tokens=256, new_tokens=64)
    print(text_of(seen))
    assert seen.passed and seen.error < {"w4a16": 0.12, "w4a4": 1.6}[recipe]
