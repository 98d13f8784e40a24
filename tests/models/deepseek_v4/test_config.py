# SPDX-License-Identifier: Apache-2.0
"""config.json in both spellings, every contradiction refused, and the table of operation sizes."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest

from megamoe.checkpoint import CheckpointError
from megamoe.models import ARCHITECTURES
from megamoe.models.deepseek_v4.config import (
    ARCHITECTURE,
    DSparkConfig,
    LayerKind,
    ModelConfig,
    load_config,
    parse_config,
)
from megamoe.models.deepseek_v4.inventory import DSparkDraft, inventory
from megamoe.models.deepseek_v4.shapes import MODELS, OpCall, op_calls, op_shapes
from megamoe.ops.rope import YarnScaling

from .checkpoints import CONFIG, DSPARK, FLASH, PRO

SWA, CSA, HCA = LayerKind.SWA, LayerKind.CSA, LayerKind.HCA


# Known answers.


def test_flash():
    config = parse_config(FLASH)
    assert [config.layer_kinds.count(kind) for kind in LayerKind] == [2, 21, 20]
    assert config.layer_kinds[:5] == (SWA, SWA, CSA, HCA, CSA) and config.layer_kinds[-1] is CSA
    assert config.ratios[:5] == (0, 0, 4, 128, 4) and len(config.ratios) == 43
    assert config.hash_routed == (True,) * 3 + (False,) * 40
    assert config.yarn == YarnScaling(factor=16.0, beta_fast=32.0, beta_slow=1.0, original_max_pos=65536)
    assert (config.rope_theta, config.compress_rope_theta) == (10000.0, 160000.0)
    assert (config.qk_rope_head_dim, config.index_topk, config.routed_scaling_factor) == (64, 512, 1.5)
    assert (config.bos_token_id, config.eos_token_ids) == (0, (1,))
    assert config.architecture == "DeepseekV4ForCausalLM"
    assert config.dspark is None and config.unused_keys == ()


def test_pro():
    config = parse_config(PRO)
    assert [config.layer_kinds.count(kind) for kind in LayerKind] == [0, 30, 31]
    assert config.layer_kinds[:5] == (HCA, HCA, CSA, HCA, CSA) and config.layer_kinds[-1] is CSA
    assert (config.hidden_size, config.n_routed_experts, config.index_topk) == (7168, 384, 1024)


def test_dspark_release():
    raw = {**FLASH, "dspark_block_size": 5, "dspark_noise_token_id": 128799, "dspark_markov_rank": 256}
    raw |= {"dspark_target_layer_ids": [40, 41, 42], "compress_ratios": [*FLASH["compress_ratios"], 0, 0]}
    config = parse_config(raw)
    assert config.dspark == DSparkConfig(5, 128799, (40, 41, 42), 256)
    assert config.layer_kinds == parse_config(FLASH).layer_kinds


def test_architectures():
    assert ARCHITECTURES[ARCHITECTURE] == "deepseek_v4"
    with pytest.raises(CheckpointError, match="architectures names 'LlamaForCausalLM'; implemented is"):
        parse_config({**FLASH, "architectures": ["LlamaForCausalLM"]})


# Properties.


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_config(CONFIG).vocab_size = 3  # type: ignore[misc]


def test_template_leftovers_are_ignored_and_new_keys_are_named():
    raw = {**CONFIG, "n_group": 8, "topk_group": 4, "attention_dropout": 0.1, "brand_new": 1}
    config = parse_config(raw)
    assert config.unused_keys == ("brand_new",)
    assert dataclasses.replace(config, unused_keys=()) == parse_config(CONFIG)


def test_absent_fields_with_one_supported_value_mean_that_value():
    fixed = ("scoring_func", "topk_method", "norm_topk_prob", "hidden_act", "attention_bias", "n_shared_experts")
    assert parse_config({key: value for key, value in CONFIG.items() if key not in fixed}) == parse_config(CONFIG)


def test_several_end_tokens():
    assert parse_config({**CONFIG, "eos_token_id": [1, 5]}).eos_token_ids == (1, 5)
    assert parse_config({**CONFIG, "eos_token_id": None}).eos_token_ids == ()
    assert parse_config({**CONFIG, "bos_token_id": None}).bos_token_id is None


def test_no_scaling():
    assert parse_config({**CONFIG, "rope_scaling": None}).yarn is None


@pytest.mark.parametrize("raw", [CONFIG, FLASH, PRO], ids=["small", "flash", "pro"])
def test_transformers_re_save_says_the_same(tmp_path, raw):
    from transformers import DeepseekV4Config

    native = {**raw, "quantization_config": None, "expert_dtype": None}
    DeepseekV4Config.from_dict(copy.deepcopy(native)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["architectures"] = raw["architectures"]
    assert "compress_ratios" not in saved and "num_hash_layers" not in saved
    config, expected = parse_config(saved), parse_config(native)
    assert dataclasses.replace(config, unused_keys=()) == expected
    assert parse_config({**saved, **native, "quantization_config": None}) == dataclasses.replace(
        expected, unused_keys=config.unused_keys
    )


def test_a_base_among_the_scaling_is_the_main_table_s():
    for name in ("rope_scaling", "rope_parameters"):
        raw = {**without("rope_scaling", "rope_theta"), name: {**CONFIG["rope_scaling"], "rope_theta": 10000.0}}
        assert parse_config(raw) == parse_config(CONFIG)
        with pytest.raises(CheckpointError, match=rf"rope_theta 500.0, {name}.rope_theta 10000.0"):
            parse_config({**raw, "rope_theta": 500})


def test_transformers_ratios():
    config = parse_config(transformers_config())
    assert config.layer_kinds == (SWA, CSA, HCA, CSA) and config.ratios == (0, 4, 8, 4)
    assert config.hash_routed == (True, True, False, False)
    assert config.qk_rope_head_dim == 8
    assert config.yarn == YarnScaling(factor=16.0, beta_fast=32.0, beta_slow=1.0, original_max_pos=64)


def transformers_config() -> dict[str, Any]:
    """The keys transformers writes, with a ratio no released model has."""
    native = ("compress_ratios", "num_hash_layers", "qk_rope_head_dim", "rope_scaling")
    raw = {key: value for key, value in CONFIG.items() if key not in native}
    return {
        **raw,
        "layer_types": [SWA.value, CSA.value, HCA.value, CSA.value],
        "compress_rates": {CSA.value: 4, HCA.value: 8},
        "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
        "partial_rotary_factor": 8 / 48,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 8 / 48},
            "compress": {
                "rope_type": "yarn",
                "factor": 16,
                "original_max_position_embeddings": 64,
                "rope_theta": 160000.0,
                "attention_factor": 1.0,
                "partial_rotary_factor": 8 / 48,
            },
        },
    }


# The table of operation sizes.


def raw_config(model: str, repository: Any) -> dict[str, Any]:
    """Return config.json of a model in the table."""
    if model == "tiny":
        content: dict[str, Any] = json.loads((repository / "tools" / "tiny_model" / "config.json").read_text())
        return content
    return {"flash": FLASH, "pro": PRO}[model]


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return logical shapes by name without layer and expert numbers."""
    shapes = {}
    for entry in (*inventory(config, num_mtp=1), *inventory(config, dspark=DSparkDraft.of(config, 1))):
        parts = [part for part in entry.name.removesuffix(".weight").split(".") if not part.isdigit()]
        name = ".".join(parts).removeprefix("layers.")
        ratio = config.ratios[int(entry.name.split(".")[1])] if entry.name.startswith("layers.") else 0
        shapes[f"{name} (ratio {ratio})" if name == "attn.compressor.wkv" else name] = entry.shape
    return shapes


