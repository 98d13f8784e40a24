# SPDX-License-Identifier: Apache-2.0
"""Kernels over rows of logits: the edges that the cases of verify do not reach."""

from __future__ import annotations

import math

import pytest
import torch

from megamoe.kernels.parts.launch import MAX_COLUMNS
from megamoe.kernels.sampling import sample as sample_host
from megamoe.kernels.sampling import token_logprobs as logprobs_host
from megamoe.ops.penalize import penalize
from megamoe.ops.sample import sample
from megamoe.ops.token_logprobs import token_logprobs

VOCAB = 129280
INF = math.inf


def test_rows_wider_than_a_cluster_holds_are_refused() -> None:
    logits, row = torch.empty(1, MAX_COLUMNS + 1, device="meta"), torch.empty(1, device="meta")
    with pytest.raises(NotImplementedError, match="sample: the kernel takes up to 131072 columns; got 131073"):
        sample_host.run(logits, row, row.long(), row, None, row)
    with pytest.raises(NotImplementedError, match="token_logprobs: the kernel takes up to 131072 columns; got 131073"):
        logprobs_host.run(logits, row.long(), 1)


def column(value: object, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.full((num_rows,), value, dtype=dtype)


def check_sample(logits: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=None, uniform=None) -> None:
    """Compare tokens with those of the reference."""
    num_rows = logits.shape[0]
    floats = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
    arguments = {name: column(one, num_rows, torch.float32) for name, one in floats.items() if one is not None}
    arguments["uniform"] = torch.arange(num_rows) / (num_rows + 0.5) if uniform is None else torch.tensor(uniform)
    arguments["top_k"] = column(top_k, num_rows, torch.int64)
    want = sample(logits, **arguments)
    got = sample(logits.cuda(), **{name: one.cuda() for name, one in arguments.items()})
    assert got.tolist() == want.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1, 2, 31, 255, 256, 257, 4095, 50001, MAX_COLUMNS])
