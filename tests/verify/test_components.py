# SPDX-License-Identifier: Apache-2.0
"""megamoe verify: the bundled model is compared with its original weights, and a damaged copy is found out."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest
import torch

from megamoe.checkpoint.overlay import QUANTIZATION_LEAVES, write_overlay
from megamoe.checkpoint.reader import CheckpointError, CheckpointReader
from megamoe.checkpoint.writer import write_safetensors
from megamoe.models.load import BUNDLED
from megamoe.verify.components import MINIMUM, SOURCE_TREE_MASTER, ComponentResult, cosine, run, verify_components


def by_component(rows: list[ComponentResult]) -> dict[str, ComponentResult]:
    return {row.component: row for row in rows}


def damaged_copy(directory: pathlib.Path, part: str) -> pathlib.Path:
    """Copy the bundled model with the block scales of every weight whose name holds `part` in reversed row order."""
    for name in ("config.json", "tokenizer.json", "sample.txt"):
        shutil.copy(BUNDLED["tiny"] / name, directory / name)
    with CheckpointReader(BUNDLED["tiny"]) as reader:
        tensors = {name: reader.tensor(name) for name in reader.names}
        for name in reader.names:
            if part in name and name.endswith(".weight_scale"):
                tensors[name] = tensors[name].view(torch.uint8).flip(0).contiguous().view(torch.float8_e4m3fn)
        write_safetensors(directory / "model.safetensors", tensors)
    return directory


def test_bundled_model_against_its_master(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tiny", originals=None, as_json=True) == 0
    content = json.loads(capsys.readouterr().out)
    rows = {(row["component"], row["recipe"]): row for row in content["components"]}
    assert {recipe for _, recipe in rows} == {"w4a16", "w4a4"}
    for component in MINIMUM:
        assert rows[component, "w4a16"]["passed"], rows[component, "w4a16"]
    assert rows["decode_prefill", "w4a4"]["cosine"] >= 1 - 1e-9
    assert rows["linear", "w4a4"]["cosine"] < rows["linear", "w4a16"]["cosine"] < 1


@pytest.mark.parametrize(
    ("part", "component"), [("attn.wq_b", "linear"), ("ffn.experts", "experts"), ("shared_experts", "shared")]
)
def test_wrong_block_scales_are_found(part: str, component: str, tmp_path: pathlib.Path) -> None:
    model = damaged_copy(tmp_path, part)
    rows = by_component(verify_components(str(model), SOURCE_TREE_MASTER, recipes=("w4a16",)))
    assert {name for name in ("linear", "experts", "shared") if not rows[name].passed} == {component}


def test_overlay_restores_what_was_quantized(tmp_path: pathlib.Path) -> None:
    write_overlay(BUNDLED["tiny"], SOURCE_TREE_MASTER, tmp_path / "out")
    with (
        CheckpointReader(tmp_path / "out") as got,
        CheckpointReader(BUNDLED["tiny"]) as base,
        CheckpointReader(SOURCE_TREE_MASTER) as over,
    ):
        assert set(got.names) == {n for n in base.names if n.rsplit(".", 1)[-1] not in QUANTIZATION_LEAVES}
        for name in got.names:
            source = over if name in over else base
            assert torch.equal(got.tensor(name), source.tensor(name)), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_overlay_refuses_originals_that_do_not_fit(tmp_path: pathlib.Path) -> None:
    with CheckpointReader(SOURCE_TREE_MASTER) as over:
        tensors = {name: over.tensor(name) for name in over.names}
    tensors["layers.9.attn.wkv.weight"] = tensors.pop("layers.0.attn.wkv.weight")
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError) as refusal:
        write_overlay(BUNDLED["tiny"], tmp_path, tmp_path / "out")
    assert "layers.0.attn.wkv.weight: quantized, but not among the originals" in str(refusal.value)
    assert "layers.9.attn.wkv.weight: an original, but not quantized" in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_refusals(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="original weights of"):
        verify_components(str(tmp_path))
    with pytest.raises(ValueError, match=r"sample\.txt is missing"):
        verify_components(str(tmp_path), SOURCE_TREE_MASTER)


def test_nan_never_passes() -> None:
    nan = cosine(torch.tensor([1.0, float("nan")]), torch.ones(2))
    assert not ComponentResult("linear", "w4a16", nan, "", 1, 0.9).passed
