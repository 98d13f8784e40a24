# SPDX-License-Identifier: Apache-2.0
"""Rules that know more than one bound: what a right kernel may do passes, what a wrong one does is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamoe.formats import fp8, nvfp4
from megamoe.models.deepseek_v4.shapes import op_shapes
from megamoe.ops.index_topk import index_scores, index_topk
from megamoe.ops.matmul import row_invariant_matmul
from megamoe.verify.comparisons import product_sizes, products, scores, selections
from megamoe.verify.inputs import INPUTS
from megamoe.verify.op_inputs import activations, finite_squares, scaled
from megamoe.verify.sampling_inputs import fewer_pairs
from megamoe.verify.values import copied, pool_rows

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


# --- scores and selections: the rule itself is tested in test_selection.py ---

INDEXER = next(call for call in op_shapes("index_topk") if call.model == "tiny")


@pytest.mark.parametrize("way", [0, 1, 2])
def test_selections_are_compared_by_the_keys_of_each_request(way: int, seed: int) -> None:
    arguments = INPUTS["index_topk"][way].make(INDEXER.dims, 12, torch.Generator().manual_seed(seed))
    want = index_topk(**arguments)
    selections("index_topk", want, want, arguments)
    assert len(arguments["requests"].unique()) == 4, "three requests and nobody"
    top_k = arguments["top_k"]
    for token in (arguments["num_visible"] > top_k).nonzero()[:, 0].tolist():
        if int(arguments["requests"][token]) < 0:
            continue
        left = sorted(set(range(int(arguments["num_visible"][token]))) - set(want[token].tolist()))
        worst = {**arguments, "num_visible": arguments["num_visible"].clone()}
        got = want.clone()
        got[token] = torch.tensor(sorted([*want[token].tolist()[len(left) :], *left])[:top_k])
        with pytest.raises(AssertionError, match="index_topk: token"):
            selections("index_topk", got, want, worst)
    with pytest.raises(AssertionError, match=r"got torch.int32 \[12, 63\]"):
        selections("index_topk", want[:, 1:], want, arguments)


def test_scores_are_measured_by_their_terms(seed: int) -> None:
    inputs = INPUTS["index_scores"][0]
    arguments = inputs.make(INDEXER.dims, 3, torch.Generator().manual_seed(seed))
    want = index_scores(**arguments)
    scores("index_scores", want, want, arguments)
    with pytest.raises(AssertionError, match="index_scores: .* elements differ, first at"):
        scores("index_scores", want * (1 + 1e-3), want, arguments)
    with pytest.raises(AssertionError, match="index_scores: 1 of .* first at .0, 3.: got nan"):
        got = want.clone()
        got[0, 3] = torch.nan
        scores("index_scores", got, want, arguments)


# --- rows that were worked out and written ---


def written(op: str, way: int, seed: int) -> tuple[Any, dict[str, Any], Any, Any]:
    """Return how an operation is called, its arguments before the call, and two equal results."""
    inputs, call = INPUTS[op][way], next(call for call in op_shapes(op) if call.model == "tiny")
    arguments = inputs.make(call.dims, 6, torch.Generator().manual_seed(seed))
    results = [
        inputs.run({**arguments, **{name: copied(arguments[name], "cpu") for name in inputs.written}}) for _ in range(2)
    ]
    return inputs, arguments, *results


@pytest.mark.parametrize(("op", "way"), [("write_latent", 0), ("compress_kv", 1), ("write_index_keys", 1)])
def test_a_value_beside_a_step_may_be_rounded_either_way_and_nothing_else_may_change(
    op: str, way: int, seed: int
) -> None:
    inputs, arguments, got, want = written(op, way, seed)
    inputs.rule(op, got, want, arguments)
    pool, before = got[-1], arguments[inputs.written[-1]]
    slots = torch.arange(pool.num_slots)
    changed = (pool_rows(pool, slots)[0] != pool_rows(before, slots)[0]).any(-1).nonzero()[:, 0]
    place = int(changed[0]) // pool.rows_per_block, int(changed[0]) % pool.rows_per_block
    largest = int((pool.data_rows[place].view(torch.uint8) & 0x77).argmax())
    pool.data_rows[place][largest // 8] ^= 1  # the next code
    inputs.rule(op, got, want, arguments)
    other = int(next(slot for slot in slots.tolist() if slot not in changed.tolist()))
    pool.data_rows[other // pool.rows_per_block, other % pool.rows_per_block, 0] ^= 1
    with pytest.raises(AssertionError, match=f"of {op}: 1 bytes that the operation does not write differ"):
        inputs.rule(op, got, want, arguments)


def test_a_row_of_other_values_is_found(seed: int) -> None:
    for op, way in (("write_latent", 0), ("compress_kv", 0), ("write_index_keys", 1)):
        inputs, arguments, got, want = written(op, way, seed)
        pool, before = got[-1], arguments[inputs.written[-1]]
        slots = torch.arange(pool.num_slots)
        changed = (pool_rows(pool, slots)[0] != pool_rows(before, slots)[0]).any(-1).nonzero()[:, 0]
        places = [(int(slot) // pool.rows_per_block, int(slot) % pool.rows_per_block) for slot in changed[:2]]
        pool.data_rows[places[0]] = pool.data_rows[places[1]]
        with pytest.raises(AssertionError, match=f"{op}: .* elements differ"):
            inputs.rule(op, got, want, arguments)


# --- some of the tokens ---


def test_penalized_pairs_of_fewer_rows() -> None:
    arguments = {
        "logits": torch.zeros(4, 9),
        "row_idx": torch.tensor([3, 0, 3, 1]),
        "token_ids": torch.tensor([5, 6, 7, 8]),
        "counts": torch.tensor([1.0, 2.0, 3.0, 4.0]),
    }
    got = fewer_pairs(arguments, torch.tensor([1, 3]))
    assert [one.tolist() for one in got.values()] == [[1, 1, 0], [5, 7, 8], [1.0, 3.0, 4.0]]
