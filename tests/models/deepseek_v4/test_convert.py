# SPDX-License-Identifier: Apache-2.0
"""megamoe convert on small checkpoints in every layout: values, metadata, reports, refusals, and others' readers."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import pathlib
from typing import Any

import pytest
import torch

from megamoe.checkpoint import CheckpointError, CheckpointReader, write_safetensors
from megamoe.checkpoint import convert as files
from megamoe.formats import fp8, mxfp4, nvfp4
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_search import ScaleSearch, quantize_weights
from megamoe.models.deepseek_v4.config import load_config
from megamoe.models.deepseek_v4.convert import (
    UNCALIBRATED_INPUT_SCALE,
    ConvertOptions,
    SearchChoice,
    convert,
    input_amax,
    plan,
    quantization_config,
)
from megamoe.models.deepseek_v4.layout import Format
from megamoe.models.deepseek_v4.weights import ModelWeights, load_weights

from .checkpoints import (
    CONFIG,
    DSPARK_KEYS,
    EXPERT,
    LAYOUTS,
    LINEAR,
    assert_same,
    encode_all,
    make_dspark_master,
    make_master,
    save,
    values_of,
)

OFFICIAL_CONFIG = {
    **CONFIG,
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
REQUANTIZE = ConvertOptions(experts="requantize", scale_search=ScaleSearch.MAX)
EVERYTHING = ConvertOptions(experts="requantize", attention="nvfp4", draft="convert", scale_search=ScaleSearch.MAX)
Tensors = dict[str, torch.Tensor]


def stored(directory: pathlib.Path) -> Tensors:
    with CheckpointReader(directory) as reader:
        return {name: reader.tensor(name).clone() for name in reader.names}


def load(directory: pathlib.Path, *, dequantize: bool = False) -> ModelWeights:
    with CheckpointReader(directory) as reader:
        return load_weights(reader, load_config(directory), dequantize=dequantize, dtype=torch.float32)


def report_of(directory: pathlib.Path) -> dict[str, Any]:
    return json.loads((directory / "report.json").read_text())


def source_in(
    directory: pathlib.Path, layout: str, seed: int, *, master: Tensors | None = None
) -> tuple[pathlib.Path, Tensors]:
    """A checkpoint in a layout, and its values."""
    tensors, values = encode_all(make_master(seed) if master is None else master, LAYOUTS[layout])
    config = OFFICIAL_CONFIG if layout in ("official", "nvidia", "base") else CONFIG
    save(directory, tensors, config)
    (directory / "tokenizer.json").write_text('{"tokenizer": 1}')
    (directory / "encoding").mkdir()
    (directory / "encoding" / "README.md").write_text("how to encode")
    return directory, values


@pytest.fixture
def official(tmp_path: pathlib.Path, seed: int) -> tuple[pathlib.Path, Tensors]:
    return source_in(tmp_path / "official", "official", seed)


def in_shards(source: pathlib.Path, directory: pathlib.Path, shard_of: Any) -> pathlib.Path:
    """Divide a checkpoint into files."""
    directory.mkdir()
    shards: dict[str, Tensors] = {}
    for name, tensor in stored(source).items():
        shards.setdefault(shard_of(name), {})[name] = tensor
    for shard, tensors in shards.items():
        write_safetensors(directory / shard, tensors)
    index = {name: shard for shard, tensors in shards.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    return directory


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(source: pathlib.Path, destination: pathlib.Path, options: ConvertOptions) -> str:
    with pytest.raises(ValueError) as caught:
        convert(source, destination, options)
    assert not destination.exists()
    return str(caught.value)


# official -> NVFP4, exact


def test_official_to_nvidia_layout(official, tmp_path):
    source, values = official
    before = stored(source)
    out = tmp_path / "out"
    planned, result = convert(source, out, ConvertOptions(producer=("megamoe", "1.2.3")))
    after = stored(out)
    converted = {
        name.removesuffix(".weight") for name in before if EXPERT.fullmatch(name) and name.startswith("layers.")
    }
    for module in converted:
        micro_scales = before.pop(f"{module}.scale")
        assert torch.equal(after[f"{module}.weight"], before.pop(f"{module}.weight").view(torch.uint8))
        assert after.pop(f"{module}.weight").dtype == torch.uint8
        block, tensor = after.pop(f"{module}.weight_scale"), after.pop(f"{module}.weight_scale_2")
        assert block.shape == (micro_scales.shape[0], micro_scales.shape[1] * 2) and block.dtype == torch.float8_e4m3fn
        assert torch.equal(block.float() * tensor, micro_scales.float().repeat_interleave(2, -1))
        assert tensor.shape == () and torch.frexp(tensor).mantissa == 0.5
        assert float(after.pop(f"{module}.input_scale")) == UNCALIBRATED_INPUT_SCALE
        if module.endswith(".w3"):
            assert torch.equal(tensor, stored(out)[f"{module[:-3]}.w1.weight_scale_2"])
    assert before.keys() == after.keys()  # everything else, the draft included, is there byte for byte
    for name, tensor in before.items():
        assert (
            torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)) and after[name].dtype == tensor.dtype
        )
    assert_same(values_of(load(out, dequantize=True)), values)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / "encoding" / "README.md").read_text() == "how to encode"
    assert len(result.records) == len(converted) and planned.inexact == {}
    assert not (out / "model.safetensors.index.json").exists()


def test_metadata_of_the_nvidia_layout(official, tmp_path):
    out = tmp_path / "out"
    convert(official[0], out, ConvertOptions(producer=("megamoe", "1.2.3")))
    content = json.loads((out / "config.json").read_text())
    quantization = content.pop("quantization_config")
    kept = dict(OFFICIAL_CONFIG)
    assert {**quantization, **kept.pop("quantization_config")} == quantization  # fields of the source kept
    assert content == kept and content["expert_dtype"] == "fp4"
    layers = {f"layers.{layer}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16} for layer in range(4)}
    tensor = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    expected = {
        "moe_quant_algo": "NVFP4",
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "producer": {"name": "megamoe", "version": "1.2.3"},
        "quantized_layers": layers,
        "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
        "config_groups": {"group_0": {"weights": tensor, "input_activations": tensor, "targets": ["Linear"]}},
    }
    assert {key: quantization[key] for key in expected} == expected
    assert set(quantization) == {*expected, *OFFICIAL_CONFIG["quantization_config"]}
    repeated = json.loads((out / "hf_quant_config.json").read_text())
    assert repeated["producer"] == expected["producer"]
    assert repeated["quantization"]["exclude_modules"] == expected["ignore"]
    assert repeated["quantization"]["quantized_layers"] == layers and "ignore" not in repeated["quantization"]


def test_exact_recoding_is_what_formats_say(official, tmp_path):
    convert(official[0], tmp_path / "out", ConvertOptions())
    before, after = stored(official[0]), stored(tmp_path / "out")
    for expert in range(4):
        prefix = f"layers.1.ffn.experts.{expert}"
        w1, w3 = (
            mxfp4.MxFp4Tensor(before[f"{prefix}.{name}.weight"].view(torch.uint8), before[f"{prefix}.{name}.scale"])
            for name in ("w1", "w3")
        )
        for name, weight in (("w1", w1), ("w3", w3)):
            expected = mxfp4.mxfp4_to_nvfp4_lossless(weight, top_exponent=mxfp4.shared_top_exponent(w1, w3))
            assert torch.equal(after[f"{prefix}.{name}.weight"], expected.codes)
            ours = after[f"{prefix}.{name}.weight_scale"].view(torch.uint8)
            assert torch.equal(ours, expected.scales.view(torch.uint8))
            assert torch.equal(after[f"{prefix}.{name}.weight_scale_2"], expected.tensor_scale)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_layout_is_read(layout, seed, tmp_path):
    source, values = source_in(tmp_path / "source", layout, seed)
    options = dataclasses.replace(
        ConvertOptions(),
        experts="lossless"
        if "fp4" in layout or layout in ("official", "nvidia", "compressed", "mixed")
        else "requantize",
        scale_search=ScaleSearch.MAX,
    )
    if layout == "mixed":
        assert "gate and up cannot be given one tensor scale" in refusal(source, tmp_path / "out", options)
        return
    planned, _ = convert(source, tmp_path / "out", options)
    got = values_of(load(tmp_path / "out", dequantize=True))
    exact = options.experts == "lossless"
    rounded = set() if exact else {n for n in values if EXPERT.fullmatch(n) and n.startswith("layers.")}
    for name, expected in values.items():
        if name in rounded:
            assert float((got[name] - expected).norm() / expected.norm()) < 0.12
        else:
            assert torch.equal(got[name], expected), name
    formats = {planned.formats[n.removesuffix(".weight")] for n in values if EXPERT.fullmatch(n) and n[0] == "l"}
    assert formats == {Format.NVFP4}
    names = set(stored(tmp_path / "out"))
    assert not any(name.endswith(("weight_packed", "global_scale")) or name.startswith("model.") for name in names)


def test_shards_pairs_apart_and_jobs(official, tmp_path):
    """Gate and up in different files, a scale in a third: one tensor scale all the same."""

    def shard_of(name: str) -> str:
        number = 3 if name.endswith("experts.1.w1.scale") else 2 if ".w3." in name else 1
        return f"model-{number:05d}-of-00003.safetensors"

    source = in_shards(official[0], tmp_path / "shards", shard_of)
    whole = tmp_path / "whole"
    convert(official[0], whole, EVERYTHING)
    for jobs in (1, 3):
        out = tmp_path / f"out{jobs}"
        convert(source, out, EVERYTHING, jobs=jobs)
        assert_same(stored(out), stored(whole))
        assert {path.name for path in out.glob("*.safetensors")} == {
            "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
        }  # fmt: skip
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")
    index = json.loads((tmp_path / "out1" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["layers.0.ffn.experts.1.w3.weight_scale"] == "model-00002-of-00003.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(whole).values())


# blocks that cannot be exact


@pytest.fixture
def wide(official, tmp_path) -> tuple[pathlib.Path, dict[str, list[list[int]]]]:
    """An official checkpoint with three blocks too far under the largest, and one such block that holds zeros."""
    tensors = stored(official[0])
    planted = {}
    for module, row, block in (
        ("layers.2.ffn.experts.3.w2", 7, 0), ("layers.2.ffn.experts.3.w1", 5, 2), ("layers.2.ffn.experts.3.w1", 5, 4)
    ):  # fmt: skip
        tensors[f"{module}.scale"].view(torch.uint8)[row, block] = 80
        planted.setdefault(module, []).append([row, block])
    zeros = "layers.0.ffn.experts.0.w1"
    tensors[f"{zeros}.scale"].view(torch.uint8)[1, 1] = 1
    tensors[f"{zeros}.weight"][1, 16:32] = 0
    return save(tmp_path / "wide", tensors, OFFICIAL_CONFIG), planted


def test_inexact_blocks_are_refused_with_all_weights_named(wide, tmp_path):
    source, planted = wide
    text = refusal(source, tmp_path / "out", ConvertOptions())
    assert "layers.2.ffn.experts.3.w1: 2 of 160 blocks have no equal in NVFP4" in text and "[5, 2], [5, 4]" in text
    assert "layers.2.ffn.experts.3.w2: 1 of 160 blocks" in text and "--experts requantize" in text
    assert "layers.0" not in text
    assert {name: blocks for name, (_, blocks) in plan(source, REQUANTIZE).inexact.items()} == planted


def test_inexact_blocks_are_rounded_if_allowed_and_listed(wide, tmp_path):
    source, planted = wide
    out = tmp_path / "out"
    convert(source, out, REQUANTIZE)
    before, after = values_of(load(source, dequantize=True)), values_of(load(out, dequantize=True))
    report = report_of(out)
    listed = {r["name"]: r["listed_blocks"] for r in report["tensors"] if r.get("inexact_blocks")}
    assert listed == planted and report["inexact_blocks"] == 3 and report["proved_exact"] == 46
    for name, values in before.items():
        module = name.removesuffix(".weight")
        unequal = (after[name] != values).nonzero()
        blocks = {(int(row), int(column) // 32) for row, column in unequal} if module in planted else set()
        assert blocks <= {tuple(block) for block in planted.get(module, [])}
        assert module in planted or torch.equal(after[name], values), name
    page = (out / "report.html").read_text()
    assert "3 blocks had no equal and were rounded" in page and "[5, 2], [5, 4]" in page


def test_scales_that_are_no_numbers_are_named(official, tmp_path):
    tensors = stored(official[0])
    tensors["layers.1.ffn.experts.2.w2.scale"].view(torch.uint8)[3, 0] = 255
    source = save(tmp_path / "damaged", tensors, OFFICIAL_CONFIG)
    text = refusal(source, tmp_path / "out", ConvertOptions())
    assert "layers.1.ffn.experts.2.w2.scale: byte 0xff, NaN in E8M0 (1 of 160 bytes looked at)." in text


# the proof is on the written bytes


@pytest.mark.parametrize("proof", ["codes", "values"])
@pytest.mark.parametrize("fault", ["code", "scale", "tensor scale"])
def test_a_fault_on_the_way_to_the_disk_is_found(official, tmp_path, monkeypatch, proof, fault):
    victim = "layers.1.ffn.experts.2.w3"
    real = files.write_from
    leaf = {"code": "weight", "scale": "weight_scale", "tensor scale": "weight_scale_2"}[fault]
    out = tmp_path / "out"
    planned = plan(official[0], ConvertOptions())
    shard = files._OpenShard(planned.plan.shards[0], tmp_path / "x.safetensors", planned.plan.metadata)
    offset = shard.places[f"{victim}.{leaf}"][0]
    shard.abandon()

    def faulty(descriptor: int, buffer: memoryview, where: int) -> None:
        if where == offset:
            data = bytearray(buffer)
            data[2] ^= 0x10 if fault != "tensor scale" else 0x80
            buffer = memoryview(data)
        real(descriptor, buffer, where)

    monkeypatch.setattr(files, "write_from", faulty)
    with pytest.raises(CheckpointError, match=rf"{victim}: \d+ blocks of 32 differ from the source after they were"):
        convert(official[0], out, ConvertOptions(proof=proof))
    assert not list(out.glob("*.safetensors"))
    monkeypatch.setattr(files, "write_from", real)
    convert(official[0], out, ConvertOptions(proof=proof))


def test_proof_by_values_changes_nothing_else(official, tmp_path):
    for proof in ("codes", "values"):
        convert(official[0], tmp_path / proof, ConvertOptions(proof=proof))
    assert (tmp_path / "codes" / "model.safetensors").read_bytes() == (
        tmp_path / "values" / "model.safetensors"
    ).read_bytes()


# rounding


@pytest.mark.parametrize("search", list(ScaleSearch))
@pytest.mark.parametrize("layout", ["bf16", "official"])
def test_all_nvfp4(layout, search, seed, tmp_path):
    source, values = source_in(tmp_path / "source", layout, seed)
    out = tmp_path / "out"
    convert(source, out, dataclasses.replace(EVERYTHING, scale_search=search))
    weights = load(out)
    for weight in (weights.mtp[0].h_proj, weights.blocks[1].attention.indexer.wq_b, weights.blocks[2].moe.shared_w2):
        assert isinstance(weight, NvFp4Tensor)
    got = values_of(load(out, dequantize=True))
    expected = dict(values)
    done = set()
    for name in values:
        if not LINEAR.fullmatch(name) or (layout == "official" and EXPERT.fullmatch(name)) or name in done:
            continue
        parts = name.split(".")
        partner = {"w1": "w3"}.get(parts[-2])
        members = [name, ".".join([*parts[:-2], partner, "weight"])] if partner else [name]
        if parts[-2] == "w3":
            continue
        for member, quantized in zip(members, quantize_weights([values[one] for one in members], search), strict=True):
            expected[member] = nvfp4.dequantize(quantized)
            done.add(member)
    assert_same(got, expected)
    report = report_of(out)
    for record in report["tensors"]:
        name = f"{record['name']}.weight"
        error = got[name] - values[name]
        if record["method"] == "recoded":
            assert torch.equal(got[name], values[name])
            continue
        assert record["relative_l2"] == pytest.approx(float(error.norm() / values[name].norm()), rel=1e-5)
        cosine = torch.nn.functional.cosine_similarity(got[name].flatten(), values[name].flatten(), dim=0)
        assert record["cosine"] == pytest.approx(float(cosine), rel=1e-5)
        assert record["max_error"] == float(error.abs().max())
        assert sum(record["histogram"]) + record["zero_errors"] == error.numel()
        assert record["zero_errors"] == int((error == 0).sum())
        assert record["bytes_after"] == error.numel() * 9 // 16 + 8
    assert (
        report["worst"][0]
        == max((r for r in report["tensors"] if r.get("relative_l2")), key=lambda r: r["relative_l2"])["name"]
    )
    assert sum(r["relative_l2"] or 0 for r in report["tensors"] if "relative_l2" in r) > 0


def test_a_search_for_one_kind(official, tmp_path):
    choice = SearchChoice.parse("max,shared=mse")
    assert str(choice) == "max,shared=mse" and SearchChoice.parse(str(choice)) == choice
    assert str(SearchChoice.parse("mse")) == "mse" == str(ConvertOptions().searches)
    assert SearchChoice.parse("mse,experts=max").of("mtp.0.ffn.experts.1.w2") is ScaleSearch.MAX
    convert(official[0], tmp_path / "out", dataclasses.replace(EVERYTHING, scale_search=choice))
    report = report_of(tmp_path / "out")
    methods = {record["name"]: record["method"] for record in report["tensors"]}
    assert methods["layers.1.ffn.shared_experts.w2"] == methods["mtp.0.ffn.shared_experts.w1"] == "rounded, mse"
    assert methods["layers.1.attn.wo_a"] == methods["mtp.0.e_proj"] == "rounded, max"
    assert report["options"]["scale_search"] == "max,shared=mse"


def test_metadata_of_the_all_nvfp4_layout(official, tmp_path):
    convert(official[0], tmp_path / "out", EVERYTHING)
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    layers = set(quantization["quantized_layers"])
    assert {"layers.0.ffn.experts", "layers.1.attn.indexer.wq_b", "mtp.0.e_proj", "layers.3.attn.wo_a"} <= layers
    assert {"layers.2.ffn.shared_experts", "mtp.0.ffn.experts"} <= layers
    # five projections and two expert groups a block; two indexers; two of the draft
    assert len(layers) == 5 * 7 + 2 + 2
    assert not {"mtp.*", "*.attn.*"} & set(quantization["ignore"])
    assert quantization["moe_quant_algo"] == "NVFP4" and quantization["quant_method"] == "modelopt"
    convert(official[0], tmp_path / "backbone", dataclasses.replace(EVERYTHING, draft="keep"))
    backbone = json.loads((tmp_path / "backbone" / "config.json").read_text())["quantization_config"]
    assert "mtp.*" in backbone["ignore"] and backbone["quant_method"] == "fp8"
    assert not any(name.startswith("mtp.") for name in backbone["quantized_layers"])


def test_quantization_config_names_what_stays():
    formats = {
        "layers.0.attn.wq_a": Format.NVFP4,
        "layers.0.attn.wkv": Format.FP8,
        "layers.0.ffn.experts.0.w1": Format.MXFP4,
    }
    made = quantization_config(formats, None, producer=("a", "1"))
    assert made is not None and made["moe_quant_algo"] is None and made["quant_method"] == "fp8"
    assert {"layers.0.attn.wkv", "layers.0.ffn.experts"} <= set(made["ignore"])
    assert (
        quantization_config({"layers.0.attn.wq_a": Format.PLAIN}, {"quant_method": "modelopt"}, producer=("a", "1"))
        is None
    )


def test_rounding_experts_must_be_allowed(seed, tmp_path):
    source, _ = source_in(tmp_path / "source", "base", seed)
    text = refusal(source, tmp_path / "out", ConvertOptions())
    assert (
        "48 problems" in text and "layers.0.ffn.experts.0.w1.weight: fp8 cannot become NVFP4 without rounding" in text
    )
    with pytest.raises(ValueError, match="--experts requantize rounds to NVFP4 only; got --to mxfp4"):
        ConvertOptions(to="mxfp4", experts="requantize")
    with pytest.raises(ValueError, match="attention must be one of keep, nvfp4, fp8; got 'fp4'"):
        ConvertOptions(attention="fp4")


# calibration


def test_calibration(official, tmp_path):
    names = sorted(n.removesuffix(".weight") for n in make_master(1) if LINEAR.fullmatch(n))
    calibration = {name: 1.0 + number / 8 for number, name in enumerate(names)}
    for name in list(calibration):
        if name.startswith("layers.2.ffn.experts.3."):
            del calibration[name]
    calibration["layers.2.ffn.experts.0.w2"] = 0.0
    calibration["layers.2.ffn.experts.1.w2"] = 77.0
    calibration["layers.2.ffn.experts.1.w3"] = 55.0
    convert(official[0], tmp_path / "out", dataclasses.replace(EVERYTHING, calibration=calibration))
    scales = load(tmp_path / "out").input_scales
    assert len(scales) == len(names)
    for expert, projection, amax in ((3, "w2", 77), (0, "w2", 77), (3, "w1", 55), (3, "w3", 55), (1, "w1", 55)):
        assert scales[f"layers.2.ffn.experts.{expert}.{projection}"] == pytest.approx(amax / 2688)
    assert scales["layers.0.attn.wq_a"] == pytest.approx(calibration["layers.0.attn.wq_a"] / 2688)
    assert scales["mtp.0.ffn.shared_experts.w1"] == scales["mtp.0.ffn.shared_experts.w3"]
    assert report_of(tmp_path / "out")["input_scales"] == "calibrated"
    for change, message in (
        ({"layers.0.attn.wq_a": 0.0}, "layers.0.attn.wq_a: no amax"),
        ({"layers.0.attn.wq_a": float("nan")}, "layers.0.attn.wq_a: amax [nan]"),
        ({"layers.9.attn.wq_a": 1.0}, "layers.9.attn.wq_a: not a weight of this model"),
    ):
        options = dataclasses.replace(EVERYTHING, calibration={**calibration, **change})
        assert message in refusal(official[0], tmp_path / "refused", options)


def test_calibration_of_experts_alone_is_enough_for_experts(official, tmp_path):
    calibration = {f"layers.{layer}.ffn.experts.0.{name}": 2.0 for layer in range(4) for name in ("w1", "w2", "w3")}
    convert(official[0], tmp_path / "out", ConvertOptions(calibration=calibration))
    assert set(load(tmp_path / "out").input_scales.values()) == {float(torch.tensor(2 / 2688))}
    del calibration["layers.1.ffn.experts.0.w2"]
    with pytest.raises(ValueError, match=r"layers.1.ffn.experts.0.w2: no amax. \(so are layers.1.ffn.experts.1.w2\)"):
        input_amax(
            [*calibration, "layers.1.ffn.experts.0.w2", "layers.1.ffn.experts.1.w2"], calibration, {*calibration}
        )


def test_stored_input_scales_are_kept(seed, tmp_path):
    for layout in ("nvidia", "compressed"):
        source, _ = source_in(tmp_path / layout, layout, seed)
        convert(source, tmp_path / f"{layout}-out", ConvertOptions(attention="nvfp4", scale_search=ScaleSearch.MAX))
        found = load(tmp_path / f"{layout}-out").input_scales
        scales = {name: scale for name, scale in found.items() if EXPERT.fullmatch(f"{name}.weight") and name[0] == "l"}
        assert len(scales) == 48 and all(scale == pytest.approx(0.001) for scale in scales.values())


# the way back


@pytest.mark.parametrize("proof", ["codes", "values"])
def test_there_and_back_is_the_same_checkpoint(official, tmp_path, proof):
    source, _ = official
    convert(source, tmp_path / "nvfp4", ConvertOptions(draft="convert"))
    convert(tmp_path / "nvfp4", tmp_path / "back", ConvertOptions(to="mxfp4", draft="convert", proof=proof))
    before, after = stored(source), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
        assert after[name].dtype == tensor.dtype
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == OFFICIAL_CONFIG
    assert not (tmp_path / "back" / "hf_quant_config.json").exists()


@pytest.mark.parametrize("start", ["official", "nvfp4"])
def test_to_fp8_blocks(official, tmp_path, start):
    source, values = official
    if start == "nvfp4":
        convert(source, tmp_path / "nvfp4", ConvertOptions(draft="convert"))
        source = tmp_path / "nvfp4"
    convert(source, tmp_path / "fp8", ConvertOptions(to="fp8", draft="convert"))
    assert_same(values_of(load(tmp_path / "fp8", dequantize=True)), values)
    content = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert content["expert_dtype"] == "fp8" and content["quantization_config"] == OFFICIAL_CONFIG["quantization_config"]
    name = "layers.0.ffn.experts.0.w1"
    after = stored(tmp_path / "fp8")
    assert after[f"{name}.weight"].dtype == torch.float8_e4m3fn and after[f"{name}.scale"].dtype == torch.float8_e8m0fnu
    block = fp8.Fp8BlockTensor(after[f"{name}.weight"], after[f"{name}.scale"])
    assert torch.equal(fp8.dequantize(block), values[f"{name}.weight"])


def test_what_has_no_equal_is_refused_by_name(official, seed, tmp_path):
    source, _ = source_in(tmp_path / "nvidia", "nvidia", seed)
    for to in ("mxfp4", "fp8"):
        text = refusal(source, tmp_path / "out", ConvertOptions(to=to))
        assert "48 problems" in text and "layers.0.ffn.experts.0.w1.weight" in text
    convert(official[0], tmp_path / "all", EVERYTHING)
    text = refusal(tmp_path / "all", tmp_path / "out", ConvertOptions(to="mxfp4", attention="fp8"))
    assert "layers.0.attn.wq_a.weight" in text and "layers.0.ffn.experts" not in text and "34 problems" in text
    convert(tmp_path / "all", tmp_path / "half", ConvertOptions(to="mxfp4"))  # attention kept as NVFP4
    base, _ = source_in(tmp_path / "base", "base", seed)
    assert "fp8 cannot become mxfp4 without rounding" in refusal(base, tmp_path / "out", ConvertOptions(to="mxfp4"))
    plain, _ = source_in(tmp_path / "bf16", "bf16", seed)
    text = refusal(plain, tmp_path / "out", ConvertOptions(to="fp8", attention="fp8"))
    assert "plain cannot become fp8" in text and "layers.0.attn.wq_a.weight" in text


def test_one_block_that_fp8_cannot_hold(official, tmp_path):
    """Fifteen octaves in a block of 128 x 128, with the small end on a subnormal that needs another bit."""
    tensors = stored(official[0])
    name = "layers.3.ffn.experts.1.w2"
    tensors[f"{name}.scale"].view(torch.uint8)[:] = 110
    tensors[f"{name}.scale"].view(torch.uint8)[9, 0] = 110 + 15
    tensors[f"{name}.weight"][9, 3] = 0x77  # sixes
    tensors[f"{name}.weight"][8, 3] = 0x11  # halves, 2^15 below
    source = save(tmp_path / "wide", tensors, OFFICIAL_CONFIG)
    text = refusal(source, tmp_path / "out", ConvertOptions(to="fp8"))
    assert "1 problem" not in text and name in text and "have no equal in FP8 blocks" in text
    tensors[f"{name}.scale"].view(torch.uint8)[9, 0] = 110 + 14
    convert(save(tmp_path / "narrow", tensors, OFFICIAL_CONFIG), tmp_path / "out", ConvertOptions(to="fp8"))


def test_an_all_zero_block_finds_its_way_back(official, tmp_path):
    tensors = stored(official[0])
    name = "layers.3.ffn.experts.1.w2"
    tensors[f"{name}.weight"][2, :] = 0
    tensors[f"{name}.scale"].view(torch.uint8)[2, 0] = 1
    source = save(tmp_path / "zeros", tensors, OFFICIAL_CONFIG)
    convert(source, tmp_path / "nvfp4", ConvertOptions())
    convert(tmp_path / "nvfp4", tmp_path / "back", ConvertOptions(to="mxfp4"))
    assert_same(values_of(load(tmp_path / "back", dequantize=True)), values_of(load(source, dequantize=True)))


# fused experts and drafts


def test_fused_experts_are_taken_apart(seed, tmp_path):
    """transformers' tensors that hold one projection of all experts."""
    master = make_master(seed, num_mtp=0)
    tensors = dict(master)
    for layer in range(4):
        prefix = f"layers.{layer}.ffn.experts"
        parts = {n: [tensors.pop(f"{prefix}.{e}.{n}.weight") for e in range(4)] for n in ("w1", "w3", "w2")}
        gate_up = torch.stack([torch.cat((g, u)) for g, u in zip(parts["w1"], parts["w3"], strict=True)])
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = gate_up
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(parts["w2"])
    source = save(tmp_path / "fused", tensors, {**CONFIG, "num_nextn_predict_layers": 0})
    apart = save(tmp_path / "apart", master, {**CONFIG, "num_nextn_predict_layers": 0})
    for folder in (source, apart):
        convert(folder, tmp_path / f"{folder.name}-out", REQUANTIZE)
    assert_same(stored(tmp_path / "fused-out"), stored(tmp_path / "apart-out"))