@pytest.mark.parametrize("model", MODELS)
def test_sizes_of_linears_are_those_of_the_weights(model, repository):
    layers, rank = {"tiny": ([0, 3], 8), "flash": ([40, 41, 42], 256), "pro": ([58, 59, 60], 512)}[model]
    draft = {"dspark_target_layer_ids": layers, "dspark_markov_rank": rank, "dspark_noise_token_id": 0}
    config = parse_config({**raw_config(model, repository), **draft, "dspark_block_size": 5})
    shapes = linear_shapes(config)
    names = {call.where: call for call in op_calls(model) if call.op == "linear"}
    assert len(names) == 16
    index = ["attn.indexer.compressor.wkv"] * 2 + ["attn.indexer.weights_proj"]
    stacks = {  # what lies under each other; wgate is of the size of wkv
        "attn.wq_a, attn.wkv": ["attn.wq_a", "attn.wkv"],
        "attn.wq_b, attn.indexer.wq_b": ["attn.wq_b", "attn.indexer.wq_b"],
        "attn.compressed (ratio 4)": [*["attn.compressor.wkv (ratio 4)"] * 2, *index],
        "attn.compressed (ratio 128)": ["attn.compressor.wkv (ratio 128)"] * 2,
    }
    for where, call in names.items():
        parts = [shapes[part] for part in stacks.get(where, [where])]
        assert {call.dims["K"]} == {width for _, width in parts}, where
        assert call.dims["N"] == sum(num_rows for num_rows, _ in parts), where
    grouped = next(call for call in op_calls(model) if call.op == "grouped_linear")
    assert (grouped.dims["G"] * grouped.dims["N"], grouped.dims["K"]) == shapes["attn.wo_a"]
    experts = next(call for call in op_calls(model) if call.op == "experts")
    assert (experts.dims["F"], experts.dims["D"]) == shapes["ffn.experts.w1"]
    quantized = {"attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_b", "attn.indexer.wq_b", "mtp.e_proj"}
    quantized |= {
        "attn.wq_a, attn.wkv",
        "attn.wq_b, attn.indexer.wq_b",
        "mtp.main_proj",
        "ffn.shared_experts.w1",
        "ffn.shared_experts.w2",
    }
    assert {call.where for call in op_calls(model) if call.op == "nvfp4_linear"} == quantized


