# SPDX-License-Identifier: Apache-2.0
"""The exact recipe equals transformers' DeepseekV4ForCausalLM on its own checkpoints."""

from __future__ import annotations

import pathlib

import pytest
import torch

import megamoe

from .oracle import CASES, TOLERANCE, WAYS, OracleCase, ragged_chunks, reference_model, step_through, token_ids


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_logits_equal_transformers(case: OracleCase, way: str, tmp_path: pathlib.Path, seed: int) -> None:
    with torch.inference_mode():
        theirs = reference_model(tmp_path, case, seed, way)
        ours = megamoe.load(tmp_path, recipe="exact", dtype=torch.float32)
        ids = token_ids(max(case.lengths), theirs.config.vocab_size, seed)
        want = theirs(ids[None], use_cache=False).logits[0]
        assert 0.3 < float(want.std()) < 10, "logits must be of order 1 for the bound to mean anything"
        for length in case.lengths:
            got = ours.logits(ids[:length])
            assert got.dtype is torch.float32 and got.shape == (length, theirs.config.vocab_size)
            torch.testing.assert_close(got, want[:length], rtol=0, atol=TOLERANCE)
        if way == WAYS[0]:
            one_by_one = step_through(ours, ids, [1] * len(ids))
            torch.testing.assert_close(one_by_one, want, rtol=0, atol=TOLERANCE)
        ragged = step_through(ours, ids, ragged_chunks(len(ids), seed))
        torch.testing.assert_close(ragged, want, rtol=0, atol=TOLERANCE)


def test_oracle_cases_drop_entries() -> None:
    for case in CASES:
        top_k = case.overrides.get("index_topk", 3)
        assert max(case.lengths) // 4 > 2 * top_k, f"{case.name}: the index top-k never drops an entry"
