# SPDX-License-Identifier: Apache-2.0
"""The check of kernels is itself checked: a right implementation passes, and each fault is found.

The "kernels" here are CPU functions put in the place of one, so no GPU is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megamoe.formats import fp8, mxfp4, nvfp4
from megamoe.formats.cache_rows import CachePool
from megamoe.formats.fp8 import Fp8BlockTensor, Fp8RowTensor
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.kernels import KERNELS
from megamoe.models.deepseek_v4.shapes import TABLE, op_shapes
from megamoe.ops import quantize, rms_norm, route_experts
from megamoe.ops.read_cache import read_cache
from megamoe.verify import ops as verifying
from megamoe.verify.comparisons import norm_and_quantized, routes
from megamoe.verify.inputs import INPUTS
from megamoe.verify.op_inputs import OpInputs
from megamoe.verify.ops import (
    cases,
    known_ops,
    token_counts,
    verify_case,
)
from megamoe.verify.tolerance import TOLERANCES
from megamoe.verify.values import parts

CALL = op_shapes("rms_norm")[0]
(NORM,) = INPUTS["rms_norm"]
Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def right(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A kernel as they are: the output from torch.empty, every row from its own values."""
    y = torch.empty(x.shape, dtype=x.dtype)
    y.copy_(rms_norm.reference(x, weight, 1e-6, x.dtype))
    return y


class Door:
    """The operation as verify calls it: the reference for the first call of a case, then the kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.calls = kernel, 0

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 1:
            return rms_norm.rms_norm(x, weight)
        return self.kernel(x, weight)


def run(kernel: Kernel, num_tokens: int = 9) -> None:
    verify_case(CALL, dataclasses.replace(NORM, door=Door(kernel)), num_tokens, device="cpu")


@pytest.mark.parametrize("num_tokens", token_counts(16))
def test_a_right_kernel_passes(num_tokens: int) -> None:
    run(right, num_tokens)


def _other_order_of_few(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A kernel with two paths: up to 5 tokens, and beyond, where the last bits are others."""
    y = right(x, weight)
    if x.shape[0] > 5:
        y.view(torch.int16)[:, 0] ^= 1  # one bit of a row: far inside any bound
    return y


@pytest.mark.parametrize("num_tokens", [5, 6, 9, 23])
def test_a_kernel_with_two_orders_of_sums_is_compared_on_either_side(num_tokens: int) -> None:
    until = dataclasses.replace(NORM, order_until=lambda dims: 5)
    verify_case(CALL, dataclasses.replace(until, door=Door(_other_order_of_few)), num_tokens, device="cpu")
    if num_tokens > 5:
        with pytest.raises(AssertionError, match="depends on the tokens beside it"):
            run(_other_order_of_few, num_tokens)


# one fault each


