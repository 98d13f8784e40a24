# SPDX-License-Identifier: Apache-2.0
"""Every host half runs without a GPU: what it launches is compiled for the architecture, whatever the number of tokens.

Where an architecture has no path for more than few tokens, they are refused before anything is launched.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megamoe.formats import nvfp4
from megamoe.kernels import BORDERS, KERNELS
from megamoe.kernels.compile import PACKAGE, Request
from megamoe.kernels.parts import launch
from megamoe.kernels.plan import requests_for
from megamoe.models.deepseek_v4.shapes import OpCall, op_shapes
from megamoe.ops import dispatch
from megamoe.ops.nvfp4_experts import nvfp4_experts
from megamoe.ops.nvfp4_weight_only_experts import nvfp4_weight_only_experts
from megamoe.verify.inputs import OpInputs, kernel_inputs

MULTIPROCESSORS = 132
CASES = [
    (call, inputs, arch)
    for op, table in KERNELS.items()
    for call in [one for one in op_shapes(op) if one.model == "tiny"]
    for which, inputs in enumerate(kernel_inputs(op))
    for arch in table
    if (op, which, "G" in call.dims) != ("quantize_nvfp4", 2, True)  # no model asks for tiled scales of groups
]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Let `pick` return host halves for tensors on the CPU, and record what those ask to launch."""
    recorded: list[Request] = []

    def kernel(config: Any, device: torch.device) -> Callable[..., None]:
        recorded.append(Request.of(config))
        return lambda *arguments: None

    for table in KERNELS.values():
        for module in table.values():
            importlib.import_module(module)
    for name, module in list(sys.modules.items()):
        if name.startswith(PACKAGE):
            for attribute, value in (
                ("kernel", kernel),
                ("num_multiprocessors", lambda _: MULTIPROCESSORS),
                ("max_clusters", lambda cluster, _: MULTIPROCESSORS // cluster - 1),
            ):
                if name != f"{PACKAGE}store" and hasattr(module, attribute):
                    monkeypatch.setattr(module, attribute, value)
    return recorded


@pytest.mark.parametrize(("call", "inputs", "arch"), CASES, ids=[f"{arch} {call.op} {call}" for call, _, arch in CASES])
def test_what_a_host_half_launches_is_what_is_compiled(
    call: OpCall, inputs: OpInputs, arch: str, launched: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = importlib.import_module(KERNELS[call.op][arch])
    monkeypatch.setattr(launch, "architecture_of", lambda device: arch)
    monkeypatch.setattr(dispatch, "pick", lambda op, device, reference: host.run)
    monkeypatch.setattr(sys.modules[inputs.door.__module__], "pick", lambda op, device, reference: host.run)
    compiled = set(requests_for([(call.op, call.dims)], f"{arch}a"))
    border = inputs.order_until(call.dims) if inputs.order_until else inputs.tile
    for num_tokens in sorted({0, 1, 3, 8, 9, 17, border, border + 1, 2 * border}):
        launched.clear()
        arguments = inputs.make(call.dims, num_tokens, torch.Generator().manual_seed(num_tokens))
        if num_tokens > border and call.op in BORDERS and arch not in BORDERS[call.op].more:
            refusal = (
                rf"^{call.op}: on {arch} the kernel takes up to {border} tokens of these sizes; got {num_tokens}\. "
            )
            remedy = rf"More is taken on sm90\. Pass {border} at a time, or run the reference: with megamoe\.ops\.use"
            with pytest.raises(NotImplementedError, match=refusal + remedy):
                inputs.door(**arguments)
            assert launched == []
            continue
        inputs.door(**arguments)
        assert bool(launched) == bool(num_tokens)
        assert set(launched) <= compiled, f"{num_tokens} tokens"


@pytest.mark.parametrize("arch", ["sm90", "sm100"])
@pytest.mark.parametrize("door", [nvfp4_experts, nvfp4_weight_only_experts])
def test_a_shared_expert_needs_no_path_for_more_tokens(
    arch: str, door: Callable[..., torch.Tensor], launched: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hopper multiplies a shared expert of more than 64 tokens by linears; elsewhere it stays one of the experts."""
    monkeypatch.setattr(launch, "architecture_of", lambda device: arch)
    host = importlib.import_module(KERNELS[door.__name__][arch])
    monkeypatch.setattr(sys.modules[door.__module__], "pick", lambda op, device, reference: host.run)
    experts = [nvfp4.quantize(torch.randn(64, 64, 64)).fragments() for _ in range(3)]
    shared = tuple(nvfp4.quantize(torch.randn(64, 64)).fragments() for _ in range(3))
    for num_tokens, linears in ((64, 0), (65, 3), (128, 3)):
        launched.clear()
        ids = torch.arange(2 * num_tokens).view(num_tokens, 2) % 64
        x = torch.randn(num_tokens, 64, dtype=torch.bfloat16)
        door(x, torch.rand(num_tokens, 2), ids, *experts, shared_weights=shared, swiglu_limit=None)
        found = [one.module for one in launched if one.module.startswith("linear.") and "expand" not in one.module]
        assert len(found) == (linears if arch == "sm90" else 0)
