# SPDX-License-Identifier: Apache-2.0
"""The divergence finder names the operation that is wrong, where it is wrong, and nothing where all is right.

Faults are put in on the way that the device goes (an inner observer), so the same tests run on the CPU and on a GPU.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megamoe.cli import main
from megamoe.models.deepseek_v4.config import LayerKind
from megamoe.models.deepseek_v4.model import Model
from megamoe.models.deepseek_v4.shapes import op_shapes
from megamoe.models.load import load
from megamoe.ops import watch
from megamoe.ops.dispatch import Run
from megamoe.verify.inputs import INPUTS
from megamoe.verify.layers import Divergence, Finder, find_divergence, sample_prompt

PROMPT_TOKENS = 160
DECODE_TOKENS = 3

NOT_IN_A_STEP = {"index_scores"}
"""Operations that a reference is made of, without a door that picks."""

Change = Callable[[dict[str, Any]], dict[str, Any]]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=DEVICES)
def model(request: pytest.FixtureRequest) -> Model:
    """Return the bundled model in the recipe that everybody serves."""
    return load("tiny", device=request.param)


@contextlib.contextmanager
def faulty(
    op: str, change: Change, *, from_call: int = 0, when: Callable[[dict[str, Any]], bool] | None = None
) -> Iterator[None]:
    """Let an operation run with other arguments than it is called with, as a faulty kernel would."""
    count = 0

    def observer(name: str, run: Run, reference: Run) -> Run:
        if name != op:
            return run

        def wrong(*args: Any) -> Any:
            nonlocal count
            arguments = dict(inspect.signature(reference).bind(*args).arguments)
            count += 1
            if count <= from_call or (when is not None and not when(arguments)):
                return run(*args)
            return run(*change(arguments).values())

        return wrong

    with watch(observer):
        yield


def find(model: Model, *, decode_tokens: int = DECODE_TOKENS) -> Divergence | None:
    """Run the finder over the model's own text, with the finder outside of any fault."""
    against = "cpu" if model.device.type == "cpu" else "reference"
    prompt = sample_prompt(model, PROMPT_TOKENS)
    return find_divergence(model, against=against, prompt=prompt, decode_tokens=decode_tokens)[1]


def test_a_right_model_has_no_divergence(model: Model) -> None:
    """Every operation is within its bound, and every operation of a step was compared."""
    assert find(model) is None


@pytest.mark.parametrize(
    ("fault", "op", "change", "kind"),
    [
        ("F8: rows are never written", "write_latent", lambda a: {**a, "slots": torch.full_like(a["slots"], -1)}, None),
        (
            "F9: every tile of entries is the first one",
            "sparse_attention",
            lambda a: a if a["entry_idx"] is None else {**a, "entry_idx": _first_tile(a["entry_idx"])},
            LayerKind.CSA,
        ),
        ("F10: the sink is scaled", "sparse_attention", lambda a: {**a, "sink": a["sink"] * a["scale"]}, None),
        ("F13: no clamp", "nvfp4_weight_only_experts", lambda a: {**a, "swiglu_limit": None}, None),
    ],
)  # fmt: skip
def test_a_fault_is_named_where_it_is(
    model: Model, fault: str, op: str, change: Change, kind: LayerKind | None
) -> None:
    """The first operation that is wrong, in the first layer that has it, in the prefill."""
    kinds = model.config.layer_kinds
    layer = 0 if kind is None else kinds.index(kind)
    with faulty(op, change):
        found = find(model, decode_tokens=0)
    assert found is not None, fault
    assert (found.op, found.layer, found.kind, found.phase) == (op, layer, kinds[layer].name, "prefill"), found
    assert found.coordinate is not None and found.got != found.want
    assert found.position is not None and 0 <= found.position < PROMPT_TOKENS