def _last_row_unwritten(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    y[:-1] = right(x, weight)[:-1]
    return y


def _one_row_too_many(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    wide = y.as_strided((x.shape[0] + 1, x.shape[1]), (x.shape[1], 1), y.storage_offset())
    wide[: x.shape[0]] = rms_norm.reference(x, weight, 1e-6, x.dtype)
    wide[-1] = 1.0
    return y


def _f9_always_the_first_tile(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    for start in range(0, x.shape[0], 4):
        y[start : start + 4] = rms_norm.reference(x[:4], weight, 1e-6, x.dtype)[: len(y[start : start + 4])]
    return y


def _f6_strides_of_the_first_call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    packed = x.as_strided(x.shape, (x.shape[1], 1), x.storage_offset())
    y.copy_(rms_norm.reference(packed, weight, 1e-6, x.dtype))
    return y


def _neighbours_matter(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    y.copy_(rms_norm.reference(x, weight, 1e-6 * (1 + 3000 * (x.shape[0] > 1)), x.dtype))
    return y


def _weight_forgotten(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return right(x, torch.ones_like(weight))


def _nothing_allocated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm.reference(x, weight, 1e-6, x.dtype)


class _OtherBitsEachTime:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y = right(x, weight)
        bits = y.view(torch.int16)
        bits[0, y[0].abs().argmin()] += (
            self.calls % 2
        )  # one unit in the last place of the smallest: far inside any bound
        return y


FAULTS: dict[str, tuple[Kernel, str]] = {
    "unwritten": (_last_row_unwritten, "is NaN"),
    "overwritten": (_one_row_too_many, "wrote 512 bytes after output 0"),
    "F9 first tile always": (_f9_always_the_first_tile, "elements differ"),
    "F6 strides kept": (_f6_strides_of_the_first_call, "at other strides differ"),
    "neighbours": (_neighbours_matter, "depends on the tokens beside it|elements differ"),
    "weight forgotten": (_weight_forgotten, "elements differ"),
    "no output to guard": (_nothing_allocated, "allocated no output with torch.empty"),
    "not repeatable": (_OtherBitsEachTime(), "a second run over other memory gives other bits"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str) -> None:
    kernel, message = FAULTS[fault]
    with pytest.raises(AssertionError, match=message):
        run(kernel)


# comparisons that are not one tolerance


def test_fused_norm_and_quantization_must_agree_with_each_other(seed: int) -> None:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed)).bfloat16()
    weight = torch.ones(256)
    from megamoe.ops.rms_norm_quantize_nvfp4 import reference

    y, q = want = reference(x, weight, 1e-6)
    nudged = y.clone()
    largest = y.abs().argmax(-1, keepdim=True)  # decides the row's scale; one unit more is within the norm's tolerance
    nudged.view(torch.int16).scatter_add_(1, largest, torch.ones_like(largest, dtype=torch.int16))
    norm_and_quantized("rms_norm_quantize_nvfp4", (nudged, quantize.quantize_nvfp4(nudged)), want, {})
    with pytest.raises(AssertionError, match="quantize_nvfp4: .* must have equal bits"):
        norm_and_quantized("rms_norm_quantize_nvfp4", (nudged, q), want, {})


def routing() -> tuple[dict[str, Any], tuple[torch.Tensor, torch.Tensor]]:
    call = op_shapes("route_experts")[0]
    arguments = INPUTS["route_experts"][1].make(call.dims, 40, torch.Generator().manual_seed(1))
    return arguments, route_experts.route_experts(**arguments)


def test_routes_of_the_reference_pass() -> None:
    arguments, want = routing()
    routes("route_experts", want, want, arguments)


def test_a_worse_expert_is_found() -> None:
    arguments, (weights, ids) = routing()
    other = ids.clone()
    free = [one for one in range(arguments["gate"].shape[0]) if one not in ids[3].tolist()]
    other[3, -1] = free[-1]
    with pytest.raises(AssertionError, match="token 3 slot 1: got expert"):
        routes("route_experts", (weights, other), (weights, ids), arguments)


def test_equal_scores_in_the_wrong_order_are_found() -> None:
    arguments, (weights, ids) = routing()
    tied = (ids == torch.tensor([0, 1])).all(-1).nonzero()
    assert len(tied), "the inputs hold ties"
    swapped = ids.clone()
    swapped[tied[0]] = swapped[tied[0]].flip(-1)
    with pytest.raises(AssertionError, match="equal ones go to the lowest"):
        routes("route_experts", (weights, swapped), (weights, ids), arguments)


def test_a_repeated_or_impossible_expert_is_found() -> None:
    arguments, (weights, ids) = routing()
    repeated = ids.clone()
    repeated[0, 1] = repeated[0, 0]
    with pytest.raises(AssertionError, match="same expert twice"):
        routes("route_experts", (weights, repeated), (weights, ids), arguments)
    repeated[0, 1] = 99
    with pytest.raises(AssertionError, match="an expert id is outside"):
        routes("route_experts", (weights, repeated), (weights, ids), arguments)
    with pytest.raises(AssertionError, match="route_experts: .* elements differ"):
        routes("route_experts", (weights * 1.01, ids), (weights, ids), arguments)


# inputs


@pytest.mark.parametrize("op", sorted(INPUTS))
def test_f7_inputs_are_quantized_data_and_not_random_bytes(op: str) -> None:
    """Containers and pools among the inputs decode: their scale bytes come from a quantizer."""
    for inputs in INPUTS[op]:
        arguments = inputs.make(op_shapes(op)[0].dims, 5, torch.Generator().manual_seed(0))
        for name, value in arguments.items():
            if isinstance(value, CachePool):
                values = read_cache(value, torch.arange(value.num_slots))
            elif isinstance(value, NvFp4Tensor | MxFp4Tensor | Fp8RowTensor | Fp8BlockTensor):
                module: Any = {NvFp4Tensor: nvfp4, MxFp4Tensor: mxfp4}.get(type(value), fp8)
                values = module.dequantize(value)
            elif isinstance(value, torch.Tensor) and value.is_floating_point():
                values = value.float()
            else:
                continue
            allowed = values.isfinite() | ((values == -torch.inf) & (name == "logits"))  # tokens that must not be drawn
            assert allowed.all() and values.count_nonzero() > 0, name
        assert all(name in arguments for name in inputs.per_token if name != "token_ids")


def test_every_operation_that_a_model_calls_can_be_verified() -> None:
    """With a kernel or without: a kernel added later needs one line of KERNELS."""
    called = {name for ops, _, _ in TABLE for name in ops.split()}
    assert set(INPUTS) == called
    assert called <= set(TOLERANCES)
    assert set(KERNELS) <= called


def test_every_kernel_has_cases_at_the_edges() -> None:
    for op in KERNELS:
        counts = {num_tokens for _, _, num_tokens in cases(op)}
        assert {0, 1} <= counts and len(counts) >= 5
    assert token_counts(16) == (0, 1, 15, 16, 17, 67)


def test_parts_take_results_apart() -> None:
    q = quantize.quantize_nvfp4(torch.ones(2, 16))
    assert list(parts((torch.ones(1), q))) == ["y0", "y1.codes", "y1.scales", "y1.tensor_scale"]


# the command


def test_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert known_ops([]) == known_ops(["all"]) == list(KERNELS)
    assert known_ops(["rms_norm", "rms_norm"]) == ["rms_norm"]
    assert verifying.run(["rms_nrom"], arch=None, pack=None, as_json=False) == 2
    assert "no kernel for rms_nrom; kernels exist for rms_norm" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert verifying.main(["rms_norm", "--arch", "sm90a"]) == 2
    assert capsys.readouterr().err.startswith("megamoe: error: verify: there is no CUDA device here; run it on")


def test_outcomes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_for_one_token(call: Any, inputs: OpInputs, num_tokens: int) -> None:
        assert num_tokens != 1, "wrong"

    monkeypatch.setattr(verifying, "verify_case", fail_for_one_token)
    outcomes = verifying.verify_ops(["hyper_connection_post"])
    assert {one.num_tokens for one in outcomes if one.error} == {1} and len(outcomes) == len(
        list(cases("hyper_connection_post"))
    )
