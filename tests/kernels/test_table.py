# SPDX-License-Identifier: Apache-2.0
"""The support table and the files agree, and every kernel can be planned, verified and read about."""

from __future__ import annotations

import importlib
import pathlib
import re

import pytest
import torch

from megamoe.formats.fragment_layout import CodeLayout
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.kernels import ARCHITECTURES, BORDERS, KERNELS, WEIGHT_LAYOUTS, support_table
from megamoe.kernels.compile import PACKAGE, TARGETS, Request, imported
from megamoe.kernels.plan import bound_to, module_for, requests_for
from megamoe.models.deepseek_v4.shapes import MODELS, op_calls, op_shapes
from megamoe.verify.inputs import INPUTS, MAX_EXPERTS
from megamoe.verify.tolerance import TOLERANCES

MODULES = sorted({module for table in KERNELS.values() for module in table.values()})
ROOMS = sorted({module.removeprefix(PACKAGE).partition(".")[0] for module in MODULES})
BOUND = re.compile(rf"_({'|'.join(ARCHITECTURES)})(?=$|_config$|_device$)")


def test_every_entry_has_a_file_and_every_file_an_entry(repository: pathlib.Path) -> None:
    """A host half is an operation's, and in the table, or that of a kernel behind operations of its room or another."""
    root = repository / "src/megamoe/kernels"
    reached, todo = set(), [module.removeprefix(PACKAGE) for module in MODULES]
    while todo:
        name = todo.pop()
        path = root.joinpath(*name.split(".")).with_suffix(".py")
        if path.is_file() and name not in reached:
            reached.add(name)
            todo += [f"{name.removesuffix('_config')}_device", *imported(path)]
    files = {f"{path.parent.name}.{path.stem}" for path in root.glob("*/*.py") if path.stem != "__init__"}
    assert files == reached
    operations = {one for one in files if BOUND.sub("", one.partition(".")[2]) in KERNELS}
    assert {PACKAGE + one for one in operations} == set(MODULES)


def test_parts_are_vocabulary(repository: pathlib.Path) -> None:
    """A kernel lies in the room of its subject; what kernels of several rooms say it with is in parts/."""
    root = repository / "src/megamoe/kernels"
    assert {path.parent.name for path in root.glob("*/*.py")} == {*ROOMS, "parts"}
    for path in (root / "parts").glob("*.py"):
        assert not re.search(r"^(class Config|def program|def run)\b", path.read_text("utf-8"), re.MULTILINE), path


def test_an_architecture_is_in_the_name_of_what_is_bound_to_it(repository: pathlib.Path) -> None:
    for path in (repository / "src/megamoe/kernels").rglob("*_device.py"):
        bound = BOUND.search(path.stem.removesuffix("_device"))
        wgmma = re.search(r"^from cutlass\.cute\.nvgpu import .*\bwarpgroup\b", path.read_text("utf-8"), re.MULTILINE)
        assert bool(wgmma) == bool(bound and bound[1] == "sm90"), path


@pytest.mark.parametrize("op", sorted(KERNELS))
def test_entries_are_well_formed(op: str, repository: pathlib.Path) -> None:
    for arch, module in KERNELS[op].items():
        assert arch in ARCHITECTURES
        name, bound = module.split(".")[-1], BOUND.search(module)
        assert BOUND.sub("", name) == op and (bound is None or bound[1] == arch), "a kernel has its operation's name"
        host = importlib.import_module(module)
        assert callable(host.run) and callable(host.configs)
        assert f"ops/{op}.py" in host.__doc__ or "ops/" in host.__doc__, "the header says where the meaning is"
    assert op in INPUTS, "verify and bench have no inputs for it"
    assert op in TOLERANCES
    assert op_shapes(op)


def test_host_halves_need_no_compiler(repository: pathlib.Path) -> None:
    """A server without the DSL imports every host half; only device halves import it."""
    for path in (repository / "src/megamoe/kernels").rglob("*.py"):
        imports_it = any(
            line.startswith(("import cutlass", "from cutlass"))
            for line in path.read_text(encoding="utf-8").splitlines()
        )
        assert imports_it <= path.stem.endswith("_device"), path


