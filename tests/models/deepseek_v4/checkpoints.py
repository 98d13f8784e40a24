# SPDX-License-Identifier: Apache-2.0
"""Small DeepSeek-V4 checkpoints in every layout, with the values each weight stands for.

Names and shapes are written out here a second time, from the published inventory, and not taken from the loader.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import torch

from megamoe.checkpoint import write_safetensors
from megamoe.formats import fp8, mxfp4, nvfp4
from megamoe.formats.fp8 import Fp8BlockTensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.models.deepseek_v4.stacked import LinearWeight
from megamoe.models.deepseek_v4.weights import (
    BlockWeights,
    CompressorWeights,
    HyperConnectionWeights,
    ModelWeights,
)

# 160 is more than one FP8 block and not a multiple of it.
HIDDEN, HEADS, HEAD_DIM, LATENT, GROUPS, LOW_RANK = 160, 4, 48, 64, 2, 32
VOCAB, NUM_EXPERTS, ACTIVE, INNER, STREAMS = 48, 4, 2, 32, 4
INDEX_HEADS, INDEX_DIM, RATIOS = 16, 32, (0, 4, 128, 4)

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": len(RATIOS),
    "compress_ratios": [*RATIOS, 0],
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    "qk_rope_head_dim": 8,
    "q_lora_rank": LATENT,
    "o_groups": GROUPS,
    "o_lora_rank": LOW_RANK,
    "sliding_window": 16,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 64,
    },
    "max_position_embeddings": 1024,
    "index_n_heads": INDEX_HEADS,
    "index_head_dim": INDEX_DIM,
    "index_topk": 3,
    "moe_intermediate_size": INNER,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": ACTIVE,
    "num_hash_layers": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hc_mult": STREAMS,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-06,
    "rms_norm_eps": 1e-06,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}

_RELEASED: dict[str, Any] = {
    **{key: CONFIG[key] for key in ("architectures", "model_type", "scoring_func", "topk_method", "norm_topk_prob")},
    **{key: CONFIG[key] for key in ("hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps", "swiglu_limit")},
    "vocab_size": 129280,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 65536,
    },
    "max_position_embeddings": 1048576,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
FLASH: dict[str, Any] = {
    **_RELEASED,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "index_topk": 512,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "routed_scaling_factor": 1.5,
}
PRO: dict[str, Any] = {
    **_RELEASED,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
    "index_topk": 1024,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "routed_scaling_factor": 2.5,
}

RANK = 8
DSPARK_KEYS: dict[str, Any] = {
    "dspark_block_size": 5,
    "dspark_noise_token_id": VOCAB - 1,
    "dspark_target_layer_ids": [1, 2, 3],
    "dspark_markov_rank": RANK,
}
DSPARK: dict[str, Any] = {**CONFIG, **DSPARK_KEYS}

LINEAR = re.compile(
    r"(layers|mtp)\.\d+\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.(experts\.\d+|shared_experts)\.w[123]"
    r"|e_proj|h_proj|main_proj)\.weight"
)
EXPERT = re.compile(r"(layers|mtp)\.\d+\.ffn\.experts\.\d+\.w[123]\.weight")
Tensors = dict[str, torch.Tensor]


def make_master(seed: int, *, num_mtp: int = 1) -> Tensors:
    """Random bf16 checkpoint (parameters that are fp32 in DeepSeek's checkpoints are fp32) in native names."""
    generator = torch.Generator().manual_seed(seed)
    out: Tensors = {}

    def put(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
        out[name] = (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    def put_streams(prefix: str, rows: int, scales: int) -> None:
        for leaf, shape in (("fn", (rows, STREAMS * HIDDEN)), ("base", (rows,)), ("scale", (scales,))):
            put(f"{prefix}_{leaf}", *shape, dtype=torch.float32)

    def put_compressor(prefix: str, ratio: int, channels: int) -> None:
        width = channels * (2 if ratio == 4 else 1)
        put(f"{prefix}.wkv.weight", width, HIDDEN)
        put(f"{prefix}.wgate.weight", width, HIDDEN)
        put(f"{prefix}.ape", ratio, width, dtype=torch.float32)
        put(f"{prefix}.norm.weight", channels)

    def put_block(prefix: str, ratio: int, hash_routed: bool) -> None:
        put(f"{prefix}.attn_norm.weight", HIDDEN)
        put(f"{prefix}.ffn_norm.weight", HIDDEN)
        put_streams(f"{prefix}.hc_attn", 24, 3)
        put_streams(f"{prefix}.hc_ffn", 24, 3)
        attn, ffn = f"{prefix}.attn", f"{prefix}.ffn"
        put(f"{attn}.wq_a.weight", LATENT, HIDDEN)
        put(f"{attn}.q_norm.weight", LATENT)
        put(f"{attn}.wq_b.weight", HEADS * HEAD_DIM, LATENT)
        put(f"{attn}.wkv.weight", HEAD_DIM, HIDDEN)
        put(f"{attn}.kv_norm.weight", HEAD_DIM)
        put(f"{attn}.wo_a.weight", GROUPS * LOW_RANK, HEADS * HEAD_DIM // GROUPS)
        put(f"{attn}.wo_b.weight", HIDDEN, GROUPS * LOW_RANK)
        put(f"{attn}.attn_sink", HEADS, dtype=torch.float32)
        if ratio:
            put_compressor(f"{attn}.compressor", ratio, HEAD_DIM)
        if ratio == 4:
            put(f"{attn}.indexer.wq_b.weight", INDEX_HEADS * INDEX_DIM, LATENT)
            put(f"{attn}.indexer.weights_proj.weight", INDEX_HEADS, HIDDEN)
            put_compressor(f"{attn}.indexer.compressor", ratio, INDEX_DIM)
        put(f"{ffn}.gate.weight", NUM_EXPERTS, HIDDEN)
        if hash_routed:
            out[f"{ffn}.gate.tid2eid"] = torch.randint(0, NUM_EXPERTS, (VOCAB, ACTIVE), generator=generator)
        else:
            put(f"{ffn}.gate.bias", NUM_EXPERTS, dtype=torch.float32)
        for owner in ("shared_experts", *(f"experts.{expert}" for expert in range(NUM_EXPERTS))):
            put(f"{ffn}.{owner}.w1.weight", INNER, HIDDEN)
            put(f"{ffn}.{owner}.w2.weight", HIDDEN, INNER)
            put(f"{ffn}.{owner}.w3.weight", INNER, HIDDEN)

    put("embed.weight", VOCAB, HIDDEN)
    put("head.weight", VOCAB, HIDDEN)
    put("norm.weight", HIDDEN)
    put_streams("hc_head", STREAMS, 1)
    for layer, ratio in enumerate(RATIOS):
        put_block(f"layers.{layer}", ratio, layer == 0)
    for stage in range(num_mtp):
        put_block(f"mtp.{stage}", 0, False)
        for name in ("enorm", "hnorm", "norm"):
            put(f"mtp.{stage}.{name}.weight", HIDDEN)
        put(f"mtp.{stage}.e_proj.weight", HIDDEN, HIDDEN)
        put(f"mtp.{stage}.h_proj.weight", HIDDEN, HIDDEN)
        put_streams(f"mtp.{stage}.hc_head", STREAMS, 1)
    return out


def make_dspark_master(seed: int, *, num_stages: int = 3) -> Tensors:
    """The same with a DSpark draft, for the config DSPARK."""
    generator = torch.Generator().manual_seed(seed)
    out = make_master(seed, num_mtp=num_stages)
    last = num_stages - 1
    for name in [name for name in out if name.startswith("mtp.")]:
        leaf = name.split(".", 2)[2].removesuffix(".weight")
        belongs_to_mtp = leaf in ("enorm", "hnorm", "e_proj", "h_proj")
        if belongs_to_mtp or (re.fullmatch(r"norm|hc_head_\w+", leaf) and not name.startswith(f"mtp.{last}.")):
            del out[name]
    shapes = {
        "mtp.0.main_proj": (HIDDEN, 3 * HIDDEN),
        "mtp.0.main_norm": (HIDDEN,),
        f"mtp.{last}.markov_head.markov_w1": (VOCAB, RANK),
        f"mtp.{last}.markov_head.markov_w2": (VOCAB, RANK),
        f"mtp.{last}.confidence_head.proj": (1, HIDDEN + RANK),
    }
    for name, shape in shapes.items():
        scale = 1.0 if "markov" in name else shape[-1] ** -0.5
        out[f"{name}.weight"] = (torch.randn(shape, generator=generator) * scale).bfloat16()
    return out


def encode(weight: torch.Tensor, form: str) -> tuple[Tensors, torch.Tensor]:
    """Store one weight in a form; return its tensors by leaf, and the fp32 values they stand for."""
    if form in ("bf16", "f32"):
        stored = weight.to(torch.bfloat16 if form == "bf16" else torch.float32)
        return {"weight": stored}, stored.float()
    if form in ("fp8", "fp8_f32"):
        block = fp8.quantize_blocks(weight, torch.float8_e8m0fnu if form == "fp8" else torch.float32)
        return {"weight": block.codes, "scale": block.scales}, fp8.dequantize(block)
    if form in ("mxfp4", "mxfp4_u8"):
        micro = mxfp4.quantize(weight)
        if form == "mxfp4":
            return {"weight": micro.codes.view(torch.int8), "scale": micro.scales}, mxfp4.dequantize(micro)
        return {"weight": micro.codes, "scale": micro.scales.view(torch.uint8)}, mxfp4.dequantize(micro)
    if form == "fp8_ct":  # scales that bf16 holds
        block = fp8.quantize_blocks(weight, torch.float8_e8m0fnu)
        return {"weight": block.codes, "weight_scale": block.scales.float().bfloat16()}, fp8.dequantize(block)
    if form == "mxfp4_ct":
        micro = mxfp4.quantize(weight)
        return {"weight_packed": micro.codes, "weight_scale": micro.scales.view(torch.uint8)}, mxfp4.dequantize(micro)
    quantized = nvfp4.quantize(weight)
    if form == "nvfp4_ct":
        reciprocal = 1 / quantized.tensor_scale
        leaves = {
            "weight_packed": quantized.codes,
            "weight_scale": quantized.scales,
            "weight_global_scale": reciprocal.reshape(1),
            "input_global_scale": torch.tensor([1 / 0.001]),
        }
        return leaves, nvfp4.dequantize(NvFp4Tensor(quantized.codes, quantized.scales, 1 / reciprocal))
    assert form == "nvfp4"
    leaves = {
        "weight": quantized.codes,
        "weight_scale": quantized.scales,
        "weight_scale_2": quantized.tensor_scale,
        "input_scale": torch.tensor(0.001),
    }
    return leaves, nvfp4.dequantize(quantized)


def encode_all(master: Tensors, form_of: Callable[[str], str]) -> tuple[Tensors, Tensors]:
    """Store every linear in the form `form_of` says; return stored tensors and values, both by native name."""
    stored, values = {}, {}
    for name, tensor in master.items():
        if not LINEAR.fullmatch(name):
            stored[name] = tensor
            values[name] = tensor if tensor.dtype == torch.int64 else tensor.float()
            continue
        leaves, values[name] = encode(tensor, form_of(name))
        module = name.removesuffix(".weight")
        stored.update({f"{module}.{leaf}": value for leaf, value in leaves.items()})
    return stored, values


def official(name: str) -> str:
    """FP8 linears, MXFP4 experts: the released layout."""
    return "mxfp4" if EXPERT.fullmatch(name) else "fp8"


def base(name: str) -> str:
    """FP8 everywhere with fp32 scales: the -Base releases."""
    return "fp8_f32"


def nvidia(name: str) -> str:
    """NVFP4 backbone experts, MXFP4 draft experts, FP8 elsewhere: NVIDIA's release."""
    if EXPERT.fullmatch(name):
        return "mxfp4" if name.startswith("mtp.") else "nvfp4"
    return "fp8"


def all_nvfp4(name: str) -> str:
    """Every linear in NVFP4: the bundled model."""
    return "nvfp4"


def compressed(name: str) -> str:
    """NVFP4 experts beside FP8 blocks, spelled by compressed-tensors; draft experts in MXFP4."""
    if EXPERT.fullmatch(name):
        return "mxfp4_ct" if name.startswith("mtp.") else "nvfp4_ct"
    return "fp8_ct"


def compressed_nvfp4(name: str) -> str:
    """Every linear in NVFP4, spelled by compressed-tensors."""
    return "nvfp4_ct"


def mixed(name: str) -> str:
    """Another form for every linear; experts of a layer alternate between the two FP4 formats."""
    if EXPERT.fullmatch(name):
        return ("nvfp4", "mxfp4", "mxfp4_u8", "nvfp4_ct", "mxfp4_ct")[sum(name.encode()) % 5]
    forms = ("bf16", "f32", "fp8", "fp8_f32", "mxfp4", "mxfp4_u8", "nvfp4", "fp8_ct", "mxfp4_ct", "nvfp4_ct")
    return forms[sum(name.encode()) % len(forms)]


LAYOUTS: dict[str, Callable[[str], str]] = {
    "bf16": lambda name: "bf16",
    "f32": lambda name: "f32",
    "official": official,
    "base": base,
    "nvidia": nvidia,
    "all_nvfp4": all_nvfp4,
    "compressed": compressed,
    "compressed_nvfp4": compressed_nvfp4,
    "mixed": mixed,
}


def save(directory: pathlib.Path, tensors: Tensors, config: dict[str, Any] | None = None) -> pathlib.Path:
    """Write model.safetensors and config.json; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(CONFIG if config is None else config), encoding="utf-8")
    return directory


def values_of(weights: ModelWeights) -> Tensors:
    """Return every loaded tensor by native name, as fp32 values (tables as they are)."""
    out: Tensors = {
        "embed.weight": weights.embed.float(),
        "head.weight": weights.head.float(),
        "norm.weight": weights.norm.float(),
        **_streams("hc_head", weights.hc_head),
    }
    for layer, block in enumerate(weights.blocks):
        out.update(_block(f"layers.{layer}", block))
    for stage, mtp in enumerate(weights.mtp):
        prefix = f"mtp.{stage}"
        out.update(_block(prefix, mtp.block))
        for name in ("enorm", "hnorm", "norm"):
            out[f"{prefix}.{name}.weight"] = getattr(mtp, name).float()
        out[f"{prefix}.e_proj.weight"] = plain_values(mtp.e_proj)
        out[f"{prefix}.h_proj.weight"] = plain_values(mtp.h_proj)
        out.update(_streams(f"{prefix}.hc_head", mtp.hc_head))
    if (dspark := weights.dspark) is not None:
        last = f"mtp.{len(dspark.stages) - 1}"
        for stage, block in enumerate(dspark.stages):
            out.update(_block(f"mtp.{stage}", block))
        out["mtp.0.main_proj.weight"] = plain_values(dspark.main_proj)
        out["mtp.0.main_norm.weight"] = dspark.main_norm.float()
        out[f"{last}.norm.weight"] = dspark.norm.float()
        out.update(_streams(f"{last}.hc_head", dspark.hc_head))
        out[f"{last}.markov_head.markov_w1.weight"] = dspark.markov_w1.float()
        out[f"{last}.markov_head.markov_w2.weight"] = dspark.markov_w2.float()
        out[f"{last}.confidence_head.proj.weight"] = dspark.confidence.float()
    return out


def plain_values(weight: LinearWeight) -> torch.Tensor:
    """Return the fp32 values of a weight in any container."""
    if isinstance(weight, NvFp4Tensor):
        return nvfp4.dequantize(weight)
    if isinstance(weight, Fp8BlockTensor):
        return fp8.dequantize(weight)
    return weight.float()


def _streams(prefix: str, weights: HyperConnectionWeights) -> Tensors:
    assert {weights.fn.dtype, weights.base.dtype, weights.scale.dtype} == {torch.float32}
    return {f"{prefix}_fn": weights.fn, f"{prefix}_base": weights.base, f"{prefix}_scale": weights.scale}


def _compressor(prefix: str, weights: CompressorWeights) -> Tensors:
    assert weights.ape.dtype == torch.float32
    return {
        f"{prefix}.wkv.weight": weights.wkv.float(),
        f"{prefix}.wgate.weight": weights.wgate.float(),
        f"{prefix}.ape": weights.ape,
        f"{prefix}.norm.weight": weights.norm.float(),
    }


def _block(prefix: str, block: BlockWeights) -> Tensors:
    attention, moe = block.attention, block.moe
    attn, ffn = f"{prefix}.attn", f"{prefix}.ffn"
    assert attention.sink.dtype == torch.float32
    out: Tensors = {
        f"{prefix}.attn_norm.weight": block.attn_norm.float(),
        f"{prefix}.ffn_norm.weight": block.ffn_norm.float(),
        **_streams(f"{prefix}.hc_attn", block.hc_attn),
        **_streams(f"{prefix}.hc_ffn", block.hc_ffn),
        f"{attn}.q_norm.weight": attention.q_norm.float(),
        f"{attn}.kv_norm.weight": attention.kv_norm.float(),
        f"{attn}.attn_sink": attention.sink,
        f"{attn}.wo_a.weight": plain_values(attention.wo_a).flatten(0, 1),
        f"{ffn}.gate.weight": moe.gate.float(),
    }
    for name in ("wq_a", "wq_b", "wkv", "wo_b"):
        out[f"{attn}.{name}.weight"] = plain_values(getattr(attention, name))
    if attention.compressor is not None:
        out.update(_compressor(f"{attn}.compressor", attention.compressor))
    if attention.indexer is not None:
        out[f"{attn}.indexer.wq_b.weight"] = plain_values(attention.indexer.wq_b)
        out[f"{attn}.indexer.weights_proj.weight"] = attention.indexer.weights_proj.float()
        out.update(_compressor(f"{attn}.indexer.compressor", attention.indexer.compressor))
    if moe.bias is not None:
        out[f"{ffn}.gate.bias"] = moe.bias
    if moe.expert_table is not None:
        out[f"{ffn}.gate.tid2eid"] = moe.expert_table
    for name in ("w1", "w3", "w2"):
        out[f"{ffn}.shared_experts.{name}.weight"] = plain_values(getattr(moe, f"shared_{name}"))
        for expert, values in enumerate(plain_values(getattr(moe, name))):
            out[f"{ffn}.experts.{expert}.{name}.weight"] = values
    return out


def assert_same(got: Tensors, expected: Tensors) -> None:
    """Compare two sets of tensors exactly; the message names the first that differs."""
    assert sorted(got) == sorted(expected)
    for name, want in expected.items():
        assert got[name].dtype == want.dtype, f"{name}: {got[name].dtype}, expected {want.dtype}"
        assert got[name].shape == want.shape, f"{name}: {list(got[name].shape)}, expected {list(want.shape)}"
        if not torch.equal(got[name], want):
            where = [int(index) for index in (got[name] != want).nonzero()[0]]
            at = tuple(where)
            raise AssertionError(f"{name}{where}: {got[name][at].item()}, expected {want[at].item()}")
