# SPDX-License-Identifier: Apache-2.0
"""Quantise a DeepSeek-native bf16 checkpoint to NVFP4 in NVIDIA's on-disk layout.

Every large linear is quantised: wq_a, wq_b, wkv, wo_a, wo_b, indexer.wq_b, routed and shared experts, and the draft's
e_proj and h_proj. Each becomes weight (U8, two codes a byte), weight_scale (F8_E4M3, one per 16), weight_scale_2 (F32)
and input_scale (F32, calibrated activation amax / 2688). w1 and w3 of an expert share weight_scale_2 and input_scale.
All other tensors are carried over byte for byte.

    python export_nvfp4.py --master <directory> --calibration <amax.json> --out <directory>

The calibration file maps a weight ("layers.0.attn.wq_a", "layers.0.ffn.experts.3.w1") to the largest magnitude its
input reached. Experts that calibration never reached may be absent (or zero): they take the largest value of the same
projection over the layer's other experts. Any other weight must be there.

--block-scale amax reproduces the rounding of quantisation-aware training; mse tries neighbouring block scales and a few
tensor scales for each weight and keeps the smallest squared error.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch

from megamoe.checkpoint.reader import CheckpointError, CheckpointReader
from megamoe.checkpoint.writer import write_json, write_safetensors
from megamoe.formats import e2m1, nvfp4
from megamoe.formats.nvfp4 import BLOCK, NvFp4Tensor
from megamoe.models.deepseek_v4.config import load_config
from megamoe.models.deepseek_v4.weights import Role, inventory

DIVISOR = nvfp4.TENSOR_SCALE_DIVISOR
# E4M3 has eight steps to an octave: bytes -3..+6 reach from 0.7 to 1.7 times the scale that maps amax to 6, and
# four tensor scales divide one step.
BLOCK_SCALE_STEPS = range(-3, 7)
TENSOR_SCALE_FACTORS = (1.0, 33 / 32, 34 / 32, 35 / 32)
PRODUCER = {"name": "megamoe-tiny-model", "version": "1"}


def quantize_amax(weights: list[torch.Tensor]) -> list[NvFp4Tensor]:
    """Quantise fp32 weights [N, K] with one tensor scale in common, largest magnitude to 6 * 448."""
    amax = max(float(weight.abs().amax()) for weight in weights)
    tensor_scale = torch.tensor(max(amax, nvfp4.AMAX_FLOOR) / DIVISOR)
    return [nvfp4.quantize(weight, tensor_scale=tensor_scale) for weight in weights]


def quantize_mse(weights: list[torch.Tensor]) -> list[NvFp4Tensor]:
    """Quantise fp32 weights [N, K] with one tensor scale in common, choosing scales by squared error."""
    base = quantize_amax(weights)[0].tensor_scale
    candidates = [[_best_block_scales(weight, base * factor) for weight in weights] for factor in TENSOR_SCALE_FACTORS]
    best = min(candidates, key=lambda results: sum(error for _, error in results))
    return [quantized for quantized, _ in best]


def _best_block_scales(weight: torch.Tensor, tensor_scale: torch.Tensor) -> tuple[NvFp4Tensor, float]:
    """Return the quantised weight with the best block scale for each block of 16, and its squared error."""
    start = nvfp4.quantize(weight, tensor_scale=tensor_scale)
    blocks = weight.view(weight.shape[0], -1, BLOCK)  # [N, K/16, 16]
    best_error = torch.full(blocks.shape[:-1], math.inf)
    best_codes = torch.zeros(blocks.shape, dtype=torch.uint8)
    best_scales = start.scales.view(torch.uint8).clone()
    for step in BLOCK_SCALE_STEPS:
        scales = (start.scales.view(torch.uint8).int() + step).clamp(1, 0x7E).to(torch.uint8)
        values = (scales.view(torch.float8_e4m3fn).float() * tensor_scale)[..., None]
        codes = e2m1.encode_e2m1(blocks / values)
        error = (e2m1.decode_e2m1(codes) * values - blocks).square().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_codes = torch.where(better[..., None], codes, best_codes)
    packed = e2m1.pack(best_codes.view(weight.shape))
    quantized = NvFp4Tensor(packed, best_scales.view(torch.float8_e4m3fn), tensor_scale)
    return quantized, float(best_error.double().sum())


def sharing_groups(modules: list[str]) -> list[list[str]]:
    """Group weights that share scales: w1 with w3 of the same expert, every other weight alone."""
    return [
        [module, module.removesuffix(".w1") + ".w3"] if module.endswith(".w1") else [module]
        for module in modules
        if not module.endswith(".w3")
    ]


def input_amax(modules: list[str], calibration: dict[str, float]) -> dict[str, float]:
    """Return the input amax of every weight, filling in experts that calibration never reached.

    Raises:
        ValueError: an amax is missing, negative or not finite, or names no weight.
    """
    problems = [f"{name} is not a quantised weight" for name in sorted(set(calibration) - set(modules))]
    out: dict[str, float] = {}
    for group in sharing_groups(modules):
        given = [float(calibration.get(module, 0.0)) for module in group]
        if not all(math.isfinite(value) and value >= 0 for value in given):
            problems.append(f"{group[0]}: amax {given}")
        if max(given) == 0 and ".experts." in group[0]:
            layer, projection = group[0].split(".experts.")[0], group[0].rsplit(".", 1)[1]
            names = {projection, "w3"} if projection == "w1" else {projection}
            given = [
                float(value)
                for name, value in calibration.items()
                if name.startswith(f"{layer}.experts.") and name.rsplit(".", 1)[1] in names
            ] or [0.0]
        if max(given) == 0:
            problems.append(f"{group[0]}: no amax")
        out.update(dict.fromkeys(group, max(given)))
    if problems:
        raise ValueError(f"calibration: {'; '.join(problems)}. Calibrate again.")
    return out


def quantization_config(modules: list[str]) -> dict:
    """Return config.json's quantization_config: what is NVFP4 and what is not."""
    groups = sorted({module.split("experts.")[0] + "experts" if "experts." in module else module for module in modules})
    nvfp4_tensor = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    return {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "producer": PRODUCER,
        "quantized_layers": {group: {"quant_algo": "NVFP4", "group_size": 16} for group in groups},
        "ignore": ["embed", "head", "*.ffn.gate", "*.attn.compressor.*", "*.indexer.compressor.*", "*.weights_proj"],
        "config_groups": {
            "group_0": {"weights": nvfp4_tensor, "input_activations": nvfp4_tensor, "targets": ["Linear"]}
        },
    }


