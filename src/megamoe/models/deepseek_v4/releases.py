# SPDX-License-Identifier: Apache-2.0
"""What the released models have in config.json that no tensor shows, held against a config.json of theirs.

Sizes, layers and formats are read off the tensors. The rest (rotary bases, YaRN, the router's factor, windows, top-k,
epsilons) could belong to another model, or be dropped by a re-save, and every tensor would still fit: the model would
run, and be wrong. Which release it is, the sizes say.

Source     the config.json files of DeepSeek-V4-Flash and -Pro and of their DSpark releases
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megamoe.checkpoint.problem import Problem
from megamoe.models.deepseek_v4.config import DSparkConfig, LayerKind, ModelConfig
from megamoe.models.deepseek_v4.rules import Finding
from megamoe.ops.yarn_scaling import YarnScaling


@dataclasses.dataclass(frozen=True)
class Release:
    """What one size has beyond its tensors' sizes.

    Attributes:
        name: in words.
        fields: field of ModelConfig -> value.
        dspark: the draft of its DSpark release.
    """

    name: str
    fields: Mapping[str, Any]
    dspark: DSparkConfig


_YARN = YarnScaling(factor=16.0, beta_fast=32.0, beta_slow=1.0, original_max_pos=65536)
_COMMON: dict[str, Any] = {
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "qk_rope_head_dim": 64,
    "sliding_window": 128,
    "max_position_embeddings": 1048576,
    "swiglu_limit": 10.0,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-06,
    "rms_norm_eps": 1e-06,
    "bos_token_id": 0,
}
_EOS = 1

# (hidden size, layers, experts) -> release.
RELEASES: dict[tuple[int, int, int], Release] = {
    (4096, 43, 256): Release(
        "Flash",
        {**_COMMON, "index_topk": 512, "routed_scaling_factor": 1.5},
        DSparkConfig(5, 128799, (40, 41, 42), 256),
    ),
    (7168, 61, 384): Release(
        "Pro",
        {**_COMMON, "index_topk": 1024, "routed_scaling_factor": 2.5},
        DSparkConfig(5, 128799, (58, 59, 60), 512),
    ),
}


def release_of(config: ModelConfig) -> Release | None:
    """Return the release whose sizes a configuration has."""
    return RELEASES.get((config.hidden_size, config.num_hidden_layers, config.n_routed_experts))


def check_release(config: ModelConfig) -> list[Problem]:
    """Return every field of a released model's config.json that is not the release's and that no tensor contradicts."""
    release = release_of(config)
    if release is None:
        return []
    others = [one for one in RELEASES.values() if one is not release]
    problems = []
    for field, right in release.fields.items():
        said = getattr(config, field)
        if said != right:
            whose = next((one.name for one in others if one.fields[field] == said), None)
            problems.append(_differs(release, field, said, right, whose))
    if config.yarn != _YARN:
        problems += _check_yarn(release, config.yarn)
    if _EOS not in config.eos_token_ids:
        problems.append(_differs(release, "eos_token_id", list(config.eos_token_ids), _EOS, None))
    if config.dspark is not None:
        for field in ("block_size", "noise_token_id", "target_layer_ids"):
            said, right = getattr(config.dspark, field), getattr(release.dspark, field)
            if said != right and len(config.dspark.target_layer_ids) == len(release.dspark.target_layer_ids):
                whose = next((one.name for one in others if getattr(one.dspark, field) == said), None)
                problems.append(_differs(release, f"dspark_{field}", said, right, whose))
    return problems


def _check_yarn(release: Release, said: YarnScaling | None) -> list[Problem]:
    if said is None:
        text = (
            f"config.json: no rope_scaling, so its compressed layers would run without YaRN; "
            f"DeepSeek-V4-{release.name} has factor {_YARN.factor:g} over {_YARN.original_max_pos} positions."
        )
        return [Problem("config-release", "rope_scaling", text, _REMEDY, "absent", f"factor {_YARN.factor:g}")]
    names = {"original_max_pos": "original_max_position_embeddings"}
    pairs = [(field.name, getattr(said, field.name), getattr(_YARN, field.name)) for field in dataclasses.fields(_YARN)]
    return [
        _differs(release, f"rope_scaling.{names.get(name, name)}", one, right, None)
        for name, one, right in pairs
        if one != right
    ]


_REMEDY = "Take config.json from the release, or be sure that the weights were trained with this."


def _differs(release: Release, field: str, said: object, right: object, whose: str | None) -> Problem:
    shown, expected = _number(said), _number(right)
    text = f"config.json: {field} is {shown}; DeepSeek-V4-{release.name} has {expected}"
    text += f": {whose}'s config.json?" if whose is not None else "."
    return Problem("config-release", field, text, _REMEDY, shown, expected)


def _number(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value.is_integer() else f"{value:g}"


def note_yarn(config: ModelConfig) -> list[Finding]:
    """Return a note when a model that is no release has compressed layers and no rope_scaling."""
    if config.yarn is not None or release_of(config) is not None:
        return []
    if all(kind is LayerKind.SWA for kind in config.layer_kinds):
        return []
    text = "config.json: no rope_scaling, so the compressed layers run without YaRN. Every released model has one."
    return [Finding("config-no-yarn", ("rope_scaling",), text, is_note=True)]


_RELEASED: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
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
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-06,
    "rms_norm_eps": 1e-06,
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

# What users call a release -> its config.json, as far as this package reads it.
RELEASED_CONFIGS: dict[str, dict[str, Any]] = {
    "flash": {
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
    },
    "pro": {
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
    },
}
