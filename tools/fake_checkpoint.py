# SPDX-License-Identifier: Apache-2.0
"""Write DeepSeek-V4 checkpoints with true headers and no weights, in every layout, to try tools on without a download.

    python tools/fake_checkpoint.py --model pro --layout dspark --out /tmp/pro-0813

Full-size models (flash, pro) become sparse files: names, dtypes, shapes, byte ranges, shards, index and config.json
are those of the release, scalar scales hold plausible values, and everything else is a hole that reads as zeros (an
all-zero block under a scale of zero). A few megabytes on disk stand for up to 900 GB. Their headers' metadata says
"megamoe_fake", so that zeros are not taken for damage.

The model "small" has the same structure with every byte filled in: random codes, scales as a quantizer would choose
them. It loads and runs, and all its numbers are noise.

    preview             FP8 linears, MXFP4 experts, one classic MTP stage
    base                FP8 everywhere, fp32 scales, one classic MTP stage
    dspark              as preview, with three DSpark stages (the 0731 and 0813 releases)
    nvidia              as preview, backbone experts in NVFP4 (ModelOpt's newer metadata)
    nvidia-old          the same with the metadata of earlier revisions
    nvidia-dspark       as dspark, backbone experts in NVFP4
    compressed-tensors  NVFP4 experts and FP8 blocks spelled by compressed-tensors, transformers' module names, no draft
    resave              bf16 as `save_pretrained` writes it, no draft
    resave-modules      bf16 under transformers' module names, experts fused, no draft
    nvfp4               every linear in NVFP4, NVIDIA's spelling, one classic MTP stage
    bf16                plain weights under DeepSeek's names, one classic MTP stage
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import random
import re
import struct
from collections.abc import Iterable, Iterator
from typing import Any

from megamoe.checkpoint.headers import INDEX_NAME, ITEM_BYTES
from megamoe.models.deepseek_v4.config import ModelConfig, parse_config
from megamoe.models.deepseek_v4.inventory import DSparkDraft, Entry, Role, inventory
from megamoe.models.deepseek_v4.samples import FAKE

LAYOUTS = (
    "preview",
    "base",
    "dspark",
    "nvidia",
    "nvidia-old",
    "nvidia-dspark",
    "compressed-tensors",
    "resave",
    "resave-modules",
    "nvfp4",
    "bf16",
)
MODELS = ("small", "flash", "pro")
NUM_SHARDS = {"small": (3, 3), "flash": (46, 48), "pro": (64, 66)}  # without and with DSpark

_COMMON: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-06,
    "rms_norm_eps": 1e-06,
    "num_nextn_predict_layers": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
_RELEASED: dict[str, Any] = {
    **_COMMON,
    "vocab_size": 129280,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "o_lora_rank": 1024,
    "sliding_window": 128,
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
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "flash": {
        **_RELEASED,
        "hidden_size": 4096,
        "num_hidden_layers": 43,
        "num_attention_heads": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "compress_ratios": [0, 0, *[4, 128] * 20, 4],
        "index_topk": 512,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "routed_scaling_factor": 1.5,
    },
    "pro": {
        **_RELEASED,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "compress_ratios": [128, 128, *[4, 128] * 29, 4],
        "index_topk": 1024,
        "moe_intermediate_size": 3072,
        "n_routed_experts": 384,
        "routed_scaling_factor": 2.5,
    },
    "small": {
        **_COMMON,
        "vocab_size": 160,
        "hidden_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "head_dim": 128,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 64,
        "sliding_window": 16,
        "compress_ratios": [0, 0, 4, 128, 4],
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 64,
        },
        "max_position_embeddings": 1024,
        "index_n_heads": 8,
        "index_head_dim": 128,
        "index_topk": 8,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_hash_layers": 2,
        "routed_scaling_factor": 1.5,
    },
}
_DSPARK: dict[str, dict[str, Any]] = {
    "flash": {"dspark_target_layer_ids": [40, 41, 42], "dspark_markov_rank": 256, "dspark_noise_token_id": 128799},
    "pro": {"dspark_target_layer_ids": [58, 59, 60], "dspark_markov_rank": 512, "dspark_noise_token_id": 128799},
    "small": {"dspark_target_layer_ids": [2, 3, 4], "dspark_markov_rank": 16, "dspark_noise_token_id": 150},
}
_NUM_DSPARK_STAGES = 3
_FP8_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
_PRODUCER = {"name": "fake_checkpoint", "version": "1"}


@dataclasses.dataclass(frozen=True)
class FakeTensor:
    """One tensor to write.

    Attributes:
        name: name in the file.
        dtype: safetensors dtype.
        shape: shape in the header.
        content: what it holds, a key of `_pattern`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: str

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def config_of(model: str, layout: str) -> dict[str, Any]:
    """Return config.json of a model in a layout."""
    raw = dict(CONFIGS[model])
    num_layers = raw["num_hidden_layers"]
    has_dspark = layout.endswith("dspark")
    ratios = [*raw.pop("compress_ratios"), *[0] * (_NUM_DSPARK_STAGES if has_dspark else 1)]
    if has_dspark:
        raw |= {"dspark_block_size": 5, **_DSPARK[model]}
    if layout.startswith("resave"):
        return _resaved(raw, ratios[:num_layers])
    raw["compress_ratios"] = ratios
    if layout == "bf16":
        return raw
    raw["expert_dtype"] = "fp8" if layout == "base" else "fp4"
    experts = [f"layers.{layer}.ffn.experts" for layer in range(num_layers)]
    if layout in ("nvidia", "nvidia-dspark"):
        raw["quantization_config"] = {**_FP8_CONFIG, **_modelopt(experts)}
    elif layout == "nvidia-old":
        modules = [f"{one}.{expert}.w{part}" for one in experts for expert in range(raw["n_routed_experts"])
                   for part in (1, 2, 3)]  # fmt: skip
        quantization = _modelopt(modules)
        del quantization["group_size"]
        raw["quantization_config"] = {**_FP8_CONFIG, **quantization, "quant_algo": None, "awq_block_size": 16}
    elif layout == "nvfp4":
        linears = [entry.name for entry in _entries(parse_config(raw), "nvfp4") if entry.role is Role.LINEAR]
        experts += [f"mtp.{stage}.ffn.experts" for stage in range(1)]
        quantization = _modelopt([*linears, *experts])
        quantization["ignore"] = ["embed", "head", "*.ffn.gate", "*.attn.compressor.*", "*.indexer.compressor.*"]
        raw["quantization_config"] = {"quant_method": "modelopt", **quantization}
    elif layout == "compressed-tensors":
        raw["quantization_config"] = _compressed_tensors_config()
    else:
        raw["quantization_config"] = dict(_FP8_CONFIG)
    return raw