def test_any_number_of_columns(vocab: int, seed: int) -> None:
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(seed)) * 4
    check_sample(logits, 0.0)
    check_sample(logits)
    check_sample(logits, 0.8, top_k=min(40, vocab))
    check_sample(logits, 1.3, top_p=0.9)
    check_sample(logits, 1.1, min(200, vocab), 0.95, 0.02)
    ids = torch.arange(6) % vocab
    for num_top in {min(vocab, 5), min(vocab, 70)}:  # a few leave places of the lists as the kernel before left them
        want = token_logprobs(logits, ids, num_top=num_top)
        got = token_logprobs(logits.cuda(), ids.cuda(), num_top=num_top)
        assert torch.equal(got.top_ids.cpu(), want.top_ids)
        torch.testing.assert_close(got.top.cpu(), want.top, rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(got.chosen.cpu(), want.chosen, rtol=1e-6, atol=2e-6)


@pytest.mark.gpu
def test_ties_and_rows_of_one_token(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for logits in (torch.zeros(8, VOCAB), torch.randn(8, VOCAB, generator=generator).bfloat16().float() * 4):
        check_sample(logits, 0.0)
        check_sample(logits)
        check_sample(logits, 1.0, 1000, 0.5, 0.5)
    one = torch.full((8, VOCAB), -INF)
    one[torch.arange(8), torch.tensor([0, 1, 16159, 16160, 16161, 77777, VOCAB - 2, VOCAB - 1])] = -3.0
    check_sample(one, 0.0)
    check_sample(one, 1.0, 5, 0.5)
    zeros = torch.full((2, VOCAB), -0.0)
    zeros[:, 5] = 0.0
    check_sample(zeros, 0.0)
    check_sample(zeros, 1.0, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 4.0, 3e37])
@pytest.mark.parametrize("temperature", [1e-38, 1e-3, 1.0, 1e6, 1e38])
def test_any_range_of_logits_and_temperature(scale: float, temperature: float, seed: int) -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale
    check_sample(logits, temperature)
    check_sample(logits, temperature, 70000, 0.7)


@pytest.mark.gpu
def test_the_ends_of_every_parameter(seed: int) -> None:
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    check_sample(logits, uniform=[0.0, 1 - 2.0**-24] * 4)
    check_sample(logits, top_p=torch.tensor([1e-45, 1 - 2.0**-24] * 4), min_p=1.0)
    check_sample(logits, top_k=torch.tensor([-1, 0, -1, 2**40, 2**31, 2**32 + 5, 1, -1]), top_p=0.9)


@pytest.mark.gpu
def test_values_that_the_reference_refuses_give_tokens_and_no_hang() -> None:
    logits = torch.randn(5, VOCAB, device="cuda")
    logits[0, 7], logits[1], logits[2, 9], logits[3] = math.nan, -INF, INF, math.nan
    one = torch.ones(5, device="cuda")
    ids = sample(logits, temperature=one, top_k=0 * one.long(), top_p=0.9 * one, uniform=0.5 * one).tolist()
    assert ids[0] == 7 and ids[2] == 9 and all(0 <= token < VOCAB for token in ids)


@pytest.mark.gpu
def test_lists_longer_than_a_block_finds_at_once_with_ties_at_their_borders(seed: int) -> None:
    """The best tokens all lie in one block's share, or alternate between shares; equal ones straddle the list's end."""
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(seed)).mul(2).round()
    logits[1, 100:180] = 50.0
    logits[2, :: VOCAB // 80] = 60.0
    logits[3] = -INF
    logits[3, 5:70] = 1.0
    ids = torch.tensor([3, 100, -1, 6])
    want, got = token_logprobs(logits, ids, num_top=67), token_logprobs(logits.cuda(), ids.cuda(), num_top=67)
    assert torch.equal(got.top_ids.cpu()[:3], want.top_ids[:3])
    assert torch.equal(got.top_ids.cpu()[3, :65], want.top_ids[3, :65])
    torch.testing.assert_close(got.top.cpu(), want.top, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(got.chosen.cpu(), want.chosen, rtol=1e-6, atol=2e-6)


@pytest.mark.gpu
def test_pairs_outside_the_logits_change_nothing() -> None:
    """Beyond 2^32, whose low half is a row that exists, too."""
    logits = torch.ones(2, 300, device="cuda")
    rows = torch.tensor([0, 2, 2**32, -1, 1, 1], device="cuda")
    tokens = torch.tensor([2**32 + 1, 0, 0, 0, 300, 7], device="cuda")
    numbers = torch.full((2,), 2.0, device="cuda")
    penalize(
        logits, rows, tokens, torch.ones(6, device="cuda"), repetition=numbers, presence=numbers, frequency=numbers
    )
    want = torch.ones(2, 300)
    want[1, 7] = 1 / 2 - 2 - 2
    assert torch.equal(logits.cpu(), want)


@pytest.mark.gpu
def test_a_graph_draws_greedily_or_not_as_its_rows_say(seed: int) -> None:
    """One capture serves steps of any mix: what a row asks for is read on the device."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, VOCAB, generator=generator) * 4
    asked = {
        "temperature": torch.zeros(3),
        "top_k": torch.zeros(3, dtype=torch.int64),
        "top_p": torch.ones(3),
        "uniform": torch.zeros(3),
    }
    held, rows = {name: one.cuda() for name, one in asked.items()}, logits.cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sample(rows, **held)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            ids = sample(rows, **held)
    for step in range(3):
        asked["temperature"] = torch.tensor([0.0, 1.0, 1.5]).roll(step)
        asked["top_k"] = torch.tensor([-1, 40, 0]).roll(2 * step)
        asked["uniform"] = torch.rand(3, generator=generator)
        for name, one in asked.items():
            held[name].copy_(one)
        graph.replay()
        torch.cuda.synchronize()
        assert ids.tolist() == sample(logits, **asked).tolist()