def export(master: Path, calibration: dict[str, float], out: Path, block_scale: str = "amax") -> dict[str, float]:
    """Write the NVFP4 checkpoint.

    Args:
        master: directory with a bf16 checkpoint in native names.
        calibration: input amax by weight.
        out: directory to write; created when missing.
        block_scale: "amax", "mse", or "mixed": mse for shared experts, amax for everything else.

    Returns:
        "bytes" of model.safetensors, and "error", the root mean square error of the quantised weights relative to
        their root mean square.

    Raises:
        CheckpointError: the master is damaged or not bf16.
        ValueError: the calibration does not fit.
    """
    searched = {"amax": lambda _: False, "mse": lambda _: True, "mixed": lambda name: ".shared_experts." in name}
    by_error = searched[block_scale]
    config = load_config(master)
    with CheckpointReader(master) as reader:
        num_mtp = len({name.split(".")[1] for name in reader.names if name.startswith("mtp.")})
        entries = inventory(config, num_mtp=num_mtp)
        modules = [entry.name for entry in entries if entry.role in (Role.LINEAR, Role.EXPERT)]
        names = [f"{module}.weight" for module in modules]
        wrong = [name for name in names if name not in reader or reader.info(name).dtype != "BF16"]
        if wrong:
            raise CheckpointError.listing(f"export of {master}", [f"{name}: not there as BF16" for name in wrong])
        amax = input_amax(modules, calibration)
        tensors = {name: reader.tensor(name) for name in reader.names}
        squared_error = squared = 0.0
        for group in sharing_groups(modules):
            quantize = quantize_mse if by_error(group[0]) else quantize_amax
            originals = [tensors.pop(f"{module}.weight").float() for module in group]
            for module, original, quantized in zip(group, originals, quantize(originals), strict=True):
                tensors[f"{module}.weight"] = quantized.codes
                tensors[f"{module}.weight_scale"] = quantized.scales
                tensors[f"{module}.weight_scale_2"] = quantized.tensor_scale
                tensors[f"{module}.input_scale"] = torch.tensor(amax[module] / DIVISOR)
                squared_error += float((nvfp4.dequantize(quantized) - original).double().square().sum())
                squared += float(original.double().square().sum())
        out.mkdir(parents=True, exist_ok=True)
        num_bytes = write_safetensors(out / "model.safetensors", tensors, {"format": "pt"})
    quantization = quantization_config(modules)
    content = json.loads((master / "config.json").read_text(encoding="utf-8"))
    write_json(out / "config.json", {**content, "expert_dtype": "fp4", "quantization_config": quantization})
    exclude = quantization.pop("ignore")
    producer = quantization.pop("producer")
    del quantization["quant_method"]
    write_json(
        out / "hf_quant_config.json",
        {"producer": producer, "quantization": {**quantization, "exclude_modules": exclude}},
    )
    if (master / "tokenizer.json").is_file():
        shutil.copyfile(master / "tokenizer.json", out / "tokenizer.json")
    return {"bytes": float(num_bytes), "error": math.sqrt(squared_error / squared)}


def main() -> None:
    """Export from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--master", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--block-scale", choices=("amax", "mse", "mixed"), default="amax")
    args = parser.parse_args()
    calibration = json.loads(args.calibration.read_text(encoding="utf-8"))
    result = export(args.master, calibration, args.out, args.block_scale)
    print(f"wrote {args.out}: {result['bytes']:,.0f} bytes, relative weight error {result['error']:.4f}")


if __name__ == "__main__":
    main()
