# SPDX-License-Identifier: Apache-2.0
"""A decode step of the bundled model asks the device for nothing: not when it is planned, not while it runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import megamoe
from megamoe.cache.batch import Batch
from megamoe.cache.pools import CacheSize
from megamoe.models.deepseek_v4.model import Model
from megamoe.models.recipe import RECIPES

from ...host_reads import HostReads, count_host_reads

PROMPT = 130  # tokens before the step: every kind of layer has entries


@torch.inference_mode()
def decode(model: Model, num_sequences: int) -> HostReads:
    """Fill `num_sequences` sequences, then run two steps of a token each and count the second.

    The first of its size makes the views of host memory that all others of that size write to.
    """
    pages = -(-(PROMPT + 2) // model.tokens_per_page)
    size = CacheSize(
        num_sequences=num_sequences,
        num_pages=pages * num_sequences,
        tokens_per_page=model.tokens_per_page,
        ring_tokens=1,
        step_tokens=PROMPT,
    )
    cache = model.new_shared_cache(size, 0, max_tokens=PROMPT + 2, with_drafts=False)

    def step(rings: list[int], start: int, count: int) -> torch.Tensor:
        ids = np.arange(len(rings) * count) % 200 + 3
        starts, counts = np.full(len(rings), start), np.full(len(rings), count)
        plan = cache.plan(Batch(ids, starts, counts, np.array(rings)))
        return model.logits_of(model.run(plan, cache), None)

    for ring in range(num_sequences):
        cache.set_pages(ring, range(ring * pages, (ring + 1) * pages))
        step([ring], 0, PROMPT)
    everyone = list(range(num_sequences))
    step(everyone, PROMPT, 1)
    with count_host_reads() as reads:
        logits = step(everyone, PROMPT + 1, 1)
    assert logits.shape == (num_sequences, model.config.vocab_size) and bool(logits.isfinite().all())
    return reads


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("num_sequences", [1, 8])
def test_a_decode_step_reads_nothing_back(recipe: str, num_sequences: int) -> None:
    reads = decode(megamoe.load("tiny", recipe=recipe), num_sequences)
    assert len(reads.operations) > 50  # it did run
    assert reads.places == []
