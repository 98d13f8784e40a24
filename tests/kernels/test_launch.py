# SPDX-License-Identifier: Apache-2.0
"""How kernels are launched, on a GPU: on torch's current stream, in CUDA graphs, without a synchronization.

F6: a compiled kernel used again for other addresses, strides and shapes. F9: a loop over tiles that always takes the
first. F12: a graph replayed after the buffers of its capture were let go.
"""

from __future__ import annotations

import gc

import pytest
import torch

from megamoe.formats.cache_rows import CachePool
from megamoe.kernels import KERNELS
from megamoe.models.deepseek_v4.shapes import OpCall, op_shapes
from megamoe.verify.inputs import kernel_inputs
from megamoe.verify.op_inputs import Arguments, OpInputs
from megamoe.verify.ops import verify_case
from megamoe.verify.values import copied, parts, whole_storage

pytestmark = pytest.mark.gpu

# The smallest model's first shape, and Flash's: rows inside a warp, and rows across warps.
CASES = [
    (call, inputs)
    for op in KERNELS
    for model in ("tiny", "flash")
    for call in [one for one in op_shapes(op) if one.model == model][:1]
    for inputs in kernel_inputs(op)
]
IDS = [f"{call.op} {call}" for call, _ in CASES]


def make(call: OpCall, inputs: OpInputs, num_tokens: int, seed: int) -> Arguments:
    return inputs.make(call.dims, num_tokens, torch.Generator("cuda").manual_seed(seed))


def on_cpu(arguments: Arguments) -> Arguments:
    """Return copies, which nothing that is written in place changes."""
    return {name: copied(one, "cpu") for name, one in arguments.items()}


def reference(inputs: OpInputs, arguments: Arguments) -> object:
    return inputs.run(on_cpu(arguments))


def spare(inputs: OpInputs, arguments: Arguments) -> Arguments:
    """Return arguments with copies of those that are written in place."""
    return {**arguments, **{name: copied(arguments[name], "cuda") for name in inputs.written}}


@pytest.mark.parametrize(("call", "inputs"), CASES, ids=IDS)
@pytest.mark.parametrize("num_tokens", [1, 17, 67])
def test_kernel_equals_reference(call: OpCall, inputs: OpInputs, num_tokens: int) -> None:
    verify_case(call, inputs, num_tokens)


@pytest.mark.parametrize(("call", "inputs"), CASES, ids=IDS)
def test_f12_capture_change_inputs_replay(call: OpCall, inputs: OpInputs, seed: int) -> None:
    arguments = make(call, inputs, 37, seed)
    inputs.run(arguments)  # loads the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = inputs.run(arguments)
    other = make(call, inputs, 37, seed + 1)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            value.copy_(other[name])
        elif isinstance(value, CachePool):
            whole_storage(value.storage).copy_(whole_storage(other[name].storage))
    before = on_cpu(arguments)
    del other
    gc.collect()
    torch.cuda.empty_cache()
    clutter = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(8)]
    graph.replay()
    torch.cuda.synchronize()
    inputs.rule(call.op, got, reference(inputs, before), before)
    del clutter


@pytest.mark.parametrize(("call", "inputs"), CASES, ids=IDS)
def test_f6_one_kernel_serves_other_addresses_and_sizes(call: OpCall, inputs: OpInputs, seed: int) -> None:
    results = []
    for num_tokens in (5, 40, 3):
        arguments = make(call, inputs, num_tokens, seed + num_tokens)
        before = on_cpu(arguments)
        results.append((inputs.run(arguments), before, arguments))  # all alive, so all at different addresses
    for got, before, _ in results:
        inputs.rule(call.op, got, reference(inputs, before), before)


@pytest.mark.parametrize(("call", "inputs"), CASES, ids=IDS)
def test_current_stream_no_synchronization_nothing_hidden(call: OpCall, inputs: OpInputs, seed: int) -> None:
    arguments = make(call, inputs, 33, seed)
    wanted = reference(inputs, arguments)
    inputs.run(spare(inputs, arguments))
    stream = torch.cuda.Stream()
    late = {
        name: torch.zeros_like(one) if isinstance(one, torch.Tensor) else one
        for name, one in spare(inputs, arguments).items()
    }
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # a launch on another stream would read the zeros
            for name, one in arguments.items():
                if isinstance(one, torch.Tensor):
                    late[name].copy_(one)
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            got = inputs.run(late)
            allocated = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    inputs.rule(call.op, got, wanted, arguments)
    outputs = {one.untyped_storage().data_ptr() for one in parts(got).values()}
    given = [one for value in late.values() for one in parts(value).values()]
    inside = {one.untyped_storage().data_ptr() for one in given if isinstance(one, torch.Tensor)}
    assert allocated <= len(outputs - inside) + WORKSPACES.get(call.op, 0)


WORKSPACES = {
    "route_experts": 1,
    "nvfp4_linear": 1,  # tokens expanded to bf16, where there are many
    "fp8_linear": 2,  # tokens expanded to fp16 and their scales, where there are many
    "fp8_grouped_linear": 64,  # fp32 scales: four for each of 16 groups; else one expansion for all
    "nvfp4_experts": 15,  # as below, two quantized tensors of three parts, their scales by expert, h expanded
    "nvfp4_weight_only_experts": 7,  # order, passes, their number, hidden values, outputs of the pairs; in tiles also
    # tokens and route weights by expert
    "nvfp4_grouped_linear": 1,
    "sparse_attention": 1,  # the sums of ranges and what they are worth, where there are few tokens
    "index_topk": 1,  # scores
    "hyper_connection_head_norm": 2,  # the streams of the rows, and what they collapse to
}
"""Operations that need scratch memory, and in how many tensors; `run` allocates it in the open."""


MANY_TILES = ("hyper_connection_pre", "hyper_connection_pre_norm", "hyper_connection_head")


@pytest.mark.parametrize("op", MANY_TILES)
@pytest.mark.parametrize("model", ["tiny", "flash"])
def test_f9_blocks_that_stay_take_every_tile_in_turn(op: str, model: str, seed: int) -> None:
    """More tiles than blocks hold at once: every group goes round several times, and no token's bits change by it."""
    (call,) = [one for one in op_shapes(op) if one.model == model]
    (inputs,) = kernel_inputs(op)
    num_tokens = 4000 if model == "tiny" else 1300
    arguments = make(call, inputs, num_tokens, seed)
    got = parts(inputs.door(**arguments))
    for start in range(0, num_tokens, 130):
        some = parts(inputs.door(**{**arguments, "x": arguments["x"][start : start + 130]}))
        for name, part in some.items():
            assert torch.equal(part, got[name][start : start + 130]), (name, start)