def test_a_dspark_draft_is_carried_over(seed, tmp_path):
    tensors, _ = encode_all(make_dspark_master(seed), LAYOUTS["official"])
    source = save(tmp_path / "dspark", tensors, {**OFFICIAL_CONFIG, **DSPARK_KEYS})
    convert(source, tmp_path / "out", dataclasses.replace(EVERYTHING, draft="keep"))
    before, after = stored(source), stored(tmp_path / "out")
    for name, tensor in before.items():
        if name.startswith("mtp."):
            assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_dspark_draft_is_converted_like_the_backbone(seed, tmp_path):
    tensors, _ = encode_all(make_dspark_master(seed), LAYOUTS["official"])
    source = save(tmp_path / "dspark", tensors, {**OFFICIAL_CONFIG, **DSPARK_KEYS})
    convert(source, tmp_path / "out", EVERYTHING)
    draft = load(tmp_path / "out").dspark
    assert draft is not None
    assert isinstance(draft.main_proj, NvFp4Tensor) and isinstance(draft.stages[2].moe.w1, NvFp4Tensor)
    assert draft.markov_w1.dtype is torch.bfloat16


# reports


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.links += [str(value) for name, value in attributes if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_stands_alone(official, tmp_path):
    out = tmp_path / "out"
    convert(official[0], out, EVERYTHING)
    page = _Page()
    text = (out / "report.html").read_text()
    page.feed(text)
    assert (
        page.open == []
        and page.links == []
        and "script" not in page.tags
        and "://" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    )
    groups = report_of(out)["groups"]
    figures = (
        1
        + sum(bool(g["exponent_spans"]) for g in groups.values())
        + sum(bool(g["rounded_weights"]) for g in groups.values())
    )
    assert page.tags["figure"] == figures >= 5
    assert text.count("<tr>") == 1 + len(groups) + 1 + len(report_of(out)["worst"])
    assert "60</strong> of 104 converted weights were proved equal" in text


def test_report_accounts_for_every_byte(official, tmp_path):
    out = tmp_path / "out"
    convert(official[0], out, EVERYTHING)
    report = report_of(out)
    sizes = {
        key: sum(t.nbytes for t in stored(folder).values()) for key, folder in (("before", official[0]), ("after", out))
    }
    assert {key: report["bytes"][key] for key in sizes} == sizes
    for key in sizes:
        assert sum(r[f"bytes_{key}"] for r in report["tensors"]) + report["bytes"]["carried_over"] == sizes[key]
        assert sum(g[f"bytes_{key}"] for g in report["groups"].values()) == sum(
            r[f"bytes_{key}"] for r in report["tensors"]
        )
    blocks = sum(r["blocks"] for r in report["tensors"] if r["method"] == "recoded")
    assert blocks == sum(sum(g["exponent_spans"].values()) for g in report["groups"].values())


def test_reports_say_nothing_of_time_and_place(official, tmp_path):
    convert(official[0], tmp_path / "one", EVERYTHING)
    convert(official[0], tmp_path / "elsewhere" / "two", EVERYTHING, jobs=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "elsewhere" / "two")
    assert str(tmp_path) not in (tmp_path / "one" / "report.json").read_text()
