# SPDX-License-Identifier: Apache-2.0
"""Operations with kernels are single nodes for torch.export and torch.compile, and their fakes tell the truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megamoe.formats.fp8 import Fp8BlockTensor, Fp8RowTensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.kernels import KERNELS
from megamoe.models.deepseek_v4.shapes import OpCall, op_shapes
from megamoe.ops import dispatch
from megamoe.verify.inputs import INPUTS, kernel_inputs
from megamoe.verify.op_inputs import Arguments, OpInputs
from megamoe.verify.values import parts

CASES = [
    (op_shapes(op)[0], inputs, which)
    for op in KERNELS
    if op in dispatch._TRACED  # the others work on pools and plans, which no traced graph holds
    for which, inputs in enumerate(kernel_inputs(op))
]
CASES += [(call, INPUTS["route_experts"][1], 2) for call in op_shapes("route_experts")[1:2]]
IDS = [f"{call.op}-{which}" for call, _, which in CASES]


def make(call: OpCall, inputs: OpInputs, num_tokens: int, seed: int) -> tuple[Arguments, dict[str, torch.Tensor]]:
    arguments = inputs.make(call.dims, num_tokens, torch.Generator().manual_seed(seed))
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    return {name: value for name, value in arguments.items() if name not in tensors}, tensors


class Call(torch.nn.Module):
    """An operation with its other arguments bound, returning plain tensors."""

    def __init__(self, door: Callable[..., Any], other: Arguments) -> None:
        super().__init__()
        self.door, self.other = door, other

    def forward(self, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return list(parts(self.door(**tensors, **self.other)).values())


def faked(value: Any, mode: FakeTensorMode) -> Any:
    """Return a container, or several, with fake tensors; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(faked(one, mode) for one in value)
    if not isinstance(value, NvFp4Tensor | Fp8RowTensor | Fp8BlockTensor):
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    tensors = {name: one for name, one in fields.items() if isinstance(one, torch.Tensor)}
    return dataclasses.replace(value, **{name: mode.from_tensor(tensor) for name, tensor in tensors.items()})


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        left, right = (part.clone(memory_format=torch.contiguous_format).reshape(-1) for part in (one, other))
        assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize(("call", "inputs", "which"), CASES, ids=IDS)
def test_export_has_one_node_and_gives_the_same(call: OpCall, inputs: OpInputs, which: int, seed: int) -> None:
    other, tensors = make(call, inputs, 5, seed)
    module = Call(inputs.door, other)
    program = torch.export.export(module, (tensors,))
    ours = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("megamoe.")]
    assert len(ours) == 1 and ours[0].startswith(f"megamoe.{call.op}"), ours
    same(program.module()(tensors), module(tensors))


@pytest.mark.parametrize(("call", "inputs", "which"), CASES, ids=IDS)
def test_compile_makes_one_graph(call: OpCall, inputs: OpInputs, which: int, seed: int) -> None:
    other, tensors = make(call, inputs, 4, seed)
    torch.compiler.reset()
    compiled = torch.compile(Call(inputs.door, other), backend="aot_eager", fullgraph=True)
    same(compiled(tensors), Call(inputs.door, other)(tensors))


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize(("call", "inputs", "which"), CASES, ids=IDS)
def test_fake_shapes_are_the_references(
    call: OpCall, inputs: OpInputs, which: int, num_tokens: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, tensors = make(call, inputs, num_tokens, seed)
    want = Call(inputs.door, other)(tensors)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # what the dispatch rule asks
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) for name, value in tensors.items()}
        got = Call(inputs.door, {name: faked(value, mode) for name, value in other.items()})(fake)
    facts = [[(one.shape, one.dtype, one.is_contiguous()) for one in result] for result in (got, want)]
    assert facts[0] == facts[1]


@pytest.mark.parametrize(("call", "inputs", "which"), CASES, ids=IDS)
def test_torchs_own_check_of_operators(call: OpCall, inputs: OpInputs, which: int, seed: int) -> None:
    """No hidden mutation or aliasing, and fakes agree under torch's own harness."""
    other, tensors = make(call, inputs, 3, seed)
    seen: list[tuple[Any, tuple[Any, ...]]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "megamoe":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    program = torch.export.export(Call(inputs.door, other), (tensors,)).module()
    with Recorder():
        program(tensors)
    ((operator, arguments),) = seen
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
