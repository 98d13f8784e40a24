# SPDX-License-Identifier: Apache-2.0
"""token_logprobs: by hand, against fp64, independent rows, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from megamoe.ops.token_logprobs import token_logprobs

from .invariance import assert_row_invariant

# --- known answers ---


def test_three_tokens() -> None:
    logits = torch.tensor([[0.3, 0.2, 0.5]]).log() + 7.0
    found = token_logprobs(logits, torch.tensor([1]), num_top=2)
    assert found.top_ids.tolist() == [[2, 0]]
    torch.testing.assert_close(found.chosen, torch.tensor([math.log(0.2)]))
    torch.testing.assert_close(found.top, torch.tensor([[math.log(0.5), math.log(0.3)]]))


def test_equal_logits_come_by_id_and_masked_ones_last() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    found = token_logprobs(logits, torch.tensor([1]), num_top=9)
    assert found.top_ids.tolist() == [[0, 2, 1]]
    assert found.chosen.tolist() == [-math.inf] and found.top[0, 2] == -math.inf


def test_edge_sizes() -> None:
    assert token_logprobs(torch.zeros(1, 1), torch.tensor([0]), num_top=1).chosen.tolist() == [0.0]
    none = token_logprobs(torch.zeros(2, 3), torch.tensor([0, 2]), num_top=0)
    assert none.top_ids.shape == none.top.shape == (2, 0)
    empty = token_logprobs(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), num_top=2)
    assert empty.chosen.shape == (0,) and empty.top.shape == (0, 2)


# --- properties ---


@pytest.mark.parametrize("vocab_size", [2, 127, 4096, 4099])
def test_against_fp64(vocab_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, vocab_size, generator=generator) * 10
    ids = torch.randint(0, vocab_size, (9,), generator=generator)
    found = token_logprobs(logits, ids, num_top=2)
    want = logits.double().log_softmax(-1)
    torch.testing.assert_close(found.chosen.double(), want.gather(1, ids[:, None])[:, 0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(found.top.double(), want.topk(2).values, rtol=1e-6, atol=2e-6)


def test_row_invariant(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, ids = torch.randn(40, 999, generator=generator), torch.randint(0, 999, (40,), generator=generator)
    assert_row_invariant(lambda rows, chosen: tuple(token_logprobs(rows, chosen, num_top=5)), logits, ids)


# --- refusals ---


def test_refusals() -> None:
    for bad in (-2, 3):
        with pytest.raises(ValueError, match=f"token_ids must be 0 to 2, or -1 for nobody; got {bad}"):
            token_logprobs(torch.zeros(1, 3), torch.tensor([bad]), num_top=0)
    with pytest.raises(ValueError, match="num_top >= 0"):
        token_logprobs(torch.zeros(1, 3), torch.tensor([0]), num_top=-1)
    with pytest.raises(ValueError, match="a column of logits"):
        token_logprobs(torch.zeros(1, 0), torch.tensor([0]), num_top=0)
    with pytest.raises(TypeError, match="logits must be float32"):
        token_logprobs(torch.zeros(1, 3).bfloat16(), torch.tensor([0]), num_top=0)
