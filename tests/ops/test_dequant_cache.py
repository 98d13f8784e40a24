# SPDX-License-Identifier: Apache-2.0
"""DequantCache: decodes once, never serves a stale or a foreign weight, stays within its bound."""

from __future__ import annotations

import gc

import pytest
import torch

from megamoe.formats import fp8, nvfp4
from megamoe.ops import dequant_cache
from megamoe.ops.dequant_cache import DequantCache


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every weight that is decoded during the test."""
    log: list[object] = []
    original = dequant_cache._dequantize

    def spy(weight: dequant_cache.Weight) -> torch.Tensor:
        log.append(type(weight))
        return original(weight)

    monkeypatch.setattr(dequant_cache, "_dequantize", spy)
    return log


def test_values_are_those_of_the_formats() -> None:
    values = torch.randn(3, 32, 32)
    cache = DequantCache()
    w4 = nvfp4.quantize(values)
    assert torch.equal(cache.get(w4), nvfp4.dequantize(w4))
    assert torch.equal(cache.get(w4, 1), nvfp4.dequantize(w4)[1])
    w8 = fp8.quantize_blocks(values[0])
    assert torch.equal(cache.get(w8), fp8.dequantize(w8))
    plain = values.bfloat16()
    assert torch.equal(cache.get(plain, 2), plain[2].float())


def test_a_weight_is_decoded_once(decoded: list[object]) -> None:
    cache, weight = DequantCache(), nvfp4.quantize(torch.randn(2, 16, 16))
    first = cache.get(weight, 0)
    assert cache.get(weight, 0) is first
    assert cache.get(weight, 1) is not first
    assert len(decoded) == 2 and len(cache) == 2
    assert cache.num_bytes == 2 * 16 * 16 * 4


def test_fp32_weights_are_returned_as_they_are(decoded: list[object]) -> None:
    cache, weight = DequantCache(), torch.randn(2, 4, 4)
    assert cache.get(weight) is weight
    assert cache.get(weight, 1).data_ptr() == weight[1].data_ptr()
    assert decoded == [] and len(cache) == 0


@pytest.mark.parametrize("part", ["codes", "scales", "tensor_scale"])
def test_a_change_in_place_is_seen(part: str) -> None:
    cache, weight = DequantCache(), nvfp4.quantize(torch.randn(16, 16))
    cache.get(weight)
    getattr(weight, part).copy_(getattr(nvfp4.quantize(torch.randn(16, 16) * 3), part))
    assert torch.equal(cache.get(weight), nvfp4.dequantize(weight))
    assert len(cache) == 1 and cache.num_bytes == 16 * 16 * 4


def test_tensors_of_inference_mode_are_served() -> None:
    with torch.inference_mode():
        weight = torch.randn(4, 4).bfloat16()
        cache = DequantCache()
        assert cache.get(weight) is cache.get(weight)


def test_entries_leave_with_their_weight(decoded: list[object]) -> None:
    cache = DequantCache()
    for _ in range(20):  # new weights reuse the ids of old ones
        weight = nvfp4.quantize(torch.randn(16, 16))
        assert torch.equal(cache.get(weight), nvfp4.dequantize(weight))
        assert len(cache) == 1
    del weight
    gc.collect()
    assert len(cache) == 0 and cache.num_bytes == 0


def test_the_least_recently_used_goes_first(decoded: list[object]) -> None:
    weights = [torch.randn(8, 8).bfloat16() for _ in range(3)]
    cache = DequantCache(limit_bytes=2 * 8 * 8 * 4)
    cache.get(weights[0])
    cache.get(weights[1])
    cache.get(weights[0])
    cache.get(weights[2])
    assert cache.num_bytes == cache.limit_bytes
    decoded.clear()
    cache.get(weights[0])
    assert decoded == []
    cache.get(weights[1])
    assert len(decoded) == 1


def test_a_weight_beyond_the_bound_is_not_kept() -> None:
    cache, weight = DequantCache(limit_bytes=10), torch.randn(8, 8).bfloat16()
    assert torch.equal(cache.get(weight), weight.float())
    assert len(cache) == 0 and cache.num_bytes == 0


def test_clear() -> None:
    cache, weight = DequantCache(), torch.randn(8, 8).bfloat16()
    cache.get(weight)
    cache.clear()
    assert len(cache) == 0 and cache.num_bytes == 0
    assert torch.equal(cache.get(weight), weight.float())