def _modelopt(modules: Iterable[str]) -> dict[str, Any]:
    four_bits = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    return {
        "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "producer": _PRODUCER,
        "quantized_layers": {module: {"quant_algo": "NVFP4", "group_size": 16} for module in modules},
        "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
        "config_groups": {"group_0": {"weights": four_bits, "input_activations": four_bits, "targets": ["Linear"]}},
    }


def _compressed_tensors_config() -> dict[str, Any]:
    four_bits = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    eight_bits = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "format": "nvfp4-pack-quantized",
                "targets": ["re:.*mlp\\.experts.*"],
                "weights": four_bits,
                "input_activations": {**four_bits, "dynamic": "local"},
            },
            "group_1": {"format": "float-quantized", "targets": ["re:.*self_attn.*"], "weights": eight_bits},
        },
        "ignore": ["lm_head"],
    }


def _resaved(raw: dict[str, Any], ratios: list[int]) -> dict[str, Any]:
    """Return a config as transformers writes it back."""
    names = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    head_dim, rope_dim, num_hash = raw["head_dim"], raw.pop("qk_rope_head_dim"), raw.pop("num_hash_layers")
    yarn = dict(raw.pop("rope_scaling"))
    yarn["rope_type"] = yarn.pop("type")
    main_theta, compress_theta = raw.pop("rope_theta"), raw.pop("compress_rope_theta")
    raw |= {
        "layer_types": [names[ratio] for ratio in ratios],
        "compress_rates": {names[4]: 4, names[128]: 128},
        "mlp_layer_types": ["hash_moe" if layer < num_hash else "moe" for layer in range(len(ratios))],
        "partial_rotary_factor": rope_dim / head_dim,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": main_theta},
            "compress": {**yarn, "rope_theta": compress_theta, "attention_factor": 1.0},
        },
        "transformers_version": "5.24.0",
    }
    return raw


