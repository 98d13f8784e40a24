# SPDX-License-Identifier: Apache-2.0
"""Every spelling of a DeepSeek-V4 tensor name, turned into DeepSeek's own.

Who writes what:

    DeepSeek, NVIDIA     layers.3.attn.wq_a.weight, layers.3.ffn.experts.7.w1.weight_scale_2, mtp.0.e_proj.weight
    save_pretrained      the same behind "model.", but model.embed_tokens.weight, model.hc_head.hc_fn, and the norm of
                         the attention's latent as attn.norm.weight instead of attn.kv_norm.weight
    state_dict           model.layers.3.self_attn.q_a_proj.weight, model.layers.3.mlp.experts.gate_up_proj (all experts
                         in one tensor, gate rows first), lm_head.weight
    compressed-tensors   module names with weight_packed, weight_scale, weight_global_scale, input_global_scale
    other tools          per-expert mlp.experts.7.gate_proj.weight; scales as weight_scale_inv instead of scale

Renaming drops nothing: a name that fits no rule comes back unchanged (without "model."), and the loader refuses it.

Source     DeepSeek-V4 model.safetensors.index.json; transformers 5.24 conversion_mapping.py, entry "deepseek_v4"
"""

from __future__ import annotations

import re

_TOP_LEVEL = {
    "embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
}

_COMPRESSOR = {"kv_proj": "wkv", "gate_proj": "wgate", "position_bias": "ape", "kv_norm": "norm"}

# Modules of a layer, after self_attn -> attn and mlp -> ffn.
_MODULES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attn_hc.fn": "hc_attn_fn",
    "attn_hc.base": "hc_attn_base",
    "attn_hc.scale": "hc_attn_scale",
    "ffn_hc.fn": "hc_ffn_fn",
    "ffn_hc.base": "hc_ffn_base",
    "ffn_hc.scale": "hc_ffn_scale",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
    "attn.q_a_proj": "attn.wq_a",
    "attn.q_a_norm": "attn.q_norm",
    "attn.q_b_proj": "attn.wq_b",
    "attn.kv_proj": "attn.wkv",
    "attn.norm": "attn.kv_norm",
    "attn.o_a_proj": "attn.wo_a",
    "attn.o_b_proj": "attn.wo_b",
    "attn.sinks": "attn.attn_sink",
    "attn.compressor.indexer.q_b_proj": "attn.indexer.wq_b",
    "attn.compressor.indexer.scorer.weights_proj": "attn.indexer.weights_proj",
    "ffn.gate.e_score_correction_bias": "ffn.gate.bias",
    "ffn.shared_experts.gate_proj": "ffn.shared_experts.w1",
    "ffn.shared_experts.up_proj": "ffn.shared_experts.w3",
    "ffn.shared_experts.down_proj": "ffn.shared_experts.w2",
    **{f"attn.compressor.{theirs}": f"attn.compressor.{ours}" for theirs, ours in _COMPRESSOR.items()},
    **{f"attn.compressor.indexer.{theirs}": f"attn.indexer.compressor.{ours}" for theirs, ours in _COMPRESSOR.items()},
}

_PROJECTIONS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
# Digits are ASCII and few: a number that no model reaches is left alone and refused as part of an unknown name.
_BLOCK = r"(?:layers\.(?:0|[1-9][0-9]{0,3})|mtp\.(?:0|[1-9][0-9]?))"
_LAYER = re.compile(rf"({_BLOCK})\.(.+)")
_EXPERT = re.compile(r"(ffn\.experts\.(?:0|[1-9][0-9]*))\.(gate_proj|up_proj|down_proj)")
_FUSED = re.compile(rf"({_BLOCK}\.ffn\.experts)\.(gate_up_proj|down_proj)(|\.weight|_scale_inv|\.scale)")
_LEAF = re.compile(
    r"(.+?)((?:\.(?:weight|weight_scale|weight_scale_2|input_scale|scale|weight_packed|weight_global_scale"
    r"|input_global_scale|weight_shape|weight_zero_point))?)"
)


def native_name(name: str) -> str:
    """Return DeepSeek's name of a stored tensor.

    Fused expert tensors keep their transformers name (see `fused_experts`), with "layers.N.ffn." in front.

    Args:
        name: as stored.
    """
    name = name.removeprefix("model.")
    name = _TOP_LEVEL.get(name, name)
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name
    prefix, rest = layer.groups()
    if rest.endswith(".weight_scale_inv"):
        rest = rest.removesuffix(".weight_scale_inv") + ".scale"
    for theirs, ours in (("self_attn.", "attn."), ("mlp.", "ffn.")):
        if rest.startswith(theirs):
            rest = ours + rest.removeprefix(theirs)
    if rest in _MODULES:  # a parameter without a leaf name, such as attn_hc.scale
        return f"{prefix}.{_MODULES[rest]}"
    leaf = _LEAF.fullmatch(rest)
    module, suffix = leaf.groups() if leaf else (rest, "")
    expert = _EXPERT.fullmatch(module)
    module = f"{expert[1]}.{_PROJECTIONS[expert[2]]}" if expert else _MODULES.get(module, module)
    return f"{prefix}.{module}{suffix}"


def fused_experts(name: str) -> tuple[str, tuple[str, ...], str] | None:
    """Take apart the native name of a tensor that holds one projection of all experts.

    Args:
        name: from `native_name`.

    Returns:
        (prefix such as "layers.3.ffn.experts", projections stacked along its rows, "weight" or "scale"), or None.
    """
    match = _FUSED.fullmatch(name)
    if match is None:
        return None
    projections = ("w1", "w3") if match[2] == "gate_up_proj" else ("w2",)
    return match[1], projections, "weight" if match[3] in ("", ".weight") else "scale"
