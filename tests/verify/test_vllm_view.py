# SPDX-License-Identifier: Apache-2.0
"""What vLLM takes a checkpoint for: by its declarations, held against the tensors."""

from __future__ import annotations

import json
import pathlib

import pytest

from megamoe.cli import main
from megamoe.models.deepseek_v4.examine import examine
from megamoe.verify.vllm_view import VllmView, vllm_view

from ..fake_files import Files, fake


def view(directory: pathlib.Path) -> VllmView:
    """Return how vLLM reads a checkpoint."""
    found = vllm_view(examine(directory))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("layout", "quantization", "experts", "differences"),
    [
        ("preview", "deepseek_v4_fp8", "mxfp4, backbone and draft alike (expert_dtype fp4)", 0),
        ("base", "deepseek_v4_fp8", "fp8, backbone and draft alike (expert_dtype fp8)", 0),
        ("dspark", "deepseek_v4_fp8", "mxfp4", 0),
        ("nvidia", "deepseek_v4_fp8", "nvfp4, backbone and draft alike (moe_quant_algo NVFP4)", 1),
        ("nvfp4", "modelopt_mixed", "nvfp4 where quantized_layers lists them", 0),
        ("compressed-tensors", "compressed-tensors", "as config_groups", 1),
        ("resave", "none: config.json has no quantization_config", "unquantized", 1),
        ("bf16", "none", "unquantized", 0),
    ],
)
def test_layouts(tmp_path, layout, quantization, experts, differences):
    found = view(fake.write_fake(tmp_path, "small", layout))
    assert found.quantization.startswith(quantization) and found.experts.startswith(experts)
    assert len(found.differences) == differences, found.differences


def test_draft_experts_of_nvidias_layout_are_taken_for_nvfp4(tmp_path):
    (said,) = view(fake.write_fake(tmp_path, "small", "nvidia")).differences
    assert said.startswith("routed experts of the draft: 12 weights are mxfp4, vLLM takes them for nvfp4 (mtp.0.ffn.")


def test_drafts(tmp_path):
    assert view(fake.write_fake(tmp_path / "a", "small", "preview")).draft.startswith("DeepSeekV4MTPModel")
    assert view(fake.write_fake(tmp_path / "b", "small", "dspark")).draft.startswith("DSparkDraftModel")
    (said,) = view(fake.write_fake(tmp_path / "c", "small", "resave")).differences
    assert "num_nextn_predict_layers is 1, but there is no draft" in said


def test_scales_go_by_expert_dtype(tmp_path):
    files = Files.read(fake.write_fake(tmp_path / "source", "small", "base"))
    files.config["expert_dtype"] = "fp4"
    said = view(files.write(tmp_path / "edited")).differences
    assert any("scales of" in one and "are fp32; vLLM goes by expert_dtype and allocates e8m0" in one for one in said)
    assert any(
        one.startswith("routed experts of the backbone: 60 weights are fp8, vLLM takes them for mxfp4") for one in said
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quant_method": "mxfp4"}, "for which vLLM has no DeepSeek-V4"),
        (
            {"quant_method": "modelopt_fp4", "quant_algo": "NVFP4"},
            "weights are fp8, vLLM takes them for nvfp4 (layers.0.attn.wq_a and on)",
        ),
    ],
)
def test_other_declarations(tmp_path, fields, words):
    files = Files.read(fake.write_fake(tmp_path / "source", "small", "nvidia"))
    files.config["quantization_config"].update(fields, ignore=[])
    assert any(words in one for one in view(files.write(tmp_path / "edited")).differences)


def test_the_command(tmp_path, capsys):
    directory = fake.write_fake(tmp_path, "small", "nvidia")
    assert main(["inspect", str(directory), "--vllm"]) == 0
    out = capsys.readouterr().out
    assert "read by vLLM 0.33" in out and "differs: routed experts of the draft" in out
    assert main(["inspect", str(directory), "--vllm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vllm"]["version"] == "0.33"
    assert main(["inspect", str(directory)]) == 0 and "read by vLLM" not in capsys.readouterr().out
