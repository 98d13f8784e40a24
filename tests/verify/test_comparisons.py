# SPDX-License-Identifier: Apache-2.0
"""Rules that know more than one bound: what a right kernel may do passes, what a wrong one does is found."""

from __future__ import annotations

import pytest
import torch

from megamoe.formats import fp8, nvfp4
from megamoe.ops.matmul import row_invariant_matmul
from megamoe.verify.comparisons import product_sizes, products
from megamoe.verify.op_inputs import activations, finite_squares, scaled

# --- products ---


def operands(num_tokens: int, num_rows: int, width: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = finite_squares(activations(generator, num_tokens, width))
    return {"x": x, "w": scaled(generator, num_rows, width, scale=width**-0.5).bfloat16()}


def reference(arguments: dict[str, torch.Tensor]) -> torch.Tensor:
    return row_invariant_matmul(arguments["x"].float(), arguments["w"].float())


def cut_off(values: torch.Tensor) -> torch.Tensor:
    """Return fp64 values in fp32, rounded towards zero."""
    nearest = values.float()
    beyond = nearest.double().abs() > values.abs()
    return torch.where(beyond, (nearest.view(torch.int32) - 1).view(torch.float32), nearest)


def chain(arguments: dict[str, torch.Tensor], step: int = 16) -> torch.Tensor:
    """Return x @ w.T as a matrix unit adds it: 16 products at a time, exact, then cut off to 24 significant bits."""
    x, w = arguments["x"].double(), arguments["w"].double()
    total = torch.zeros(x.shape[0], w.shape[0])
    for first in range(0, x.shape[1], step):
        total = cut_off(total.double() + x[:, first : first + step] @ w[:, first : first + step].T)
    return total


@pytest.mark.parametrize("width", [256, 4096, 8192, 21504])
def test_k3_a_chain_of_a_matrix_unit_passes_at_every_width(width: int) -> None:
    arguments = operands(1, 128, width, 3)
    products("linear", chain(arguments), reference(arguments), arguments)


def test_k3_the_bound_grows_because_such_a_chain_exceeds_the_old_one() -> None:
    arguments = operands(1, 128, 21504, 3)
    exact = arguments["x"].double() @ arguments["w"].double().T
    distance = (chain(arguments).double() - exact).norm() / exact.norm()
    assert 2e-5 < distance < 21504 * 2.0**-24 / 24, "measured on an H200: 2.3e-5"
    nearest = (reference(arguments).double() - exact).norm() / exact.norm()
    assert nearest < 1e-6, "rounding to nearest is not what makes it"


@pytest.mark.parametrize("width", [256, 21504])
@pytest.mark.parametrize("fault", ["a product left out", "sums in bf16", "TF32 operands", "last step twice"])
def test_wrong_products_are_found(width: int, fault: str) -> None:
    arguments = operands(3, 64, width, 5)
    want, other = reference(arguments), {name: one.clone() for name, one in arguments.items()}
    if fault == "a product left out":
        other["x"][0, 17] = 0.0
    elif fault == "TF32 operands":  # NVFP4 values times their scales need more bits than TF32 has
        arguments = {"x": arguments["x"].float() * 1.001, "w": arguments["w"].float() * 1.001}
        want = reference(arguments)
        mask = -(1 << 13)
        other = {name: (one.view(torch.int32) & mask).view(torch.float32) for name, one in arguments.items()}
    got = reference(other)
    if fault == "sums in bf16":
        half = width // 2
        first, second = ({"x": one["x"], "w": one["w"]} for one in _halves(arguments, half))
        got = reference(first).bfloat16().float() + reference(second)
    elif fault == "last step twice":
        tail = {name: one[:, -16:].contiguous() for name, one in arguments.items()}
        got = got + reference(tail)
    with pytest.raises(AssertionError, match=r"linear: .*bound .*\(fp32 sums of K"):
        products("linear", got, want, arguments)


def _halves(arguments: dict[str, torch.Tensor], half: int) -> list[dict[str, torch.Tensor]]:
    return [{name: one[:, part].contiguous() for name, one in arguments.items()} for part in
            (slice(0, half), slice(half, None))]  # fmt: skip


def test_k3_a_single_output_that_cancels_is_measured_by_its_terms(seed: int) -> None:
    x, w = operands(1, 1, 4352, seed).values()
    w, largest = w.float(), int(x.abs().argmax())
    rest = float(x.double() @ w.double().T - x[0, largest].double() * w[0, largest])
    w[0, largest] = -rest * 1.0001 / float(x[0, largest])
    arguments = {"x": x, "w": w}
    want, sizes = reference(arguments), product_sizes(x, w)
    assert float(want.abs() / sizes) < 1e-3
    got = chain(arguments)
    distance = float((got - want).abs() / want.abs())
    assert distance > 2e-5, "by itself it is beyond the bound"
    products("linear", got, want, arguments)
    with pytest.raises(AssertionError):
        products("linear", want + 1e-4 * sizes.float(), want, arguments)


def test_a_wrong_row_cannot_hide_beside_rows_of_huge_numbers(seed: int) -> None:
    arguments = operands(9, 64, 256, seed)
    want = reference(arguments)
    length = want.norm(dim=-1)
    assert float(length.max()) > 1e9 * float(length[0]), "the inputs hold such a row"
    got = want.clone()
    got[0, 5] *= 1.01
    with pytest.raises(AssertionError, match=r"linear: 1 of 576 elements differ, first at \[0, 5\]"):
        products("linear", got, want, arguments)
    zero = want.clone()
    zero[1, 3] = 1e-20  # x[1] is zeros of both signs
    with pytest.raises(AssertionError, match=r"first at \[1, 3\]"):
        products("linear", zero, want, arguments)


def test_numbers_below_the_smallest_normal_one_may_be_flushed(seed: int) -> None:
    arguments = operands(9, 64, 256, seed)
    want = reference(arguments)
    flushed = torch.where(want.abs() < 2.0**-126, 0.0, want)
    assert not torch.equal(flushed, want)
    products("linear", flushed, want, arguments)


@pytest.mark.parametrize("shape", [(3,), (3, 2)], ids=["plain", "groups"])
def test_sizes_of_terms(shape: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = scaled(generator, *shape, 256)
    w = scaled(generator, *shape[1:], 600, 256)
    terms = x[..., None, :].double() * w.double()[None]  # [T, (G,) N, K]
    torch.testing.assert_close(product_sizes(x, w), terms.square().sum(-1).sqrt())


@pytest.mark.parametrize("op", ["nvfp4_linear", "fp8_linear"])
def test_terms_of_quantized_operands(op: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = scaled(generator, 3, 256), scaled(generator, 64, 256)
    if op == "nvfp4_linear":
        arguments = {"x": nvfp4.quantize(x, scale_per="row"), "w": nvfp4.quantize(w).fragments()}
        want = nvfp4.dequantize(arguments["x"]) @ nvfp4.dequantize(arguments["w"]).T
    else:
        operands = fp8.quantize_rows(x), fp8.quantize_blocks(w)
        arguments = {"x": operands[0], "w": operands[1]}
        want = fp8.dequantize(operands[0]) @ fp8.dequantize(operands[1]).T
    products(op, want * (1 + 5e-6), want, arguments)
    with pytest.raises(AssertionError):
        products(op, want * (1 + 5e-5), want, arguments)