def _entries(config: ModelConfig, layout: str) -> tuple[Entry, ...]:
    if layout.endswith("dspark"):
        assert config.dspark is not None
        targets, rank = len(config.dspark.target_layer_ids), config.dspark.markov_rank
        return inventory(config, dspark=DSparkDraft(_NUM_DSPARK_STAGES, targets, rank))
    has_draft = not layout.startswith(("resave", "compressed"))
    return inventory(config, num_mtp=1 if has_draft else 0)


def tensors_of(config: ModelConfig, layout: str) -> Iterator[FakeTensor]:
    """Yield every tensor of a checkpoint in a layout."""
    plain = layout in ("resave", "resave-modules", "bf16")
    for entry in _entries(config, layout):
        if entry.role is Role.TABLE:
            yield FakeTensor(_spelled(entry.name, layout), "I64", entry.shape, "table")
        elif entry.role is Role.FLOAT32:
            yield FakeTensor(_spelled(entry.name, layout), "F32", entry.shape, "F32")
        elif entry.role is Role.PLAIN:
            yield FakeTensor(_spelled(entry.name, layout), "BF16", entry.shape, "BF16")
        elif plain and layout == "resave-modules" and entry.role is Role.EXPERT:
            yield from _fused(config, entry)
        else:
            for leaf, dtype, shape, content in _leaves(entry, layout):
                yield FakeTensor(_spelled(f"{entry.name}.{leaf}", layout), dtype, shape, content)


Leaf = tuple[str, str, tuple[int, ...], str]


