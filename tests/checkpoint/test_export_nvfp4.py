# SPDX-License-Identifier: Apache-2.0
"""The tiny model's exporter: NVIDIA's layout, everything else byte for byte, and scale search that pays."""

from __future__ import annotations

import importlib.util
import json
import pathlib
from types import ModuleType

import pytest
import torch

from megamoe.checkpoint import CheckpointError, CheckpointReader
from megamoe.formats import nvfp4
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.models.deepseek_v4.config import load_config
from megamoe.models.deepseek_v4.weights import load_weights

from ..models.deepseek_v4.checkpoints import CONFIG, EXPERT, LINEAR, assert_same, make_master, save, values_of


@pytest.fixture(scope="module")
def exporter(repository) -> ModuleType:
    """The script as a module."""
    path = repository / "tools" / "tiny_model" / "export_nvfp4.py"
    spec = importlib.util.spec_from_file_location("export_nvfp4", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def calibration_of(master: dict[str, torch.Tensor]) -> dict[str, float]:
    """An amax for every linear, another for each."""
    names = sorted(name.removesuffix(".weight") for name in master if LINEAR.fullmatch(name))
    return {name: 1.0 + number / 8 for number, name in enumerate(names)}


@pytest.fixture
def master(tmp_path: pathlib.Path, seed: int) -> pathlib.Path:
    """A bf16 master directory with a tokenizer."""
    directory = save(tmp_path / "master", make_master(seed))
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.mark.parametrize("block_scale", ["amax", "mse"])
def test_layout(exporter, master, tmp_path, seed, block_scale):
    originals = make_master(seed)
    calibration = calibration_of(originals)
    out = tmp_path / "out"
    result = exporter.export(master, calibration, out, block_scale)
    assert result["bytes"] == (out / "model.safetensors").stat().st_size
    assert (out / "tokenizer.json").read_text() == "{}"
    with CheckpointReader(out) as reader:
        for name, tensor in originals.items():
            if not LINEAR.fullmatch(name):
                assert torch.equal(reader.tensor(name), tensor) and reader.tensor(name).dtype == tensor.dtype
                continue
            module = name.removesuffix(".weight")
            num_rows, num_columns = tensor.shape
            assert str(reader.info(name)) == f"U8 [{num_rows}, {num_columns // 2}]"
            assert str(reader.info(f"{module}.weight_scale")) == f"F8_E4M3 [{num_rows}, {num_columns // 16}]"
            assert str(reader.info(f"{module}.weight_scale_2")) == str(reader.info(f"{module}.input_scale")) == "F32 []"
            group = (
                [module, module[:-2] + ("w3" if module.endswith("w1") else "w1")]
                if module[-2:] in ("w1", "w3")
                else [module]
            )
            amax = max(calibration[member] for member in group)
            assert float(reader.tensor(f"{module}.input_scale")) == pytest.approx(amax / 2688)
            for member in group:
                assert torch.equal(reader.tensor(f"{member}.weight_scale_2"), reader.tensor(f"{module}.weight_scale_2"))
        num_weights = sum(1 for name in originals if LINEAR.fullmatch(name))
        assert len(reader.names) == len(originals) + 3 * num_weights
    weights = load(out)
    assert isinstance(weights.mtp[0].h_proj, NvFp4Tensor) and len(weights.input_scales) == num_weights


def load(directory: pathlib.Path, *, dequantize: bool = False):
    """Load a checkpoint."""
    with CheckpointReader(directory) as reader:
        return load_weights(reader, load_config(directory), dequantize=dequantize, dtype=torch.float32)


def test_amax_is_the_format_s_own_rounding_with_w1_and_w3_sharing(exporter, master, tmp_path, seed):
    originals = make_master(seed)
    exporter.export(master, calibration_of(originals), tmp_path / "out")
    expected = {}
    for name, tensor in originals.items():
        if not LINEAR.fullmatch(name):
            expected[name] = tensor if tensor.dtype == torch.int64 else tensor.float()
            continue
        partner = {"w1": "w3", "w3": "w1"}.get(name.split(".")[-2])
        members = [tensor, originals[name.replace(name.split(".")[-2], partner)]] if partner else [tensor]
        amax = torch.stack([member.float().abs().amax() for member in members]).amax()
        expected[name] = nvfp4.dequantize(nvfp4.quantize(tensor, tensor_scale=amax / 2688))
    assert_same(values_of(load(tmp_path / "out", dequantize=True)), expected)


def test_mse_never_rounds_worse_than_amax_and_the_error_is_measured(exporter, master, tmp_path, seed):
    calibration = calibration_of(make_master(seed))
    plain = exporter.export(master, calibration, tmp_path / "amax")
    searched = exporter.export(master, calibration, tmp_path / "mse", "mse")
    assert 0.08 < plain["error"] < 0.11  # Gaussian weights
    assert searched["error"] < 0.9 * plain["error"]
    generator = torch.Generator().manual_seed(seed)
    for weight in (torch.randn(8, 32, generator=generator), torch.zeros(8, 32), torch.eye(32)):
        errors = [
            float((nvfp4.dequantize(quantize([weight])[0]) - weight).square().sum())
            for quantize in (exporter.quantize_amax, exporter.quantize_mse)
        ]
        assert errors[1] <= errors[0]


def test_metadata(exporter, master, tmp_path, seed):
    exporter.export(master, calibration_of(make_master(seed)), tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = content.pop("quantization_config")
    assert content == {**CONFIG, "expert_dtype": "fp4"}
    assert quantization["moe_quant_algo"] == "NVFP4" and quantization["quant_algo"] == "MIXED_PRECISION"
    group = quantization["config_groups"]["group_0"]
    assert group["weights"] == {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    layers = set(quantization["quantized_layers"])
    assert {"layers.0.ffn.experts", "layers.1.attn.indexer.wq_b", "mtp.0.e_proj", "layers.3.attn.wo_a"} <= layers
    assert {"layers.2.ffn.shared_experts", "mtp.0.ffn.experts"} <= layers
    assert (
        len(layers) == 5 * 7 + 2 + 2
    )  # five projections and two expert groups a block; two indexers; two of the draft
    repeated = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert repeated["quantization"]["exclude_modules"] == quantization["ignore"]
    assert repeated["quantization"]["quantized_layers"] == quantization["quantized_layers"]


def test_experts_calibration_never_reached_take_the_layer_s_largest(exporter, master, tmp_path, seed):
    calibration = calibration_of(make_master(seed))
    for name in list(calibration):
        if name.startswith("layers.2.ffn.experts.3."):
            del calibration[name]
    calibration["layers.2.ffn.experts.0.w2"] = 0.0
    calibration["layers.2.ffn.experts.1.w2"] = 77.0
    calibration["layers.2.ffn.experts.1.w3"] = 55.0
    exporter.export(master, calibration, tmp_path / "out")
    scales = load(tmp_path / "out").input_scales
    for expert, projection, amax in ((3, "w2", 77), (0, "w2", 77), (3, "w1", 55), (3, "w3", 55), (1, "w1", 55)):
        assert scales[f"layers.2.ffn.experts.{expert}.{projection}"] == pytest.approx(amax / 2688)


def test_refusals(exporter, master, tmp_path, seed):
    good = calibration_of(make_master(seed))
    for change, message in (
        ({"layers.0.attn.wq_a": 0.0}, "layers.0.attn.wq_a: no amax"),
        ({"layers.0.attn.wq_a": float("nan")}, r"layers.0.attn.wq_a: amax \[nan\]"),
        ({"layers.9.attn.wq_a": 1.0}, "layers.9.attn.wq_a is not a quantised weight"),
    ):
        with pytest.raises(ValueError, match=message):
            exporter.export(master, {**good, **change}, tmp_path / "out")
    without_layer = {name: amax for name, amax in good.items() if not name.startswith("layers.1.ffn.experts")}
    with pytest.raises(ValueError, match=r"layers.1.ffn.experts.0.w1: no amax; .*Calibrate again."):
        exporter.export(master, without_layer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    exporter.export(master, good, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"layers.0.attn.wq_a.weight: not there as BF16"):
        exporter.export(tmp_path / "out", good, tmp_path / "again")
    assert EXPERT.fullmatch("layers.0.ffn.experts.3.w1.weight")
