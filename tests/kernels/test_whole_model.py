# SPDX-License-Identifier: Apache-2.0
"""Which operations of a whole DeepSeek-V4 have no kernel on Hopper, by name: every model, recipe, draft and format."""

from __future__ import annotations

import pathlib

import pytest

from megamoe.kernels import KERNELS
from megamoe.kernels.plan import requests_for
from megamoe.models.deepseek_v4.calls import model_calls, pairs
from megamoe.models.deepseek_v4.layout import Format
from megamoe.models.deepseek_v4.shapes import MODELS
from megamoe.models.recipe import get_recipe

from ..models.deepseek_v4.test_calls import QUANTIZED, config_of

DRAFTS: dict[str, dict[str, int]] = {"no draft": {}, "classic draft": {"num_mtp": 1}, "DSpark draft": {"num_dspark": 1}}
STORED: dict[str, tuple[Format, Format]] = {
    "nvfp4": (Format.NVFP4, Format.NVFP4),
    "nvfp4 experts": (Format.PLAIN, Format.NVFP4),
    "released": (Format.FP8, Format.MXFP4),
    "fp8": (Format.FP8, Format.FP8),
    "bf16": (Format.PLAIN, Format.PLAIN),
}
"""Name → how linears and how experts are stored."""

MISSING = {"fp8": {"fp8_experts"}, "bf16": {"experts"}}
"""What has no kernel on Hopper, by how a checkpoint is stored. Such a checkpoint is refused, and converted to run."""


class Formats(dict[str, Format]):
    """The format of every weight of a checkpoint, whatever its name."""

    def __init__(self, linears: Format, experts: Format) -> None:
        super().__init__()
        self.linears, self.experts = linears, experts

    def __missing__(self, name: str) -> Format:
        return self.experts if ".experts." in name else self.linears


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("recipe", QUANTIZED)
@pytest.mark.parametrize("model", MODELS)
def test_every_operation_has_a_kernel(
    model: str, recipe: str, draft: str, stored: str, repository: pathlib.Path
) -> None:
    config = config_of(model, repository)
    calls = model_calls(config, Formats(*STORED[stored]), get_recipe(recipe), **DRAFTS[draft])
    assert {one.op for one in calls if "sm90" not in KERNELS.get(one.op, {})} == MISSING.get(stored, set())
    assert requests_for(pairs(calls), "sm90a")
