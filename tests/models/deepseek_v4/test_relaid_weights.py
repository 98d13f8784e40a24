# SPDX-License-Identifier: Apache-2.0
"""NVFP4 weights in the order a device's kernels take: brought into it once, one at a time, with the same values."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from megamoe.checkpoint import CheckpointReader
from megamoe.formats import nvfp4
from megamoe.formats.fragment_layout import CodeLayout, codes_to_fragments
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.models.deepseek_v4.config import load_config
from megamoe.models.deepseek_v4.weights import ModelWeights, WeightLoader
from megamoe.models.load import BUNDLED

from ...fake_files import fake

FRAGMENTS = dict.fromkeys(("linear", "grouped", "experts"), CodeLayout.FRAGMENT_16X64)


def load(directory: pathlib.Path, layouts: Mapping[str, CodeLayout] | None = None) -> ModelWeights:
    with CheckpointReader(directory) as reader:
        loader = WeightLoader(reader, load_config(directory), dequantize=False, dtype=torch.bfloat16)
        return loader.load(layouts)


def quantized(weights: Any, where: str = "") -> Iterator[tuple[str, NvFp4Tensor]]:
    """Yield every NVFP4 weight with its place."""
    if isinstance(weights, NvFp4Tensor):
        yield where, weights
    elif isinstance(weights, tuple):
        for index, one in enumerate(weights):
            yield from quantized(one, f"{where}.{index}")
    elif dataclasses.is_dataclass(weights):
        for field in dataclasses.fields(weights):
            yield from quantized(getattr(weights, field.name), f"{where}.{field.name}")


@pytest.fixture(params=["bundled", "preview"])
def directory(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    """All linears in NVFP4; and MXFP4 experts, which are recoded, beside FP8 linears."""
    if request.param == "bundled":
        return BUNDLED["tiny"]
    fake.write_fake(tmp_path, "small", "preview")
    return tmp_path


def test_every_weight_is_brought_into_order_once_and_one_at_a_time(
    directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[torch.Size] = []

    def recording(codes: torch.Tensor) -> torch.Tensor:
        converted.append(codes.shape)
        return codes_to_fragments(codes)

    plain = dict(quantized(load(directory)))
    monkeypatch.setattr(nvfp4, "codes_to_fragments", recording)
    weights = load(directory, FRAGMENTS)
    relaid = dict(quantized(weights))
    assert relaid.keys() == plain.keys() and len(relaid) >= 12
    parts = [one for one in relaid.values() if one.scale_per == "tensor"]  # a stack is made of parts in order
    num_matrices = sum(one.tensor_scale.numel() for one in parts)
    assert weights.num_relaid == num_matrices == sum(shape[0] if len(shape) == 3 else 1 for shape in converted)
    groups = load_config(directory).o_groups
    assert {shape[0] for shape in converted if len(shape) == 3} <= {groups}, "experts come one by one, not as a stack"
    for where, one in relaid.items():
        assert one.code_layout is CodeLayout.FRAGMENT_16X64, where
        back, want = one.row_major(), plain[where]
        assert torch.equal(back.codes, want.codes) and torch.equal(back.tensor_scale, want.tensor_scale), where
        assert torch.equal(back.scales.view(torch.uint8), want.scales.view(torch.uint8)), where
    before = len(converted)
    assert all(one.fragments() is one for one in relaid.values()) and len(converted) == before


def test_nothing_is_converted_where_nothing_is_asked(directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvfp4, "codes_to_fragments", None)  # would raise
    weights = load(directory)
    assert weights.num_relaid == 0
    assert all(one.code_layout is CodeLayout.ROW_MAJOR for _, one in quantized(weights))


def test_each_kind_has_its_own_order() -> None:
    weights = load(BUNDLED["tiny"], {"experts": CodeLayout.FRAGMENT_16X64})
    orders = {where.rpartition(".")[2]: one.code_layout for where, one in quantized(weights)}
    assert {name for name, order in orders.items() if order is CodeLayout.FRAGMENT_16X64} == {"w1", "w2", "w3"}
