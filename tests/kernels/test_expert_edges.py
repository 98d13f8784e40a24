# SPDX-License-Identifier: Apache-2.0
"""Routed experts on a GPU where routings are extreme: full tiles and one more, one expert for all, many empty ones."""

from __future__ import annotations

import pytest
import torch

from megamoe.models.deepseek_v4.shapes import op_shapes
from megamoe.verify.inputs import INPUTS, routing
from megamoe.verify.ops import verify_case

OPS = ("nvfp4_experts", "nvfp4_weight_only_experts")


def test_the_extremes_are_there() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = {tokens: routing(tokens, 2, 8, generator).flatten().bincount(minlength=8) for tokens in (7, 8, 9, 17, 35)}
    assert counts[7].tolist() == [0, 0, 0, 0, 14, 0, 0, 0]
    assert counts[8].tolist() == [8, 8, 0, 0, 0, 0, 0, 0]
    assert counts[9].tolist() == [9, 9, 0, 0, 0, 0, 0, 0]
    assert counts[17].tolist() == [17, 17, 0, 0, 0, 0, 0, 0]
    assert counts[35].max() > 17 and counts[35].sum() == 70


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [7, 15, 16, 17, 24, 25, 32, 33, 63, 64, 65, 127])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("op", OPS)
def test_extreme_routings(op: str, which: int, num_tokens: int) -> None:
    verify_case(op_shapes(op)[0], INPUTS[op][which], num_tokens)