@pytest.mark.parametrize("op", sorted(KERNELS))
def test_the_order_of_weights_that_kernels_take_is_in_one_table(op: str) -> None:
    """verify and bench hand kernels their weights as those take them; a model is loaded by what WEIGHT_LAYOUTS says."""
    for inputs in INPUTS[op]:
        arguments = inputs.make(op_shapes(op)[0].dims, 2, torch.Generator().manual_seed(0))
        given = {one.code_layout for name, one in arguments.items()
                 if isinstance(one, NvFp4Tensor) and name not in inputs.per_token}  # fmt: skip
        for arch in KERNELS[op]:
            wanted = WEIGHT_LAYOUTS.get(op, {}).get(arch, CodeLayout.ROW_MAJOR)
            assert not given or given == {wanted}, f"{op} on {arch}"


@pytest.mark.parametrize("op", sorted(KERNELS))
def test_the_table_says_up_to_how_many_tokens_are_few(op: str) -> None:
    """The border in words is what the host half computes, at every N or H, or for some experts."""
    border = INPUTS[op][0].order_until
    assert (op in BORDERS) == (border is not None)
    if border is None:
        return
    if op.endswith("_experts") and op != "route_experts":
        assert BORDERS[op].few == "4 E / A, at least 12"
        for experts, slots in ((8, 2), (8, 6), (64, 6), (256, 6), (384, 6)):
            assert border({"E": experts, "A": slots}) == max(12, 4 * min(MAX_EXPERTS, experts) // slots)
        return
    size, sizes = ("H", range(1, 129)) if op == "sparse_attention" else ("N", range(1, 20000))
    steps: list[tuple[int, int]] = []  # up to which size, how many tokens
    for num_rows in sizes:
        number = border({size: num_rows})
        steps = [*steps[:-1], (num_rows, number)] if steps and steps[-1][1] == number else [*steps, (num_rows, number)]
    words = [f"{number} ({size} ≤ {num_rows:,})" for num_rows, number in steps[:-1]]
    assert BORDERS[op].few == ", ".join([*words, f"{steps[-1][1]:,}"])


@pytest.mark.parametrize("op", sorted(BORDERS))
def test_a_path_for_more_tokens_is_where_its_kernels_are(op: str) -> None:
    """What a host half launches for many tokens and is bound to an architecture says where there is that path."""
    for arch, module in KERNELS[op].items():
        configs = list(importlib.import_module(module).configs(op_shapes(op)[0].dims))
        bound = {bound_to(Request.of(one).module) for one in configs} - {None}
        assert (arch in BORDERS[op].more) == (bound <= {arch})
    assert set(BORDERS[op].more) <= set(KERNELS[op])


def test_objects_are_built_for_the_architecture_they_are_bound_to() -> None:
    calls = [(call.op, call.dims) for model in MODELS for call in op_calls(model)]
    modules = {target: {one.module for one in requests_for(calls, target)} for target in TARGETS}
    only = {one for one in modules["sm90a"] if bound_to(one)}
    assert only == {
        "attention.attention_tiles_sm90",
        "linear.weight_tiles_sm90",
        "experts.expert_tiles_sm90",
        "fp8.fp8_tiles_sm90",
        "indexer.index_scores_sm90",
    }
    assert modules["sm100a"] == modules["sm103a"] == modules["sm90a"] - only
    assert bound_to("linear.weight_tiles_sm90") == "sm90" and bound_to("a.b_sm100") == "sm100"
    assert bound_to("a.sm90_b") is None


def test_weight_layouts_name_operations_that_models_call() -> None:
    for op, layouts in WEIGHT_LAYOUTS.items():
        assert op_shapes(op) and set(layouts) <= set(ARCHITECTURES)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", MODELS)
def test_requests_of_a_model_can_be_rebuilt_from_their_values(model: str, target: str) -> None:
    requests = requests_for(((call.op, call.dims) for call in op_calls(model)), target)
    assert len(requests) > 5 and len({one.symbol for one in requests}) == len(requests)
    for one in requests:
        assert Request.of(one.config()) == one


def test_planning_passes_over_what_has_no_kernel() -> None:
    assert requests_for([("hadamard", {"n": 128})], "sm90a") == []
    assert module_for("hadamard", "sm90a") is None
    assert module_for("rms_norm", "sm100a") == "megamoe.kernels.rows.rms_norm"
    with pytest.raises(ValueError, match="--arch must be one of sm90a, sm100a, sm103a; got 'sm80'"):
        module_for("rms_norm", "sm80")


@pytest.mark.parametrize("name", ["docs/kernels.md", "README.md"])
def test_documents_print_the_table(name: str, repository: pathlib.Path) -> None:
    text = (repository / name).read_text(encoding="utf-8")
    header = support_table().splitlines()[0]
    assert text.count(header) == text.count(support_table()) == 1, f"{name} prints an old table, or none"