@pytest.mark.parametrize("model", MODELS)
def test_other_sizes_are_those_of_the_config(model, repository):
    config = parse_config(raw_config(model, repository))
    heads, width = config.num_attention_heads, config.head_dim
    by_where = {(call.op, call.where): dict(call.dims) for call in op_calls(model)}
    sizes = {"E": config.n_routed_experts, "A": config.num_experts_per_tok}
    assert by_where["route_experts", "ffn.gate"] == {**sizes, "D": config.hidden_size}
    assert by_where["route_experts", "ffn.gate (hash)"] == {**sizes, "D": config.hidden_size, "V": config.vocab_size}
    assert by_where["rms_norm", "attn queries"] == {"H": heads, "K": width}
    assert by_where["rms_norm", "attn.q_norm"] == {"K": config.q_lora_rank}
    assert by_where["rope", "attn queries, attn output"] == {"H": heads, "C": width, "R": config.qk_rope_head_dim}
    streams = {"X": config.hc_mult, "D": config.hidden_size}
    assert (
        by_where["hyper_connection_pre", "hc_attn, hc_ffn"] == by_where["hyper_connection_head", "hc_head"] == streams
    )
    index = {"Hi": config.index_n_heads, "K": config.index_head_dim, "top_k": config.index_topk}
    assert by_where["index_topk", "attn.indexer"] == index
    window = {"H": heads, "C": width, "W": config.sliding_window}
    assert by_where["sparse_attention", "attn (ratio 4)"] == {**window, "J": config.index_topk}
    entries = config.max_position_embeddings // 128
    assert by_where["sparse_attention", "attn (ratio 128)"] == {**window, "J": entries}
    assert by_where["quantize_nvfp4", "attn.wo_a input"] == {
        "G": config.o_groups,
        "K": heads * width // config.o_groups,
    }
    assert by_where["quantize_nvfp4", "attn.wo_b input"] == {"K": config.o_groups * config.o_lora_rank}
    assert by_where["quantize_nvfp4", "ffn.w2 input"] == {"K": config.moe_intermediate_size}
    assert by_where["sample", "logits"] == {"V": config.vocab_size}


def test_shapes_of_one_operation_come_once_each():
    shapes = op_shapes("rms_norm")
    assert all(isinstance(call, OpCall) for call in shapes)
    assert len({tuple(call.dims.items()) for call in shapes}) == len(shapes)
    assert str(op_shapes("nvfp4_linear")[0]) == "tiny attn.wq_a N=128 K=256"
    with pytest.raises(ValueError, match=r"no model calls 'attention'; called are add_to_streams, "):
        op_shapes("attention")
    with pytest.raises(ValueError, match=r"unknown model 'small'; allowed are tiny, flash, pro"):
        op_calls("small")