def _leaves(entry: Entry, layout: str) -> list[Leaf]:
    """Return the tensors one weight is stored as."""
    rows, columns = entry.shape
    is_expert, is_draft = entry.role is Role.EXPERT, entry.name.startswith("mtp.")
    if layout in ("resave", "resave-modules", "bf16"):
        return [("weight", "BF16", entry.shape, "BF16")]
    blocks = (-(-rows // 128), -(-columns // 128))
    if layout == "compressed-tensors":
        if not is_expert:
            return [("weight", "F8_E4M3", entry.shape, "fp8"), ("weight_scale", "F32", blocks, "block_scale")]
        return [
            ("weight_packed", "U8", (rows, columns // 2), "fp4"),
            ("weight_scale", "F8_E4M3", (rows, columns // 16), "e4m3_scale"),
            ("weight_global_scale", "F32", (1,), "global_scale"),
            ("input_global_scale", "F32", (1,), "input_global_scale"),
        ]
    if layout == "nvfp4" or (layout.startswith("nvidia") and is_expert and not is_draft):
        return [
            ("weight", "U8", (rows, columns // 2), "fp4"),
            ("weight_scale", "F8_E4M3", (rows, columns // 16), "e4m3_scale"),
            ("weight_scale_2", "F32", (), "tensor_scale"),
            ("input_scale", "F32", (), "input_scale"),
        ]
    if is_expert and layout != "base":
        return [
            ("weight", "I8", (rows, columns // 2), "fp4"),
            ("scale", "F8_E8M0", (rows, columns // 32), "e8m0_scale"),
        ]
    dtype, content = ("F32", "block_scale") if layout == "base" else ("F8_E8M0", "e8m0_scale")
    return [("weight", "F8_E4M3", entry.shape, "fp8"), ("scale", dtype, blocks, content)]


def _fused(config: ModelConfig, entry: Entry) -> Iterator[FakeTensor]:
    """Yield the tensor that holds one projection of all experts, once."""
    prefix, projection = re.fullmatch(r"(.+)\.ffn\.experts\.\d+\.(w[123])", entry.name).groups()  # type: ignore[union-attr]
    rows, columns = entry.shape
    if ".experts.0." in entry.name and projection in ("w1", "w2"):
        leaf = "gate_up_proj" if projection == "w1" else "down_proj"
        shape = (config.n_routed_experts, rows * (2 if projection == "w1" else 1), columns)
        yield FakeTensor(f"model.{prefix}.mlp.experts.{leaf}", "BF16", shape, "BF16")


_SAVED = {"embed.weight": "model.embed_tokens.weight", "head.weight": "head.weight"}
_MODULES = (
    (r"^embed\.", "embed_tokens."),
    (r"^hc_head_", "hc_head.hc_"),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
    (r"\.attn\.attn_sink$", ".self_attn.sinks"),
    (r"\.attn\.q_norm\.", ".self_attn.q_a_norm."),
    (r"\.attn\.wq_a\.", ".self_attn.q_a_proj."),
    (r"\.attn\.wq_b\.", ".self_attn.q_b_proj."),
    (r"\.attn\.wkv\.", ".self_attn.kv_proj."),
    (r"\.attn\.kv_norm\.", ".self_attn.kv_norm."),
    (r"\.attn\.wo_a\.", ".self_attn.o_a_proj."),
    (r"\.attn\.wo_b\.", ".self_attn.o_b_proj."),
    (r"\.attn\.indexer\.compressor\.", ".self_attn.compressor.indexer."),
    (r"\.attn\.indexer\.wq_b\.", ".self_attn.compressor.indexer.q_b_proj."),
    (r"\.attn\.indexer\.weights_proj\.", ".self_attn.compressor.indexer.scorer.weights_proj."),
    (r"\.attn\.compressor\.", ".self_attn.compressor."),
    (r"(compressor\.(?:indexer\.)?)wkv\.", r"\1kv_proj."),
    (r"(compressor\.(?:indexer\.)?)wgate\.", r"\1gate_proj."),
    (r"(compressor\.(?:indexer\.)?)ape$", r"\1position_bias"),
    (r"(compressor\.(?:indexer\.)?)norm\.", r"\1kv_norm."),
    (r"\.ffn\.gate\.bias$", ".mlp.gate.e_score_correction_bias"),
    (r"\.ffn\.gate\.", ".mlp.gate."),
    (r"\.ffn\.((?:shared_experts|experts\.\d+)\.)w1\.", r".mlp.\1gate_proj."),
    (r"\.ffn\.((?:shared_experts|experts\.\d+)\.)w2\.", r".mlp.\1down_proj."),
    (r"\.ffn\.((?:shared_experts|experts\.\d+)\.)w3\.", r".mlp.\1up_proj."),
)


def _spelled(native: str, layout: str) -> str:
    """Return the name a layout gives a native tensor."""
    if layout == "resave":
        name = _SAVED.get(native) or "model." + re.sub(r"^hc_head_", "hc_head.hc_", native)
        return name.replace(".attn.kv_norm.weight", ".attn.norm.weight")
    if layout not in ("resave-modules", "compressed-tensors"):
        return native
    if native == "head.weight":
        return "lm_head.weight"
    for pattern, theirs in _MODULES:
        native = re.sub(pattern, theirs, native)
    return f"model.{native}"


def write_fake(out: pathlib.Path, model: str, layout: str, *, num_shards: int | None = None) -> pathlib.Path:
    """Write a checkpoint.

    Args:
        out: directory to write; created when missing.
        model: one of MODELS.
        layout: one of LAYOUTS.
        num_shards: files to spread it over, by default as many as the release has.

    Returns:
        The directory.
    """
    raw = config_of(model, layout)
    tensors = sorted(tensors_of(parse_config(raw), layout), key=lambda tensor: _numbers_in_order(tensor.name))
    count = num_shards or NUM_SHARDS[model][layout.endswith("dspark")]
    total = sum(tensor.num_bytes for tensor in tensors)
    shards: list[list[FakeTensor]] = [[] for _ in range(count)]
    done = 0
    for tensor in tensors:
        shards[min(done * count // total, count - 1)].append(tensor)
        done += tensor.num_bytes
    out.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, members in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        _write_shard(out / file, members, config=CONFIGS[model], is_filled=model == "small")
        weight_map.update({tensor.name: file for tensor in members})
    claimed = total if not layout.startswith("nvidia") else total * 95 // 100  # such repositories copy the source's
    _write_json(out / INDEX_NAME, {"metadata": {"total_size": claimed}, "weight_map": weight_map})
    _write_json(out / "config.json", raw)
    quantization = raw.get("quantization_config", {})
    if "quantized_layers" in quantization:
        content = {key: value for key, value in quantization.items() if key not in (*_FP8_CONFIG, "producer")}
        content["exclude_modules"] = content.pop("ignore")
        _write_json(out / "hf_quant_config.json", {"producer": _PRODUCER, "quantization": content})
    return out


def _numbers_in_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]


def _write_json(path: pathlib.Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_shard(path: pathlib.Path, tensors: list[FakeTensor], *, config: dict[str, Any], is_filled: bool) -> None:
    """Write one file: by falling element size, then name, as the format's own library does."""
    order = sorted(tensors, key=lambda tensor: (-ITEM_BYTES[tensor.dtype], tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if is_filled else {"format": "pt", FAKE: "sparse"}}
    offset = 0
    for tensor in order:
        end = offset + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        start = position = file.tell()
        for tensor in order:
            if is_filled or math.prod(tensor.shape) == 1:
                file.seek(position)
                file.write(_content(tensor, config))
            position += tensor.num_bytes
        file.truncate(start + offset)


def _content(tensor: FakeTensor, config: dict[str, Any]) -> bytes:
    pattern = _pattern(tensor, config)
    return (pattern * (tensor.num_bytes // len(pattern) + 1))[: tensor.num_bytes]


_CACHE: dict[tuple[str, int], bytes] = {}
_SCALARS = {"tensor_scale": 2.0**-12, "input_scale": 0.01, "global_scale": 2.0**12, "input_global_scale": 100.0}
_BYTES: dict[str, list[int]] = {
    "fp4": list(range(256)),
    "fp8": [byte for byte in range(256) if byte & 0x7F <= 0x50],
    "e4m3_scale": list(range(0x28, 0x48)),
    "e8m0_scale": list(range(112, 120)),
}


def _pattern(tensor: FakeTensor, config: dict[str, Any]) -> bytes:
    """Return bytes to repeat over a tensor."""
    if tensor.content in _SCALARS:
        return struct.pack("<f", _SCALARS[tensor.content])
    key = (tensor.content, config["n_routed_experts"])
    if key not in _CACHE:
        draw = random.Random(f"{key}")
        if tensor.content in _BYTES:
            _CACHE[key] = bytes(draw.choices(_BYTES[tensor.content], k=4099))
        elif tensor.content == "table":
            experts = [draw.randrange(config["n_routed_experts"]) for _ in range(1031)]
            _CACHE[key] = struct.pack(f"<{len(experts)}q", *experts)
        elif tensor.content == "block_scale":
            _CACHE[key] = struct.pack("<256f", *(draw.uniform(1e-4, 1e-3) for _ in range(256)))
        else:
            floats = [struct.pack("<f", draw.gauss(0, 0.05)) for _ in range(1031)]
            _CACHE[key] = b"".join(one[2:] if tensor.content == "BF16" else one for one in floats)
    return _CACHE[key]


def main() -> None:
    """Write a checkpoint from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--layout", choices=LAYOUTS, default="preview")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    write_fake(args.out, args.model, args.layout)
    files = list(args.out.iterdir())
    apparent, on_disk = sum(f.stat().st_size for f in files), sum(f.stat().st_blocks * 512 for f in files)
    print(f"{args.out}: {apparent:,} bytes in {len(files)} files, {on_disk:,} on disk")


if __name__ == "__main__":
    main()
