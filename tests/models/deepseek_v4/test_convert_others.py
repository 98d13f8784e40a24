# SPDX-License-Identifier: Apache-2.0
"""What megamoe convert writes, read by others' code: transformers, compressed-tensors, safetensors."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from safetensors.torch import load_file

import megamoe
from megamoe.checkpoint import CheckpointReader, write_safetensors
from megamoe.formats import fp8, mxfp4, nvfp4
from megamoe.formats.e2m1 import decode_packed
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.formats.scale_search import ScaleSearch
from megamoe.models.deepseek_v4.config import load_config
from megamoe.models.deepseek_v4.convert import ConvertOptions, convert
from megamoe.models.deepseek_v4.inventory import Role, inventory

from .checkpoints import CONFIG

TOLERANCE = 1e-4
# Sizes are multiples of 128, as in every released model; ratio 128 needs more than 128 tokens.
OFFICIAL: dict[str, Any] = {
    **CONFIG,
    "vocab_size": 64,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "head_dim": 128,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 128,
    "o_lora_rank": 128,
    "n_routed_experts": 8,
    "num_hash_layers": 2,
    "index_n_heads": 16,
    "index_head_dim": 64,
    "num_nextn_predict_layers": 0,
    "compress_ratios": [0, 4, 128, 4],
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A random checkpoint in DeepSeek's layout with values of the size that a trained model has."""
    folder = tmp_path_factory.mktemp("official")
    (folder / "config.json").write_text(json.dumps(OFFICIAL))
    generator = torch.Generator().manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}
    for entry in inventory(load_config(folder)):
        noise = torch.randn(entry.shape, generator=generator)
        if entry.role is Role.EXPERT:
            micro = mxfp4.quantize(noise * entry.shape[-1] ** -0.5)
            tensors[f"{entry.name}.weight"], tensors[f"{entry.name}.scale"] = micro.codes.view(torch.int8), micro.scales
        elif entry.role is Role.LINEAR:
            block = fp8.quantize_blocks(noise * entry.shape[-1] ** -0.5)
            tensors[f"{entry.name}.weight"], tensors[f"{entry.name}.scale"] = block.codes, block.scales
        elif entry.role is Role.TABLE:
            tensors[entry.name] = torch.rand(entry.shape[0], 8, generator=generator).argsort(-1)[:, : entry.shape[1]]
        elif "norm" in entry.name:
            tensors[entry.name] = (1 + 0.1 * noise).bfloat16()
        elif entry.role is Role.FLOAT32:
            is_scale = entry.name.endswith("_scale")
            tensors[entry.name] = 1 + 0.2 * noise if is_scale else noise * (0.03 if entry.name.endswith("_fn") else 0.5)
        else:
            tensors[entry.name] = (noise * (1.0 if "embed" in entry.name else entry.shape[-1] ** -0.5)).bfloat16()
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def converted(official: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folder with `nvfp4` (NVIDIA's layout), `all` (our extension) and `back` (DeepSeek's, from `nvfp4`)."""
    folder = tmp_path_factory.mktemp("converted")
    convert(official, folder / "nvfp4", ConvertOptions())
    convert(official, folder / "all", ConvertOptions(attention="nvfp4", scale_search=ScaleSearch.FOUR_OVER_SIX))
    convert(folder / "nvfp4", folder / "back", ConvertOptions(to="mxfp4"))
    return folder


def test_transformers_gives_the_same_logits(converted):
    from transformers import DeepseekV4ForCausalLM, FineGrainedFP8Config

    theirs, info = DeepseekV4ForCausalLM.from_pretrained(
        converted / "back",
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        quantization_config=FineGrainedFP8Config(dequantize=True, scale_fmt="ue8m0", expert_dtype="fp4"),
    )
    assert not {key: value for key, value in info.items() if value}
    theirs = theirs.float().eval()
    ids = torch.randint(0, 64, (150,), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        want = theirs(ids[None], use_cache=False).logits[0]
        assert float(want.std()) > 0.5
        for name in ("back", "nvfp4"):  # the NVFP4 experts are the same numbers
            ours = megamoe.load(converted / name, recipe="exact", dtype=torch.float32)
            assert float((ours.logits(ids) - want).abs().max()) <= TOLERANCE, name
        rounded = megamoe.load(converted / "all", recipe="exact", dtype=torch.float32)
        assert float((rounded.logits(ids) - want).abs().max()) > 100 * TOLERANCE  # the comparison can fail


def theirs_of(folder: pathlib.Path, targets: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Read NVIDIA-layout weights with safetensors and compressed-tensors' converter for ModelOpt's files."""
    from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter

    tensors = load_file(folder / "model.safetensors")
    quantized = {name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")}
    part = {name: tensor for name, tensor in tensors.items() if name.rsplit(".", 1)[0] in quantized}
    reader = ModelOptNvfp4Converter(targets=targets)
    made = reader.validate(part)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in made.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    assert set(modules) == quantized and all(
        set(leaves) == {"weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"}
        for leaves in modules.values()
    )
    return modules


def decompressed(leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    """Let compressed-tensors dequantize a weight."""
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4

    scheme = QuantizationScheme(**NVFP4, targets=["Linear"])
    state = {key: leaves[key] for key in ("weight_packed", "weight_scale", "weight_global_scale")}
    return NVFP4PackedCompressor.decompress(state, scheme)["weight"]


def ours_of(reader: CheckpointReader, module: str) -> NvFp4Tensor:
    return NvFp4Tensor(*(reader.tensor(f"{module}.{leaf}") for leaf in ("weight", "weight_scale", "weight_scale_2")))


def test_compressed_tensors_reads_exact_experts_bit_for_bit(official, converted):
    modules = theirs_of(converted / "nvfp4", [r"re:.*\.experts\..*"])
    assert len(modules) == 4 * 8 * 3
    with CheckpointReader(converted / "nvfp4") as reader, CheckpointReader(official) as source:
        for module, leaves in modules.items():
            theirs = decompressed(leaves)
            ours = nvfp4.dequantize(ours_of(reader, module), torch.bfloat16)
            assert theirs.dtype == torch.bfloat16 and torch.equal(theirs.view(torch.int16), ours.view(torch.int16))
            codes, scales = source.tensor(f"{module}.weight"), source.tensor(f"{module}.scale")
            original = mxfp4.dequantize(mxfp4.MxFp4Tensor(codes.view(torch.uint8), scales))
            assert torch.equal(theirs.float(), original)
            assert float(leaves["input_global_scale"]) == 8.0  # 1 / 0.125


def test_compressed_tensors_reads_rounded_weights_bit_for_bit(converted):
    """Codes and scales are the same bits; the product is theirs, made with a rounded reciprocal of the tensor scale."""
    from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8

    modules = theirs_of(converted / "all", [r"re:.*"])
    rounded = [module for module in modules if ".experts." not in module]
    assert len(rounded) == 4 * 5 + 2 + 4 * 3
    with CheckpointReader(converted / "all") as reader:
        for module in rounded:
            leaves, ours = modules[module], ours_of(reader, module)
            num_rows, half = leaves["weight_packed"].shape
            codes = unpack_fp4_from_uint8(leaves["weight_packed"], num_rows, 2 * half, torch.float32)
            assert torch.equal(codes.view(torch.int32), decode_packed(ours.codes).view(torch.int32))
            assert torch.equal(leaves["weight_scale"].view(torch.uint8), ours.scales.view(torch.uint8))
            assert torch.equal(1 / leaves["weight_global_scale"], 1 / (1 / ours.tensor_scale))
            values = (
                codes.view(num_rows, -1, 16)
                * (leaves["weight_scale"].float() / leaves["weight_global_scale"])[..., None]
            )
            assert torch.allclose(values.view(num_rows, -1), nvfp4.dequantize(ours), rtol=3e-7, atol=0)
            assert torch.allclose(decompressed(leaves).float(), nvfp4.dequantize(ours), rtol=2**-6, atol=0)


def test_compressed_tensors_packs_the_same_codes(converted):
    """Its own compression of our values under our scales gives our codes."""
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4

    with CheckpointReader(converted / "nvfp4") as reader:
        ours = ours_of(reader, "layers.2.ffn.experts.1.w2")
    state = {
        "weight": nvfp4.dequantize(ours, torch.bfloat16),
        "weight_scale": ours.scales.float(),
        "weight_global_scale": 1 / ours.tensor_scale,
    }
    made = NVFP4PackedCompressor.compress(state, QuantizationScheme(**NVFP4, targets=["Linear"]))
    assert torch.equal(decode_packed(made["weight_packed"]), decode_packed(ours.codes))  # it may turn -0 into 0
    assert torch.equal(made["weight_scale"].view(torch.uint8), ours.scales.view(torch.uint8))