# Refusals.


def without(*names: str) -> dict[str, Any]:
    """Return the config without some keys."""
    return {key: value for key, value in CONFIG.items() if key not in names}


def with_compress(**changes: Any) -> dict[str, Any]:
    """Return the transformers config with other parameters for the compressed layers."""
    raw = transformers_config()
    raw["rope_parameters"]["compress"].update(changes)
    return raw


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("V4.1", {**CONFIG, "model_type": "deepseek_v41"}, "model_type is 'deepseek_v41'; this package computes"),
    (
        "scores",
        {**CONFIG, "scoring_func": "sigmoid"},
        "scoring_func is 'sigmoid'; this package computes 'sqrtsoftplus'",
    ),
    ("activation", {**CONFIG, "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("bias", {**CONFIG, "attention_bias": True}, "attention_bias is True"),
    ("tied", {**CONFIG, "tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ("two shared experts", {**CONFIG, "n_shared_experts": 2}, "n_shared_experts is 2"),
    ("two KV heads", {**CONFIG, "num_key_value_heads": 2}, "num_key_value_heads is 2"),
    ("no name", without("architectures"), "architectures is None; expected one name in a list"),
    (
        "missing size",
        without("hidden_size"),
        "hidden_size is missing. Use the config.json that belongs to the weights.",
    ),
    ("missing number", without("swiglu_limit"), "swiglu_limit is missing."),
    ("missing base", without("compress_rope_theta"), "compress_rope_theta is missing."),
    ("missing rotary size", without("qk_rope_head_dim"), "qk_rope_head_dim is missing."),
    ("missing hash layers", without("num_hash_layers"), "num_hash_layers is missing."),
    ("missing kinds", without("compress_ratios"), "neither compress_ratios nor layer_types says"),
    ("negative", {**CONFIG, "index_topk": -1}, "index_topk is -1; expected an integer of at least 1."),
    ("boolean size", {**CONFIG, "hc_mult": True}, "hc_mult is True; expected an integer of at least 1."),
    ("text", {**CONFIG, "hc_eps": "1e-6"}, "hc_eps is the text '1e-6', not a number. Write it without quotes."),
    ("no clamp", {**CONFIG, "swiglu_limit": 0}, "swiglu_limit is 0; expected a positive number."),
    ("infinite", {**CONFIG, "rope_theta": math.inf}, "rope_theta is inf; expected a positive number."),
    ("few ratios", {**CONFIG, "compress_ratios": [0, 4]}, "expected at least num_hidden_layers (4) integers"),
    ("odd ratio", {**CONFIG, "compress_ratios": [0, 4, 8, 4]}, "compress_ratios holds [8]; allowed are 0, 4 and 128."),
    ("draft ratio", {**CONFIG, "compress_ratios": [0, 4, 128, 4, 4]}, "beyond layer 4 (draft layers) is [4]; expected"),
    ("unknown kind", {**transformers_config(), "layer_types": ["full_attention"] * 4}, "among them ['full_attention']"),
    ("few kinds", {**transformers_config(), "layer_types": [SWA.value]}, "layer_types has 1 entries; expected"),
    ("no rate", {**transformers_config(), "compress_rates": {CSA.value: 4}}, "is None; expected a positive integer."),
    ("unknown experts", {**transformers_config(), "mlp_layer_types": ["dense"] * 4}, "among them ['dense']"),
    (
        "kinds contradict",
        {**transformers_config(), "compress_ratios": [0, 4, 128, 4]},
        "compress_ratios contradicts layer_types with compress_rates.",
    ),
    (
        "hash layers contradict",
        {**transformers_config(), "num_hash_layers": 1},
        "num_hash_layers contradicts mlp_layer_types.",
    ),
    (
        "hash layers beyond",
        {**CONFIG, "num_hash_layers": 9},
        "num_hash_layers is 9; expected at most num_hidden_layers",
    ),
    (
        "rotary sizes contradict",
        {**CONFIG, "partial_rotary_factor": 0.5},
        "rotary channels are contradicted: {'qk_rope_head_dim': 8, 'config.partial_rotary_factor': 24}.",
    ),
    (
        "bases contradict",
        {**transformers_config(), "rope_theta": 5000.0},
        "rope_theta is contradicted: rope_theta 5000.0, rope_parameters.main.rope_theta 10000.0.",
    ),
    ("compressed bases contradict", with_compress(rope_theta=1e6), "compress_rope_theta is contradicted"),
    (
        "scalings contradict",
        {**transformers_config(), "rope_scaling": {**CONFIG["rope_scaling"], "factor": 4}},
        "rope_scaling contradicts rope_parameters.",
    ),
    ("other scaling", with_compress(rope_type="llama3"), "the type must be 'yarn' or 'default'."),
    ("attention factor", with_compress(attention_factor=1.277), "attention_factor must be 1.0 and truncate true"),
    ("unknown scaling field", with_compress(mscale=0.7), "holds ['mscale'], which this package does not compute."),
    (
        "no original length",
        with_compress(original_max_position_embeddings=None),
        "is None; expected a positive integer",
    ),
    (
        "scaled window",
        {**transformers_config(), "rope_parameters": {"main": {"rope_type": "yarn"}, "compress": {}}},
        "sliding-window layers have no scaling ('default').",
    ),
    ("groups", {**CONFIG, "o_groups": 3}, "num_attention_heads (4) is not a multiple of o_groups (3)."),
    ("active experts", {**CONFIG, "num_experts_per_tok": 9}, "num_experts_per_tok (9) exceeds n_routed_experts (4)."),
    (
        "odd rotary size",
        {**CONFIG, "qk_rope_head_dim": 7},
        "qk_rope_head_dim (7) must be even and at most head_dim (48).",
    ),
    ("index head too small", {**CONFIG, "index_head_dim": 4}, "must be even and at most index_head_dim (4)."),
    ("end token", {**CONFIG, "eos_token_id": 48}, "eos_token_id is 48; expected ids below vocab_size (48)."),
    ("end token text", {**CONFIG, "eos_token_id": "</s>"}, "eos_token_id is '</s>'; expected a token id or a list"),
    (
        "DSpark layers",
        {**DSPARK, "dspark_target_layer_ids": [2, 4]},
        "dspark_target_layer_ids is [2, 4]; layers are 0 to 3.",
    ),
    (
        "no DSpark layers",
        {**DSPARK, "dspark_target_layer_ids": []},
        "dspark_target_layer_ids is []; expected a list of layer numbers.",
    ),
    (
        "DSpark noise",
        {**DSPARK, "dspark_noise_token_id": 48},
        "dspark_noise_token_id is 48; expected an id below vocab_size (48).",
    ),
    ("half a DSpark", {**CONFIG, "dspark_block_size": 5}, "dspark_block_size without dspark_markov_rank"),
    (
        "number as text",
        {**CONFIG, "num_hidden_layers": "5"},
        "num_hidden_layers is the text '5', not a number. Write it without quotes.",
    ),
    (
        "null ratios",
        {**CONFIG, "compress_ratios": None},
        "compress_ratios is null; it must say what each layer attends",
    ),
]


@pytest.mark.parametrize(("raw", "message"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_refusals(raw, message):
    with pytest.raises(CheckpointError) as caught:
        parse_config(raw, where="the config")
    assert str(caught.value).startswith("the config: ")
    assert message in str(caught.value)


def test_all_problems_are_listed():
    with pytest.raises(CheckpointError) as caught:
        parse_config({**CONFIG, "o_groups": 3, "index_topk": 0, "num_hash_layers": None})
    for name in ("o_groups", "index_topk", "num_hash_layers"):
        assert name in str(caught.value)


@pytest.mark.parametrize("name", sorted(set(CONFIG) - {"torch_dtype", "num_nextn_predict_layers"}))
def test_a_value_of_another_type_is_refused_not_raised_on(name):
    for value in ("text", [], {"a": 1}, -3.5, [None]):
        raw = {**CONFIG, name: value}
        if (name, value) in (("rope_scaling", []), ("eos_token_id", []), ("bos_token_id", [])):
            continue  # nothing
        with pytest.raises(CheckpointError):
            parse_config(raw)


def test_config_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"config: no file .*config.json. Pass a checkpoint's folder."):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json is not a JSON object"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert load_config(tmp_path) == parse_config(CONFIG)
