# SPDX-License-Identifier: Apache-2.0
"""pick: cpu runs the reference, cuda runs what the table names, anything else is an error with a remedy."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from megamoe import ops
from megamoe.kernels import KERNELS
from megamoe.ops import dispatch
from megamoe.ops.dispatch import pick

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def _reference() -> str:
    return "reference"


@pytest.fixture
def kernel_module(monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with a `run`, on a machine that claims to have a Hopper GPU."""
    name = "megamoe_test_kernel"
    module = types.ModuleType(name)
    module.run = lambda: "kernel"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(dispatch, "_arch", lambda device: "sm90")
    return name


def test_cpu_runs_the_reference_even_where_a_kernel_exists(monkeypatch: pytest.MonkeyPatch, kernel_module: str) -> None:
    monkeypatch.setitem(KERNELS, "op", {"sm90": kernel_module, "portable": kernel_module})
    assert pick("op", CPU, _reference) is _reference


@pytest.mark.parametrize("arch", ["sm90", "portable"])
def test_cuda_runs_the_kernel_of_its_architecture_or_the_portable_one(
    arch: str, monkeypatch: pytest.MonkeyPatch, kernel_module: str
) -> None:
    monkeypatch.setitem(KERNELS, "op", {arch: kernel_module, "sm100": "never imported"})
    assert pick("op", CUDA, _reference)() == "kernel"


def test_a_missing_kernel_is_an_error_and_never_the_reference(
    monkeypatch: pytest.MonkeyPatch, kernel_module: str
) -> None:
    monkeypatch.setitem(KERNELS, "op", {"sm100": kernel_module})
    with pytest.raises(
        NotImplementedError, match=r"^op: there is no kernel for sm90; kernels exist for sm100\. .*use\("
    ):
        pick("op", CUDA, _reference)
    with pytest.raises(NotImplementedError, match="kernels exist for no architecture"):
        pick("other", CUDA, _reference)


def test_other_devices_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="op: runs on cpu and cuda devices; got meta"):
        pick("op", torch.device("meta"), _reference)


def test_use_reference_holds_inside_the_block_only(monkeypatch: pytest.MonkeyPatch, kernel_module: str) -> None:
    monkeypatch.setitem(KERNELS, "op", {"sm90": kernel_module})
    with ops.use("reference"):
        assert pick("op", CUDA, _reference) is _reference
        with ops.use("device"):
            assert pick("op", CUDA, _reference)() == "kernel"
        assert pick("op", CUDA, _reference) is _reference
    assert pick("op", CUDA, _reference)() == "kernel"
    with pytest.raises(RuntimeError), ops.use("reference"):
        raise RuntimeError
    assert pick("op", CUDA, _reference)() == "kernel"


def test_use_refuses_other_names() -> None:
    with pytest.raises(ValueError, match="implementation must be 'reference' or 'device'; got 'fast'"), ops.use("fast"):
        pass
