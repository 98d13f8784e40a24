# SPDX-License-Identifier: Apache-2.0
"""verify over every operation that has inputs, without a GPU: right stand-ins pass, each fault in each output is found.

A check that calls a right kernel wrong costs a day on a GPU, and one that passes a wrong kernel costs more. Sizes are
the smallest model's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megamoe.models.deepseek_v4.shapes import OpCall, op_shapes
from megamoe.verify.inputs import INPUTS
from megamoe.verify.op_inputs import OpInputs
from megamoe.verify.ops import verify_case
from megamoe.verify.values import parts, whole_storage

from .stand_in import IN_PLACE_FAULTS, OUTPUT_FAULTS, install, storages

FEW = 5


def calls(op: str) -> list[OpCall]:
    """Return the calls of the smallest model that differ in kind: in names of dimensions, or in one that is 0 or 1."""
    kinds = {
        tuple((name, min(size, 2)) for name, size in call.dims.items()): call
        for call in reversed(op_shapes(op))
        if call.model == "tiny"
    }
    return list(kinds.values())


CASES = [(call, inputs) for op in sorted(INPUTS) for call in calls(op) for inputs in INPUTS[op]]
IDS = [f"{call.op}-{INPUTS[call.op].index(inputs)}-{call.where}" for call, inputs in CASES]


@pytest.mark.parametrize(("call", "inputs"), CASES, ids=IDS)
def test_a_right_kernel_passes(call: OpCall, inputs: OpInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = install(monkeypatch, call.op, inputs)
    for num_tokens in (0, 1, FEW, 17):
        verify_case(call, inputs, num_tokens, device="cpu")
    assert kernel.calls >= 3 * 4, "verify ran the reference and not the stand-in"


def outputs_of(call: OpCall, inputs: OpInputs) -> list[int]:
    """Return which tensors of a result a kernel makes, or which of the arguments it changes; not those it was given."""
    if inputs.written:
        return list(range(len(inputs.written)))
    arguments = inputs.make(call.dims, FEW, torch.Generator().manual_seed(0))
    given = {one.data_ptr() for one in storages(arguments.values())}
    made = parts(inputs.door(**arguments)).values()
    return [index for index, one in enumerate(made) if whole_storage(one).data_ptr() not in given]


FAULTS = [
    pytest.param(call, inputs, fault, id=f"{name}-{fault}")
    for (call, inputs), name in zip(CASES, IDS, strict=True)
    for fault in (IN_PLACE_FAULTS if inputs.written else OUTPUT_FAULTS)
]


@pytest.mark.parametrize(("call", "inputs", "fault"), FAULTS)
def test_a_wrong_kernel_is_found(call: OpCall, inputs: OpInputs, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for which in outputs_of(call, inputs):
        with monkeypatch.context() as patch:
            install(patch, call.op, inputs, fault, which)
            with pytest.raises(AssertionError):
                verify_case(call, inputs, FEW, device="cpu")


def test_89bf0ab_a_tiled_result_is_not_compared_with_a_row_major_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The false alarm as it was: the last token among others by rows, the same token alone by tiles."""
    call, inputs = op_shapes("quantize_nvfp4")[0], INPUTS["quantize_nvfp4"][2]
    install(monkeypatch, call.op, inputs)
    verify_case(call, inputs, FEW, device="cpu")

    def part(result: Any, arguments: dict[str, Any], index: torch.Tensor) -> Any:
        return result if len(index) == result.shape[0] else inputs.part(result, arguments, index)

    with pytest.raises(AssertionError, match="y.scales of the last token depends on the tokens beside it"):
        verify_case(call, dataclasses.replace(inputs, part=part), FEW, device="cpu")
