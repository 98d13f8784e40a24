# SPDX-License-Identifier: Apache-2.0
"""Every host half runs without a GPU: what it launches is what its `configs` names, whatever the number of tokens."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megamoe.kernels import KERNELS
from megamoe.kernels.compile import PACKAGE, Request
from megamoe.models.deepseek_v4.shapes import OpCall, op_shapes
from megamoe.ops import dispatch
from megamoe.verify.inputs import INPUTS, OpInputs

MULTIPROCESSORS = 132
CASES = [
    (call, inputs, module)
    for op, table in KERNELS.items()
    for call in [one for one in op_shapes(op) if one.model == "tiny"]
    for which, inputs in enumerate(INPUTS[op])
    for module in dict.fromkeys(table.values())
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


@pytest.mark.parametrize(
    ("call", "inputs", "module"), CASES, ids=[f"{call} {module.rpartition('.')[2]}" for call, _, module in CASES]
)
def test_what_a_host_half_launches_is_what_it_names(
    call: OpCall, inputs: OpInputs, module: str, launched: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = importlib.import_module(module)
    monkeypatch.setattr(dispatch, "pick", lambda op, device, reference: host.run)
    monkeypatch.setattr(sys.modules[inputs.door.__module__], "pick", lambda op, device, reference: host.run)
    named = {Request.of(one) for one in host.configs(call.dims)}
    border = inputs.order_until(call.dims) if inputs.order_until else inputs.tile
    for num_tokens in sorted({0, 1, 3, 8, 9, 17, border, border + 1, 2 * border}):
        launched.clear()
        inputs.door(**inputs.make(call.dims, num_tokens, torch.Generator().manual_seed(num_tokens)))
        assert bool(launched) == bool(num_tokens)
        assert set(launched) <= named, f"{num_tokens} tokens"
