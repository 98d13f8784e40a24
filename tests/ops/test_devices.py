# SPDX-License-Identifier: Apache-2.0
"""References on other devices: no division by a number, which CUDA would turn into a product, and equal results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megamoe.formats.scale_layout import ScaleLayout
from megamoe.models.deepseek_v4.shapes import op_shapes
from megamoe.ops import quantize, use
from megamoe.ops.fixed_order import batched_matmul, sum_by_halves
from megamoe.ops.matmul import row_invariant_matmul
from megamoe.ops.row_math import row_sum, sigmoid, silu, softplus
from megamoe.verify.inputs import INPUTS
from megamoe.verify.op_inputs import OpInputs, activations
from megamoe.verify.values import copied, parts

from ..divisions import RefuseReciprocals

CASES = [(op, inputs) for op in sorted(INPUTS) for inputs in INPUTS[op]]
IDS = [f"{op}-{INPUTS[op].index(inputs)}" for op, inputs in CASES]


@pytest.mark.parametrize(("op", "inputs"), CASES, ids=IDS)
def test_no_reference_divides_by_a_number(op: str, inputs: OpInputs) -> None:
    arguments = inputs.make(op_shapes(op)[0].dims, 5, torch.Generator().manual_seed(0))
    with RefuseReciprocals("reciprocal_"):  # sigmoid is defined as 1 / (1 + exp(-x)), which rounds once
        inputs.door(**arguments)


@pytest.mark.parametrize("op", ["rms_norm", "rms_norm_quantize_nvfp4", "hyper_connection_pre", "hyper_connection_head"])
def test_the_fault_as_it_was_is_found(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("rms_norm", "hyper_connection"):
        monkeypatch.setattr(f"megamoe.ops.{module}.divide", lambda x, divisor: x.div_(divisor))
    with pytest.raises(AssertionError, match="reciprocal"):
        test_no_reference_divides_by_a_number(op, INPUTS[op][0])


# --- on a GPU, by their references ---


@pytest.fixture
def no_tf32() -> Iterator[None]:
    """Multiply in fp32: torch's own default, which somebody may have changed."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize(("op", "inputs"), CASES, ids=IDS)
def test_k1_references_agree_on_cuda(op: str, inputs: OpInputs, seed: int) -> None:
    compare(op, inputs, seed, "cuda")


def compare(op: str, inputs: OpInputs, seed: int, device: str) -> None:
    """Compare two runs of a reference: every bit where it is exact, else its bound, which is for another order of sums.

    What an operation writes in place belongs to what is compared.
    """
    arguments = inputs.make(op_shapes(op)[0].dims, 19, torch.Generator().manual_seed(seed))
    with use("reference"):
        want = inputs.run({name: copied(value, "cpu") for name, value in arguments.items()})
        got = inputs.run({name: copied(value, device) for name, value in arguments.items()})
    inputs.rule(op, got, want, arguments)


@pytest.mark.parametrize(("op", "inputs"), CASES, ids=IDS)
def test_the_comparison_itself_on_one_device(op: str, inputs: OpInputs, seed: int) -> None:
    """What the test above does on a GPU, between two copies on the CPU."""
    compare(op, inputs, seed, "cpu")


EXACT: dict[str, Callable[[torch.Tensor], Any]] = {
    "nvfp4": lambda x: quantize.reference_nvfp4(x, None),
    "nvfp4, tiled": lambda x: quantize.reference_nvfp4(x, None, ScaleLayout.TILED_128X4),
    "nvfp4, given scale": lambda x: quantize.reference_nvfp4(x, torch.full((), 4.0 / 2688.0, device=x.device)),
    "fp8 rows": lambda x: quantize.reference_fp8_rows(x, 128),
    "mxfp4": quantize.reference_mxfp4,
}


@pytest.mark.gpu
@pytest.mark.parametrize("rule", EXACT)
def test_k1_quantizers_give_the_same_bytes_on_cuda(rule: str, seed: int) -> None:
    x = activations(torch.Generator().manual_seed(seed), 300, 1536)
    got, want = parts(EXACT[rule](x.cuda())), parts(EXACT[rule](x))
    for name, part in want.items():
        left, right = (one.contiguous().reshape(-1).view(torch.uint8) for one in (got[name].cpu(), part))
        assert torch.equal(left, right), f"{name}: {int((left != right).sum())} bytes differ"


NEAR: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sigmoid": lambda x, w: sigmoid(x),
    "silu": lambda x, w: silu(x),
    "softplus": lambda x, w: softplus(x),
    "row_sum": lambda x, w: row_sum(x.square()),
    "sum_by_halves": lambda x, w: sum_by_halves(x.square(), -1),
    "row_invariant_matmul": lambda x, w: row_invariant_matmul(x, w),
    "batched_matmul": lambda x, w: batched_matmul(x[None], w.t()[None]),
    "rsqrt": lambda x, w: x.square().add(1e-6).rsqrt(),
    "cos": lambda x, w: (x * 1e5).cos(),
    "exp, log": lambda x, w: x.exp().log1p(),
}


@pytest.mark.gpu
@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize("name", NEAR)
def test_k1_sums_and_transcendentals_agree_on_cuda(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(rows, 512, generator=generator) for rows in (40, 24))
    got, want = NEAR[name](x.cuda(), w.cuda()).cpu().double(), NEAR[name](x, w).double()
    assert float((got - want).norm() / want.norm()) <= 1e-6