def test_a_clamp_is_seen_where_no_activation_reaches_it(model: Model) -> None:
    """A clamp of 1e4 acts on nothing here, and one that is missing is found all the same."""
    op = "nvfp4_weight_only_experts"
    for layer in model.blocks:  # the clamp of the model itself is as far away as that of the fault
        layer.moe.swiglu_limit = 1e4
    try:
        with faulty(op, lambda a: {**a, "swiglu_limit": None}):
            found = find(model, decode_tokens=0)
    finally:
        for layer in model.blocks:
            layer.moe.swiglu_limit = model.config.swiglu_limit
    assert found is not None and (found.op, found.layer) == (op, 0)


def test_other_numerics_in_decode_are_named_there(model: Model) -> None:
    """F18: the index query is not rotated where one token is decoded; the prefill is right."""
    op, change = "round_index_query", lambda a: {**a, "pos": torch.zeros_like(a["pos"])}
    with faulty(op, change, when=lambda a: a["q"].shape[0] == 1):
        found = find(model)
    kinds = model.config.layer_kinds
    assert found is not None
    assert (found.op, found.layer, found.phase) == (op, kinds.index(LayerKind.CSA), "decode"), found
    assert found.position == PROMPT_TOKENS


def test_a_layer_of_many_is_named(model: Model) -> None:
    """A fault of the last layer alone is found there, by the layer's number."""
    last = len(model.blocks) - 1
    with faulty("sparse_attention", lambda a: {**a, "sink": a["sink"] + 1.0}, from_call=last):
        found = find(model, decode_tokens=0)
    assert found is not None and found.layer == last


def test_results_are_compared_with_what_was_there_before(model: Model) -> None:
    """A byte of a pool beside the rows that an operation writes is a wrong result of that operation."""

    def observer(name: str, run: Run, reference: Run) -> Run:
        def wrong(*args: Any) -> Any:
            result = run(*args)
            arguments = inspect.signature(reference).bind(*args).arguments
            arguments["entries"].storage.view(-1)[-1] ^= 1
            return result

        return wrong if name == "compress_kv" else run

    with watch(observer):
        found = find(model, decode_tokens=0)
    assert found is not None and found.op == "compress_kv"


@pytest.mark.parametrize("op", sorted(set(INPUTS) - NOT_IN_A_STEP))
def test_every_operation_can_be_compared(op: str) -> None:
    """What the finder binds has the names that the operation's entry writes and its rule reads; right is right."""
    call = min(op_shapes(op), key=lambda call: math.prod(call.dims.values()))
    for inputs in INPUTS[op]:
        finder = Finder(torch.device("cpu"), "cpu")
        arguments = inputs.make(call.dims, 5, torch.Generator().manual_seed(1))
        with watch(finder, outermost=True):
            inputs.door(**arguments)
        assert finder.compared[op] >= 1, inputs


def _first_tile(entry_idx: torch.Tensor) -> torch.Tensor:
    """Return the entries with those of every tile of 8 columns replaced by those of the first one."""
    columns = torch.arange(entry_idx.shape[1], device=entry_idx.device) % 8
    return torch.where(entry_idx >= 0, entry_idx[:, columns], entry_idx)


def test_the_command_says_what_it_saw(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 and one JSON object; a fault gives 1 and its place."""
    command = ["verify", "--layers", "--model", "tiny", "--prompt-tokens", "20", "--decode-tokens", "1"]
    assert main([*command, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["passed"] and seen["divergence"] is None and seen["compared"]["sparse_attention"] == 8
    with faulty("sparse_attention", lambda a: {**a, "sink": a["sink"] + 1.0}):
        assert main(command) == 1
    assert "FIRST DIVERGENCE sparse_attention: layer 0 (" in capsys.readouterr().out
    with faulty("sparse_attention", lambda a: {**a, "sink": a["sink"] + 1.0}):
        assert main([*command, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["divergence"]["op"] == "sparse_attention"


@pytest.mark.parametrize("option", [["linear"], ["--arch", "sm90a"], ["--originals", "."]])
def test_layers_go_with_a_model_alone(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What belongs to other ways of verifying is refused by name."""
    assert main(["verify", "--layers", *option]) == 2
    assert "--layers goes with --model" in capsys.readouterr().err
