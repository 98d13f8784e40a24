# SPDX-License-Identifier: Apache-2.0
"""megamoe.load runs every layout, and gives the numbers that the same weights give in any other layout.

Row C2 of docs/faults.md.
"""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Callable

import pytest
import torch

import megamoe
from megamoe.checkpoint import CheckpointError
from megamoe.cli import main
from megamoe.models.recipe import RECIPES

from ..fake_files import Files, Raw, fake
from .deepseek_v4.checkpoints import LAYOUTS, encode_all, make_master, save

TOKENS = list(range(3, 40))


def logits(directory: pathlib.Path, recipe: str) -> torch.Tensor:
    """Return the logits of a few tokens."""
    out = megamoe.load(directory, recipe=recipe).logits(TOKENS)
    assert bool(torch.isfinite(out).all())
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_numbers_of_its_values_stored_plainly(tmp_path, seed, layout):
    tensors, values = encode_all(make_master(seed), LAYOUTS[layout])
    stored = logits(save(tmp_path / "stored", tensors), "exact")
    plain = logits(save(tmp_path / "plain", values), "exact")
    assert torch.equal(stored, plain)


@pytest.mark.parametrize("layout", fake.LAYOUTS)
def test_every_layout_runs_in_every_recipe(tmp_path, layout):
    directory = fake.write_fake(tmp_path, "small", layout)
    for recipe in RECIPES:
        megamoe.load(directory, recipe=recipe).logits(TOKENS[:4])


def spelled_by_compressed_tensors(files: Files) -> None:
    """Rewrite NVFP4 experts: other names, reciprocals for the two scalars."""
    for name in list(files.tensors):
        module, _, leaf = name.rpartition(".")
        if f"{module}.weight_scale_2" not in files.tensors and leaf != "weight_scale_2":
            continue
        raw = files.tensors[name]
        if leaf == "weight":
            files.tensors[f"{module}.weight_packed"] = files.tensors.pop(name)
        elif leaf in ("weight_scale_2", "input_scale"):
            value = struct.unpack("<f", raw.content)[0]
            theirs = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}[leaf]
            files.tensors[f"{module}.{theirs}"] = Raw("F32", (1,), struct.pack("<f", 1 / value))
    for name in list(files.tensors):
        if name.endswith((".weight_scale_2", ".input_scale")):
            del files.tensors[name]
    files.config["quantization_config"] = {"quant_method": "compressed-tensors"}


@pytest.mark.parametrize("recipe", ["w4a16", "w4a4"])
@pytest.mark.parametrize("layout", ["nvidia", "nvfp4"])
def test_compressed_tensors_gives_the_numbers_of_nvidias_layout(tmp_path, layout, recipe):
    files = Files.read(fake.write_fake(tmp_path / "source", "small", layout))
    for name in files.tensors:  # powers of two: their reciprocals are exact
        if name.endswith(".input_scale"):
            files.put_float(name, 2.0**-6)
    ours = logits(files.write(tmp_path / "ours"), recipe)
    spelled_by_compressed_tensors(files)
    assert any(name.endswith(".weight_packed") for name in files.tensors)
    assert not any(name.endswith(".weight_scale_2") for name in files.tensors)
    assert torch.equal(logits(files.write(tmp_path / "theirs"), recipe), ours)


def test_a_reciprocal_taken_for_a_scale_is_refused(tmp_path):
    files = Files.read(fake.write_fake(tmp_path / "source", "small", "nvidia"))
    spelled_by_compressed_tensors(files)
    for name in files.tensors:
        if name.endswith(".weight_global_scale"):
            files.put_float(name, 1 / struct.unpack("<f", files.tensors[name].content)[0])
    with pytest.raises(CheckpointError, match="It looks like the reciprocal") as caught:
        megamoe.load(files.write(tmp_path / "wrong"))
    assert caught.value.rules == ("tensor-scale-reciprocal",)


@pytest.mark.parametrize("recipe", ["exact", "w4a16"])
def test_both_metadata_schemas_give_the_same_numbers(tmp_path, recipe):
    new, old = (logits(fake.write_fake(tmp_path / one, "small", one), recipe) for one in ("nvidia", "nvidia-old"))
    assert torch.equal(new, old)


def test_a_dspark_release_gives_the_numbers_of_its_backbone(tmp_path):
    preview = Files.read(fake.write_fake(tmp_path / "preview", "small", "preview"))
    dspark = Files.read(fake.write_fake(tmp_path / "dspark", "small", "dspark"))
    for name in preview.tensors:
        if not name.startswith("mtp."):
            assert preview.tensors[name] == dspark.tensors[name]
    assert torch.equal(logits(tmp_path / "preview", "exact"), logits(tmp_path / "dspark", "exact"))


def test_module_names_of_transformers_give_the_same_numbers(tmp_path):
    saved, modules = (logits(fake.write_fake(tmp_path / one, "small", one), "exact") for one in ("resave", "bf16"))
    assert torch.equal(saved, modules)


# Values that mean something else, and going on all the same.


def cast_scales(files: Files) -> None:
    """E8M0 bytes of one expert cast as numbers (vllm#43416)."""
    raw = files.tensors["layers.2.ffn.experts.1.w2.scale"]
    raw.content = bytes(127 + max(byte, 1).bit_length() - 1 for byte in raw.content)


def turn_over(suffix: str, value: float) -> Callable[[Files], None]:
    """Store reciprocals under a name of scales that multiply."""

    def inject(files: Files) -> None:
        for name in [name for name in files.tensors if name.endswith(suffix)]:
            files.put_float(name, value)

    return inject


UNLESS_ACCEPTED = [
    ("preview", cast_scales, "scale-cast"),
    ("nvidia", turn_over(".weight_scale_2", 4096.0), "tensor-scale-reciprocal"),
    ("nvidia", turn_over(".input_scale", 100.0), "input-scale-reciprocal"),
]


@pytest.mark.parametrize(("layout", "inject", "rule"), UNLESS_ACCEPTED, ids=[row[2] for row in UNLESS_ACCEPTED])
def test_scales_that_mean_something_else_are_refused_unless_accepted(tmp_path, capsys, layout, inject, rule):
    files = Files.read(fake.write_fake(tmp_path / "source", "small", layout))
    inject(files)
    directory, out = files.write(tmp_path / "wrong"), tmp_path / "out"
    with pytest.raises(CheckpointError, match=f"To go on all the same: --accept {rule}") as caught:
        megamoe.load(directory)
    assert caught.value.rules == (rule,)
    convert = ["convert", str(directory), str(out), "--attention", "nvfp4"]
    assert main(convert) == 2 and not out.exists()
    assert f"--accept {rule}" in capsys.readouterr().err
    model = megamoe.load(directory, accept=[rule])
    assert any(note.startswith(f"{rule}: ") for note in model.notes)
    assert main([*convert, "--accept", rule]) == 0
    assert f"note: {rule}: " in capsys.readouterr().err
    job = json.loads((out / "convert-manifest.jsonl").read_text().splitlines()[0])
    assert job["options"]["accept"] == [rule]


def test_only_some_rules_can_be_accepted(tmp_path):
    for name in ("tensor-missing", "nonsense"):
        with pytest.raises(
            ValueError, match=f"accept: '{name}' is no rule that can be accepted; these can: scale-cast"
        ):
            megamoe.load("tiny", accept=[name])
