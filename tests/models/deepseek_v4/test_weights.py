# SPDX-License-Identifier: Apache-2.0
"""Loading weights: every layout gives the values it stores; everything that does not fit is refused by name."""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Callable

import pytest
import torch

from megamoe.checkpoint import CheckpointError, CheckpointReader
from megamoe.formats import e2m1, fp8, nvfp4
from megamoe.formats.fp8 import Fp8BlockTensor
from megamoe.formats.mxfp4 import MxFp4Tensor
from megamoe.formats.nvfp4 import NvFp4Tensor
from megamoe.models.deepseek_v4 import names, stored
from megamoe.models.deepseek_v4 import weights as weights_module
from megamoe.models.deepseek_v4.config import load_config, parse_config
from megamoe.models.deepseek_v4.inventory import DSparkDraft, inventory
from megamoe.models.deepseek_v4.names import native_name
from megamoe.models.deepseek_v4.stored import Format, StoredTensors
from megamoe.models.deepseek_v4.weights import ModelWeights, Role, fits_fp8_groups, fp8_groups, load_weights

from . import checkpoints
from .checkpoints import CONFIG, LAYOUTS, Tensors, assert_same, encode_all, make_master, save, values_of


def load(directory: pathlib.Path, *, dequantize: bool = False, dtype: torch.dtype = torch.float32) -> ModelWeights:
    """Load a checkpoint directory; the reader is closed before the weights are looked at."""
    with CheckpointReader(directory) as reader:
        return load_weights(reader, load_config(directory), dequantize=dequantize, dtype=dtype)


def refusal(directory: pathlib.Path, *, dequantize: bool = False) -> str:
    """Return the message a checkpoint is refused with."""
    with pytest.raises(CheckpointError) as caught:
        load(directory, dequantize=dequantize)
    return str(caught.value)


def bf16_checkpoint(directory: pathlib.Path, seed: int) -> Tensors:
    """Write the bf16 master and return its tensors, to be changed and saved again."""
    return encode_all(make_master(seed), LAYOUTS["bf16"])[0]


# Known answers.


@pytest.mark.parametrize(
    ("raw", "num_tensors", "num_bytes", "num_parameters"),
    [
        (checkpoints.FLASH, 69_187, 159_609_485_896, 284.33e9),
        (checkpoints.PRO, 145_116, 864_704_792_696, 1573.0e9),
    ],
    ids=["flash", "pro"],
)
def test_inventory_gives_the_published_totals(raw, num_tensors, num_bytes, num_parameters):
    tensors, size, parameters = 0, 0, 0
    for entry in inventory(parse_config(raw), num_mtp=1):
        count = math.prod(entry.shape)
        if entry.role is Role.LINEAR:  # FP8, one scale byte per 128 x 128
            tensors, size = tensors + 2, size + count + count // 128**2
        elif entry.role is Role.EXPERT:  # MXFP4, one scale byte per 32
            tensors, size = tensors + 2, size + count // 2 + count // 32
        else:
            width = {Role.PLAIN: 2, Role.FLOAT32: 4, Role.TABLE: 8}[entry.role]
            tensors, size = tensors + 1, size + count * width
        if entry.role is not Role.TABLE and not entry.name.startswith("mtp."):
            parameters += count
    assert (tensors, size) == (num_tensors, num_bytes)
    assert parameters == pytest.approx(num_parameters, rel=2e-5)


def test_dspark_release_has_the_published_number_of_tensors():
    dspark = {key: value for key, value in checkpoints.DSPARK.items() if key.startswith("dspark_")}
    flash, pro = parse_config({**checkpoints.FLASH, **dspark}), parse_config({**checkpoints.PRO, **dspark})
    per_entry = {Role.LINEAR: 2, Role.EXPERT: 2}
    for config, published in ((flash, 72_317), (pro, 149_782)):
        entries = inventory(config, dspark=DSparkDraft.of(config, 3))
        assert sum(per_entry.get(entry.role, 1) for entry in entries) == published


NAMES = [
    ("embed.weight", "embed.weight", "model.embed_tokens.weight"),
    ("head.weight", "head.weight", "lm_head.weight"),
    ("norm.weight", "model.norm.weight", "model.norm.weight"),
    ("hc_head_fn", "model.hc_head.hc_fn", "model.hc_head.hc_fn"),
    ("hc_head_base", "hc_head_base", "model.hc_head.hc_base"),
    ("hc_head_scale", "hc_head_scale", "model.hc_head.hc_scale"),
    ("layers.1.attn_norm.weight", "model.layers.1.attn_norm.weight", "model.layers.1.input_layernorm.weight"),
    ("layers.1.ffn_norm.weight", "layers.1.ffn_norm.weight", "model.layers.1.post_attention_layernorm.weight"),
    ("layers.1.hc_attn_fn", "model.layers.1.hc_attn_fn", "model.layers.1.attn_hc.fn"),
    ("layers.1.hc_ffn_scale", "model.layers.1.hc_ffn_scale", "model.layers.1.ffn_hc.scale"),
    ("layers.10.attn.wq_a.weight", "model.layers.10.attn.wq_a.weight", "model.layers.10.self_attn.q_a_proj.weight"),
    ("layers.1.attn.wq_a.scale", "layers.1.attn.wq_a.scale", "model.layers.1.self_attn.q_a_proj.weight_scale_inv"),
    ("layers.1.attn.q_norm.weight", "layers.1.attn.q_norm.weight", "model.layers.1.self_attn.q_a_norm.weight"),
    ("layers.1.attn.wq_b.weight", "layers.1.attn.wq_b.weight", "model.layers.1.self_attn.q_b_proj.weight"),
    ("layers.1.attn.wkv.weight", "layers.1.attn.wkv.weight", "model.layers.1.self_attn.kv_proj.weight"),
    ("layers.1.attn.kv_norm.weight", "model.layers.1.attn.norm.weight", "model.layers.1.self_attn.kv_norm.weight"),
    ("layers.1.attn.wo_a.weight", "layers.1.attn.wo_a.weight", "model.layers.1.self_attn.o_a_proj.weight"),
    ("layers.1.attn.wo_b.weight", "layers.1.attn.wo_b.weight", "model.layers.1.self_attn.o_b_proj.weight"),
    ("layers.1.attn.attn_sink", "model.layers.1.attn.attn_sink", "model.layers.1.self_attn.sinks"),
    (
        "layers.1.attn.compressor.wgate.weight",
        "model.layers.1.attn.compressor.wgate.weight",
        "model.layers.1.self_attn.compressor.gate_proj.weight",
    ),
    (
        "layers.1.attn.compressor.norm.weight",
        "model.layers.1.attn.compressor.norm.weight",
        "model.layers.1.self_attn.compressor.kv_norm.weight",
    ),
    (
        "layers.1.attn.indexer.wq_b.weight_scale_2",
        "layers.1.attn.indexer.wq_b.weight_scale_2",
        "model.layers.1.self_attn.compressor.indexer.q_b_proj.weight_scale_2",
    ),
    (
        "layers.1.attn.indexer.weights_proj.weight",
        "model.layers.1.attn.indexer.weights_proj.weight",
        "model.layers.1.self_attn.compressor.indexer.scorer.weights_proj.weight",
    ),
    (
        "layers.1.attn.indexer.compressor.ape",
        "model.layers.1.attn.indexer.compressor.ape",
        "model.layers.1.self_attn.compressor.indexer.position_bias",
    ),
    (
        "layers.1.attn.indexer.compressor.norm.weight",
        "model.layers.1.attn.indexer.compressor.norm.weight",
        "model.layers.1.self_attn.compressor.indexer.kv_norm.weight",
    ),
    ("layers.3.ffn.gate.bias", "model.layers.3.ffn.gate.bias", "model.layers.3.mlp.gate.e_score_correction_bias"),
    ("layers.0.ffn.gate.tid2eid", "model.layers.0.ffn.gate.tid2eid", "model.layers.0.mlp.gate.tid2eid"),
    (
        "layers.0.ffn.shared_experts.w3.weight",
        "model.layers.0.ffn.shared_experts.w3.weight",
        "model.layers.0.mlp.shared_experts.up_proj.weight",
    ),
    (
        "layers.0.ffn.experts.11.w2.input_scale",
        "model.layers.0.ffn.experts.11.w2.input_scale",
        "model.layers.0.mlp.experts.11.down_proj.input_scale",
    ),
    ("mtp.0.norm.weight", "mtp.0.norm.weight", "model.mtp.0.norm.weight"),
]


@pytest.mark.parametrize(("native", "saved", "module"), NAMES, ids=[row[0] for row in NAMES])
def test_every_spelling_has_one_native_name(native, saved, module):
    assert {native_name(native), native_name(saved), native_name(module)} == {native}


def test_unknown_names_come_back_unchanged():
    for name in ("vision.blocks.0.weight", "layers.01.attn.wq_a.weight", "layers.1.attn.wq_c.weight", "layers.x"):
        assert native_name(name) == name


def test_e8m0_bytes_under_another_label_are_reinterpreted(tmp_path, seed):
    tensors, _ = encode_all(make_master(seed), LAYOUTS["bf16"])
    module = "layers.0.attn.wq_a"
    tensors[f"{module}.weight"] = torch.full((64, 80), 0x21, dtype=torch.uint8)  # codes 1 and 2: 0.5 and 1
    tensors[f"{module}.scale"] = torch.full((64, 5), 120, dtype=torch.uint8)  # 2^-7
    weight = load(save(tmp_path, tensors), dequantize=True).blocks[0].attention.wq_a
    assert isinstance(weight, torch.Tensor)
    assert weight[:, 0::2].unique().tolist() == [0.5 / 128]
    assert weight[:, 1::2].unique().tolist() == [1.0 / 128]


# Properties.


@pytest.mark.parametrize("dequantize", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_the_values_it_stores(tmp_path, seed, layout, dequantize):
    tensors, values = encode_all(make_master(seed), LAYOUTS[layout])
    weights = load(save(tmp_path, tensors), dequantize=dequantize)
    assert_same(values_of(weights), values)
    assert weights.unused_draft == ()
    scalars = (".input_scale", ".input_global_scale")
    calibrated = {name.rpartition(".")[0] for name in tensors if name.endswith(scalars)}
    assert dict(weights.input_scales) == {name: pytest.approx(0.001) for name in calibrated}


def test_containers_are_kept(tmp_path, seed):
    tensors, _ = encode_all(make_master(seed), LAYOUTS["nvidia"])
    weights = load(save(tmp_path, tensors))
    attention, moe, draft = weights.blocks[1].attention, weights.blocks[1].moe, weights.mtp[0].block.moe
    assert isinstance(attention.wq_a, Fp8BlockTensor) and attention.wq_a.scales.dtype == torch.float8_e8m0fnu
    assert isinstance(attention.wo_a, Fp8BlockTensor) and attention.wo_a.shape == (2, 32, 96)
    assert attention.wo_a.scales.shape == (2, 1, 1)  # groups of 32 rows share a block of 128
    assert isinstance(moe.w1, NvFp4Tensor) and moe.w1.shape == (4, 32, 160) and moe.w1.tensor_scale.shape == (4,)
    assert isinstance(moe.shared_w2, Fp8BlockTensor)
    assert isinstance(draft.w1, NvFp4Tensor) and isinstance(draft.w3, NvFp4Tensor)
    for expert in range(4):  # the copied codes are the stored ones
        name = f"mtp.0.ffn.experts.{expert}.w1.weight"
        assert torch.equal(draft.w1.codes[expert], tensors[name].view(torch.uint8))
    assert torch.equal(draft.w1.tensor_scale, draft.w3.tensor_scale)
    assert weights.embed.dtype == weights.norm.dtype == torch.bfloat16


def test_base_layout_keeps_fp32_scales(tmp_path, seed):
    tensors, _ = encode_all(make_master(seed), LAYOUTS["base"])
    weights = load(save(tmp_path, tensors))
    assert isinstance(weights.blocks[0].moe.w1, Fp8BlockTensor)
    assert weights.blocks[0].moe.w1.scales.dtype == torch.float32
    wo_a = weights.blocks[0].attention.wo_a
    assert isinstance(wo_a, Fp8BlockTensor) and wo_a.scales.dtype == torch.float32


@pytest.mark.parametrize("num_rows", [32, 128, 256])
def test_groups_of_fp8_keep_their_values(num_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    size = torch.arange(1, 3 * num_rows + 1)[:, None] ** 2.0  # every block has a scale of its own
    whole = fp8.quantize_blocks(torch.randn(3 * num_rows, 256, generator=generator) * size)
    groups = fp8_groups(whole, 3)
    assert groups.shape == (3, num_rows, 256) and groups.codes.data_ptr() == whole.codes.data_ptr()
    assert torch.equal(fp8.dequantize(groups).flatten(0, 1), fp8.dequantize(whole))


def test_fp8_blocks_across_groups_are_refused(tmp_path, seed, monkeypatch):
    tensors, _ = encode_all(make_master(seed), LAYOUTS["nvidia"])
    sizes = [rows for rows in (32, 64, 96, 128, 192, 256) if fits_fp8_groups(rows)]
    assert sizes == [32, 64, 128, 256]
    monkeypatch.setattr(weights_module, "fits_fp8_groups", lambda num_rows: False)
    assert "layers.0.attn.wo_a: FP8 blocks of 128 rows lie across groups of 32 (o_lora_rank)." in refusal(
        save(tmp_path, tensors)
    )
    load(save(tmp_path / "exact", tensors), dequantize=True)


def test_all_nvfp4_groups_wo_a(tmp_path, seed):
    tensors, _ = encode_all(make_master(seed), LAYOUTS["all_nvfp4"])
    wo_a = load(save(tmp_path, tensors)).blocks[0].attention.wo_a
    assert isinstance(wo_a, NvFp4Tensor) and wo_a.shape == (2, 32, 96) and wo_a.tensor_scale.shape == (2,)


def test_dequantizing_to_bf16_rounds_once_and_keeps_fp32_parameters(tmp_path, seed):
    tensors, values = encode_all(make_master(seed), LAYOUTS["all_nvfp4"])
    weights = load(save(tmp_path, tensors), dequantize=True, dtype=torch.bfloat16)
    wq_a = weights.blocks[0].attention.wq_a
    assert isinstance(wq_a, torch.Tensor)
    assert torch.equal(wq_a, values["layers.0.attn.wq_a.weight"].bfloat16())
    assert weights.hc_head.fn.dtype == torch.float32


def test_weights_outlive_the_files(tmp_path, seed):
    tensors, values = encode_all(make_master(seed), LAYOUTS["mixed"])
    weights = load(save(tmp_path, tensors))
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert_same(values_of(weights), values)


def test_codes_may_be_labelled_u8_i8_or_f4(tmp_path, seed):
    tensors, values = encode_all(make_master(seed), LAYOUTS["all_nvfp4"])
    for name in tensors:
        if name.endswith("w1.weight"):
            tensors[name] = tensors[name].view(torch.int8)
    save(tmp_path, tensors)
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, entry in header.items():
        if name.endswith("w2.weight"):
            entry["dtype"], entry["shape"] = "F4", [entry["shape"][0], entry["shape"][1] * 2]
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :])
    assert_same(values_of(load(tmp_path)), values)


@pytest.mark.parametrize("form", ["bf16", "mxfp4", "fp8"])
def test_transformers_names_and_fused_experts(tmp_path, seed, form):
    inner = 128 if form == "fp8" else checkpoints.INNER
    config = {**CONFIG, "moe_intermediate_size": inner}
    master = make_master(seed)
    if form == "fp8":
        for name, tensor in master.items():
            if re.search(r"(experts\.\d+|shared_experts)\.w[13]\.weight", name):
                master[name] = tensor.repeat(4, 1)
            elif re.search(r"(experts\.\d+|shared_experts)\.w2\.weight", name):
                master[name] = tensor.repeat(1, 4)
    per_expert, values = encode_all(master, lambda name: form if checkpoints.EXPERT.fullmatch(name) else "bf16")
    fused: Tensors = {}
    for name, tensor in per_expert.items():
        if ".experts." not in name:
            fused[f"model.{name}"] = tensor
    for prefix in sorted({name.split(".experts.")[0] for name in per_expert if ".experts." in name}):
        for leaf, suffix in (("weight", ""), ("scale", "_scale_inv")):
            if f"{prefix}.experts.0.w1.{leaf}" not in per_expert:
                continue
            parts = [
                [per_expert[f"{prefix}.experts.{expert}.{name}.{leaf}"] for expert in range(4)]
                for name in ("w1", "w3", "w2")
            ]
            as_bytes = [[part.view(torch.uint8) for part in projection] for projection in parts]
            gate_up = torch.stack([torch.cat([gate, up]) for gate, up in zip(as_bytes[0], as_bytes[1], strict=True)])
            dtype = parts[0][0].dtype
            layer = prefix.replace(".ffn", ".mlp")
            fused[f"model.{layer}.experts.gate_up_proj{suffix}"] = gate_up.view(dtype)
            fused[f"model.{layer}.experts.down_proj{suffix}"] = torch.stack(as_bytes[2]).view(dtype)
    weights = load(save(tmp_path, fused, config))
    assert_same(values_of(weights), values)


@pytest.mark.parametrize("layout", ["compressed", "compressed_nvfp4"])
def test_compressed_tensors_under_module_names(tmp_path, seed, layout):
    tensors, values = encode_all(make_master(seed), LAYOUTS[layout])
    module_names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        expert = re.fullmatch(r"(layers|mtp)\.(\d+)\.ffn\.experts\.(\d+)\.(w[123])\.(\w+)", name)
        if expert:
            part = module_names[expert[4]]
            name = f"{expert[1]}.{expert[2]}.mlp.experts.{expert[3]}.{part}.{expert[5]}"
        else:
            name = name.replace(".attn.wq_a.", ".self_attn.q_a_proj.").replace(".attn.wo_b.", ".self_attn.o_b_proj.")
        renamed[f"model.{name}"] = tensor
    config = {**CONFIG, "quantization_config": {"quant_method": "compressed-tensors", "format": "mixed-precision"}}
    assert_same(values_of(load(save(tmp_path, renamed, config))), values)


def test_a_reciprocal_is_turned_over_once(tmp_path, seed):
    tensors, values = encode_all(make_master(seed), LAYOUTS["compressed"])
    module = "layers.1.ffn.experts.2.w2"
    tensors[f"{module}.weight_global_scale"] = torch.tensor([512.0])
    tensors[f"{module}.input_global_scale"] = torch.tensor([64.0])
    weights = load(save(tmp_path, tensors))
    assert isinstance(weights.blocks[1].moe.w2, NvFp4Tensor)
    assert float(weights.blocks[1].moe.w2.tensor_scale[2]) == 1 / 512
    assert weights.input_scales[module] == 1 / 64
    codes, scales = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"]
    values[f"{module}.weight"] = e2m1.decode_packed(codes) * scales.float().repeat_interleave(16, 1) / 512
    assert_same(values_of(weights), values)


def test_mtp_may_be_absent(tmp_path, seed):
    master = make_master(seed, num_mtp=0)
    assert CONFIG["num_nextn_predict_layers"] == 1
    weights = load(save(tmp_path, master))
    assert weights.mtp == () and weights.unused_draft == ()


def test_two_mtp_stages(tmp_path, seed):
    tensors, values = encode_all(make_master(seed, num_mtp=2), LAYOUTS["official"])
    assert_same(values_of(load(save(tmp_path, tensors))), values)


def test_draft_copies_of_embedding_and_head_are_listed(tmp_path, seed):
    master = make_master(seed)
    master["mtp.0.embed.weight"] = master["embed.weight"].clone()
    master["mtp.0.head.weight"] = master["head.weight"].clone()
    weights = load(save(tmp_path, master))
    assert weights.unused_draft == ("mtp.0.embed.weight", "mtp.0.head.weight") and len(weights.mtp) == 1
    master["mtp.0.embed.weight"][3, 4] += 1
    assert "mtp.0.embed.weight: differs from embed.weight" in refusal(save(tmp_path, master))


@pytest.mark.parametrize("layout", ["official", "nvidia", "mixed"])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_dspark_draft(tmp_path, seed, layout, num_stages):
    master = checkpoints.make_dspark_master(seed, num_stages=num_stages)
    tensors, values = encode_all(master, LAYOUTS[layout])
    weights = load(save(tmp_path, tensors, checkpoints.DSPARK))
    assert weights.mtp == () and weights.unused_draft == () and weights.dspark is not None
    assert len(weights.dspark.stages) == num_stages
    assert_same(values_of(weights), values)


def test_dspark_draft_without_its_keys_is_listed_and_the_backbone_loads(tmp_path, seed):
    tensors, values = encode_all(checkpoints.make_dspark_master(seed), LAYOUTS["official"])
    weights = load(save(tmp_path, tensors))
    assert weights.mtp == () and weights.dspark is None
    assert weights.unused_draft == tuple(sorted(name for name in tensors if name.startswith("mtp.")))
    assert_same(values_of(weights), {name: value for name, value in values.items() if not name.startswith("mtp.")})


def test_a_dspark_draft_must_be_whole(tmp_path, seed):
    tensors, _ = encode_all(checkpoints.make_dspark_master(seed), LAYOUTS["official"])
    del tensors["mtp.1.ffn.experts.2.w2.scale"]
    tensors["mtp.2.markov_head.markov_w2.weight"] = torch.zeros(48, 7).bfloat16()
    message = refusal(save(tmp_path, tensors))
    assert "2 problems" in message
    assert "mtp.1.ffn.experts.2.w2.scale: missing, expected F8_E8M0 or U8 [160, 1]." in message
    assert "mtp.2.markov_head.markov_w2.weight: BF16 [48, 7], expected BF16 or F32 [48, 8]." in message


def test_dspark_keys_without_a_draft(tmp_path, seed):
    weights = load(save(tmp_path, make_master(seed, num_mtp=0), checkpoints.DSPARK))
    assert weights.mtp == () and weights.dspark is None and weights.unused_draft == ()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mtp.0.main_proj.weight", r"mtp.0.main_proj.weight: missing"),
        ("mtp.1.attn.wkv.weight", r"mtp.1.attn.wkv.weight: missing"),
        ("mtp.2.markov_head.markov_w2.weight", r"mtp.2.markov_head.markov_w2.weight: missing, expected .* \[48, 8\]"),
        ("mtp.2.confidence_head.proj.weight", r"mtp.2.confidence_head.proj.weight: missing, expected .* \[1, 168\]"),
    ],
)
def test_a_dspark_draft_with_a_hole_is_refused(tmp_path, seed, name, reason):
    master = checkpoints.make_dspark_master(seed)
    del master[name]
    assert re.search(reason, refusal(save(tmp_path, master, checkpoints.DSPARK)))


def test_classic_tensors_in_a_dspark_draft_are_refused(tmp_path, seed):
    master = checkpoints.make_dspark_master(seed)
    master["mtp.1.enorm.weight"] = torch.ones(160).bfloat16()
    assert "mtp.1.enorm.weight: " in refusal(save(tmp_path, master, checkpoints.DSPARK))


def test_norms_of_a_stripped_draft_are_listed(tmp_path, seed):
    master = make_master(seed, num_mtp=0)
    master["mtp.0.enorm.weight"] = torch.ones(160).bfloat16()
    weights = load(save(tmp_path, master))
    assert weights.mtp == () and weights.unused_draft == ("mtp.0.enorm.weight",)


# Equal to what transformers wrote.


TRANSFORMERS_NAMES = {native: module for native, _, module in NAMES}


def transformers_name(native: str, known: set[str]) -> str:
    """Return the state_dict name of a native one, from the table of spellings above."""
    numbers = re.match(r"layers\.(\d+)\.", native)
    for ours, theirs in TRANSFORMERS_NAMES.items():
        pattern = re.sub(r"layers\.\d+\.", r"layers.N.", ours)
        if numbers and pattern == re.sub(r"layers\.\d+\.", r"layers.N.", native):
            return re.sub(r"layers\.\d+\.", f"layers.{numbers[1]}.", theirs)
        if ours == native:
            return theirs
    name = f"model.{native}".replace(".attn.indexer.compressor.", ".self_attn.compressor.indexer.")
    for ours, theirs in (
        (".attn.", ".self_attn."),
        (".ffn.", ".mlp."),
        (".wkv.", ".kv_proj."),
        (".wgate.", ".gate_proj."),
        (".ape", ".position_bias"),
        ("compressor.norm", "compressor.kv_norm"),
        (".indexer.wq_b", ".compressor.indexer.q_b_proj"),
        (".shared_experts.w1", ".shared_experts.gate_proj"),
        (".shared_experts.w2", ".shared_experts.down_proj"),
    ):
        name = name.replace(ours, theirs)
    for block in ("attn", "ffn"):
        name = re.sub(rf"\.hc_{block}_(fn|base|scale)", rf".{block}_hc.\1", name)
    assert name in known, name
    return name


@pytest.fixture(scope="module")
def transformers_model():
    """A random model of transformers, fp32, with a compression ratio no released model has."""
    import transformers

    config = transformers.DeepseekV4Config(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=16,
        partial_rotary_factor=0.5,
        q_lora_rank=16,
        num_experts_per_tok=2,
        n_routed_experts=6,
        layer_types=["sliding_attention", "compressed_sparse_attention"]
        + ["heavily_compressed_attention", "compressed_sparse_attention"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        mlp_layer_types=["hash_moe", "hash_moe", "moe", "moe"],
        sliding_window=8,
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=16,
        index_head_dim=16,
        index_topk=3,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 64},
    )
    model = transformers.DeepseekV4ForCausalLM(config).eval().float()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):
                tensor.copy_(torch.randint(0, 6, tensor.shape, generator=generator))
            elif "inv_freq" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator).bfloat16())  # exact in both dtypes
    return model


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"save_original_format": False}),
        (torch.bfloat16, {"save_original_format": False}),
        (torch.float32, {"max_shard_size": "100KB"}),
    ],
    ids=["fp32", "bf16", "fp32-module-names", "bf16-module-names", "fp32-sharded"],
)
@pytest.mark.parametrize("dequantize", [True, False])
def test_save_pretrained_loads_equal(tmp_path, transformers_model, dtype, options, dequantize):
    model = transformers_model.to(dtype)
    model.save_pretrained(tmp_path, **options)
    state = model.state_dict()
    weights = load(tmp_path, dequantize=dequantize)
    if not dequantize:
        assert weights.embed.dtype == weights.blocks[0].attention.wo_a.dtype == dtype
    loaded = values_of(weights)
    seen = set()
    for name, tensor in loaded.items():
        expert = re.fullmatch(r"layers\.(\d+)\.ffn\.experts\.(\d+)\.(w[123])\.weight", name)
        if expert:
            fused = f"model.layers.{expert[1]}.mlp.experts." + ("down_proj" if expert[3] == "w2" else "gate_up_proj")
            half = {"w1": slice(0, 16), "w3": slice(16, 32), "w2": slice(None)}[expert[3]]
            source = state[fused][int(expert[2])][half]
            seen.add(fused)
        else:
            source = state[transformers_name(name, set(state))]
            seen.add(transformers_name(name, set(state)))
        assert torch.equal(tensor, source if source.dtype == torch.int64 else source.float()), name
    assert seen == set(state)


# Refusals.


def test_every_offender_is_listed_and_alike_ones_are_one_line(tmp_path, seed):
    tensors = bf16_checkpoint(tmp_path, seed)
    for name in [name for name in tensors if ".experts." in name]:
        del tensors[name]
    tensors["left.over"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as caught:
        load(save(tmp_path, tensors))
    message = str(caught.value)
    assert len(caught.value.problems) == 61  # 5 layers of 4 experts of 3 projections, and one unknown
    assert caught.value.rules == ("tensor-missing", "tensor-unknown")
    assert "2 problems" in message and message.count("\n  ") == 2
    assert "layers.0.ffn.experts.0.w1.weight: missing, expected [32, 160] in any format." in message
    assert "and 55 more)" in message


def change(name: str, value: torch.Tensor | None) -> Callable[[Tensors], None]:
    """Return an edit that sets or removes one tensor."""

    def edit(tensors: Tensors) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return edit


def poke(name: str, value: float, *, byte: bool = False) -> Callable[[Tensors], None]:
    """Return an edit that overwrites the last element of a tensor, or its last byte."""

    def edit(tensors: Tensors) -> None:
        flat = tensors[name].clone().reshape(-1)
        (flat.view(torch.uint8) if byte else flat)[-1] = value
        tensors[name] = flat.view(tensors[name].shape)

    return edit


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    """Return an edit that renames a tensor."""

    def edit(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return edit


def replace(old: str, new: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    """Return an edit that puts another tensor under another name in a tensor's place."""

    def edit(tensors: Tensors) -> None:
        del tensors[old]
        tensors[new] = value

    return edit


ATTENTION, EXPERT = "layers.1.attn.wq_a", "layers.1.ffn.experts.2.w2"
REFUSALS: list[tuple[str, str, Callable[[Tensors], None], str]] = [
    (
        "missing",
        "bf16",
        change("layers.1.attn.kv_norm.weight", None),
        "layers.1.attn.kv_norm.weight: missing, expected BF16 or F32 [48]. Download or export the checkpoint again.",
    ),
    (
        "missing linear",
        "official",
        change(f"{ATTENTION}.weight", None),
        f"{ATTENTION}.weight: missing, expected [64, 160] in any format. Download or export the checkpoint again.",
    ),
    (
        "missing draft tensor",
        "official",
        change("mtp.0.hnorm.weight", None),
        "mtp.0.hnorm.weight: missing, expected BF16 or F32 [160].",
    ),
    (
        "unknown",
        "bf16",
        change("layers.1.attn.wq_c.weight", torch.zeros(2, 3)),
        "layers.1.attn.wq_c.weight: unknown tensor F32 [2, 3]. Remove it from the checkpoint, or use the config.json",
    ),
    (
        "layer beyond the config",
        "bf16",
        change("layers.4.attn_norm.weight", torch.zeros(160)),
        "layers.4.attn_norm.weight: unknown tensor F32 [160].",
    ),
    (
        "expert beyond the config",
        "bf16",
        change("layers.1.ffn.experts.4.w1.weight", torch.zeros(32, 160)),
        "layers.1.ffn.experts.4.w1.weight: unknown tensor F32 [32, 160].",
    ),
    (
        "indexer in a layer without one",
        "bf16",
        change("layers.2.attn.indexer.weights_proj.weight", torch.zeros(16, 160)),
        "layers.2.attn.indexer.weights_proj.weight: unknown tensor F32 [16, 160].",
    ),
    (
        "bias in a hash layer",
        "bf16",
        change("layers.0.ffn.gate.bias", torch.zeros(4)),
        "layers.0.ffn.gate.bias: unknown tensor F32 [4]. layers.0.ffn.gate.weight is BF16, which has no such part.",
    ),
    (
        "misshapen",
        "bf16",
        change("layers.1.attn.compressor.ape", torch.zeros(4, 48)),
        "layers.1.attn.compressor.ape: F32 [4, 48], expected BF16 or F32 [4, 96].",
    ),
    (
        "transposed",
        "bf16",
        change(f"{ATTENTION}.weight", torch.zeros(160, 64)),
        f"{ATTENTION}.weight: F32 [160, 64], expected BF16 or F32 [64, 160]. It looks transposed.",
    ),
    (
        "half precision",
        "bf16",
        change("norm.weight", torch.zeros(160, dtype=torch.float16)),
        "norm.weight: F16 [160], expected BF16 or F32 [160].",
    ),
    (
        "quantized gate",
        "bf16",
        change("layers.1.ffn.gate.weight", torch.zeros(4, 80, dtype=torch.uint8)),
        "layers.1.ffn.gate.weight: U8 [4, 80], expected BF16 or F32 [4, 160].",
    ),
    (
        "stray scale",
        "bf16",
        change(f"{ATTENTION}.scale", torch.ones(1, 2)),
        f"{ATTENTION}.scale: unknown tensor F32 [1, 2]. {ATTENTION}.weight is BF16, which has no such part.",
    ),
    (
        "stray input scale",
        "official",
        change(f"{EXPERT}.input_scale", torch.tensor(1.0)),
        f"{EXPERT}.input_scale: unknown tensor F32 []. {EXPERT}.weight is I8, which has no such part.",
    ),
    (
        "FP8 without scales",
        "official",
        change(f"{ATTENTION}.scale", None),
        f"{ATTENTION}.scale: missing, expected F8_E8M0 or U8 or F32 [1, 2].",
    ),
    (
        "FP8 with scales of another block size",
        "official",
        change(f"{ATTENTION}.scale", torch.ones(1, 5)),
        f"{ATTENTION}.scale: F32 [1, 5], expected F8_E8M0 or U8 or F32 [1, 2].",
    ),
    (
        "FP8 per tensor",
        "official",
        replace(f"{ATTENTION}.scale", f"{ATTENTION}.weight_scale", torch.ones(1)),
        f"{ATTENTION}.weight_scale: F32 [1], expected F8_E8M0 or U8 or F32 or BF16 [1, 2]. FP8 weights must have one",
    ),
    (
        "FP4 without scales",
        "official",
        change(f"{EXPERT}.scale", None),
        f"{EXPERT}.scale: missing, expected F8_E8M0 or U8 [160, 1].",
    ),
    (
        "MXFP4 with fp32 scales",
        "official",
        change(f"{EXPERT}.scale", torch.ones(160, 1)),
        f"{EXPERT}.scale: F32 [160, 1], expected F8_E8M0 or U8 [160, 1].",
    ),
    (
        "NVFP4 without tensor scale",
        "all_nvfp4",
        change(f"{EXPERT}.weight_scale_2", None),
        f"{EXPERT}.weight_scale_2: missing, expected F32 [].",
    ),
    (
        "NVFP4 tensor scale of another shape",
        "all_nvfp4",
        change(f"{EXPERT}.weight_scale_2", torch.ones(160)),
        f"{EXPERT}.weight_scale_2: F32 [160], expected F32 [].",
    ),
    (
        "transposed block scales",
        "all_nvfp4",
        change(f"{EXPERT}.weight_scale", torch.ones(2, 160).to(torch.float8_e4m3fn)),
        f"{EXPERT}.weight_scale: F8_E4M3 [2, 160], expected F8_E4M3 [160, 2]. It looks transposed.",
    ),
    (
        "MXFP4-sized scales with a tensor scale",
        "all_nvfp4",
        change(f"{EXPERT}.weight_scale", torch.ones(160, 1).to(torch.float8_e4m3fn)),
        f"{EXPERT}.weight_scale: F8_E4M3 [160, 1], expected F8_E4M3 [160, 2].",
    ),
    (
        "two conventions of tensor scale",
        "all_nvfp4",
        rename(f"{EXPERT}.weight", f"{EXPERT}.weight_packed"),
        f"{EXPERT}.weight_scale_2: unknown tensor F32 []. {EXPERT}.weight_packed is U8, which has no such part.",
    ),
    (
        "compressed-tensors without tensor scale",
        "compressed",
        change(f"{EXPERT}.weight_global_scale", None),
        f"{EXPERT}.weight_global_scale: missing, expected F32 [].",
    ),
    (
        "reciprocal beside weights that have none",
        "all_nvfp4",
        change(f"{EXPERT}.weight_global_scale", torch.ones(1)),
        f"{EXPERT}.weight_global_scale: unknown tensor F32 [1]. It lies beside no packed weight.",
    ),
    (
        "codes twice",
        "compressed",
        change(f"{EXPERT}.weight", torch.zeros(160, 16, dtype=torch.uint8)),
        f"{EXPERT}.weight_packed: unknown tensor U8 [160, 16].",
    ),
    (
        "integer codes of compressed-tensors",
        "compressed",
        change(f"{EXPERT}.weight_packed", torch.zeros(160, 4, dtype=torch.int32)),
        f"{EXPERT}.weight_packed: dtype I32; readable are BF16, F32, F8_E4M3 with block scales and packed FP4. "
        "Integer weights of compressed-tensors are not readable.",
    ),
    (
        "zero reciprocal",
        "compressed",
        poke(f"{EXPERT}.weight_global_scale", 0.0),
        f"{EXPERT}.weight_global_scale: 0.0; a scale must be positive and finite.",
    ),
    (
        "reciprocal that has no reciprocal",
        "compressed",
        poke(f"{EXPERT}.input_global_scale", 1e-39),
        f"{EXPERT}.input_global_scale: 1.0000",
    ),
    (
        "FP8 with a scale per row",
        "compressed",
        change(f"{ATTENTION}.weight_scale", torch.ones(64, 1)),
        f"{ATTENTION}.weight_scale: F32 [64, 1], expected F8_E8M0 or U8 or F32 or BF16 [1, 2].",
    ),
    (
        "codes of an unreadable dtype",
        "bf16",
        change(f"{ATTENTION}.weight", torch.zeros(64, 160).to(torch.float8_e5m2)),
        f"{ATTENTION}.weight: dtype F8_E5M2; readable are BF16, F32, F8_E4M3 with block scales and packed FP4.",
    ),
    (
        "experts in formats that do not stack",
        "bf16",
        change(f"{EXPERT}.weight", torch.zeros(160, 32)),
        "layers.1.ffn.experts: experts of one layer must share a format: layers.1.ffn.experts.0.w1 is BF16, "
        f"{EXPERT} is F32.",
    ),
    (
        "two spellings of one tensor",
        "bf16",
        change("model.layers.1.attn.norm.weight", torch.zeros(48)),
        "model.layers.1.attn.norm.weight: the same tensor as layers.1.attn.kv_norm.weight",
    ),
    (
        "F7: NaN block scale",
        "all_nvfp4",
        poke(f"{EXPERT}.weight_scale", 0x7F, byte=True),
        f"{EXPERT}.weight_scale: a byte that is NaN or negative in E4M3, at [159, 1] (1 of 320 scales).",
    ),
    (
        "negative block scale",
        "all_nvfp4",
        poke(f"{EXPERT}.weight_scale", 0x81, byte=True),
        f"{EXPERT}.weight_scale: a byte that is NaN or negative in E4M3, at [159, 1]",
    ),
    (
        "NaN E8M0 scale of MXFP4",
        "official",
        poke(f"{EXPERT}.scale", 0xFF, byte=True),
        f"{EXPERT}.scale: byte 255, which is NaN in E8M0, at [159, 0] (1 of 160 scales).",
    ),
    (
        "NaN E8M0 scale of FP8",
        "official",
        poke(f"{ATTENTION}.scale", 0xFF, byte=True),
        f"{ATTENTION}.scale: byte 255, which is NaN in E8M0, at [0, 1]",
    ),
    (
        "infinite FP8 scale",
        "base",
        poke(f"{ATTENTION}.scale", math.inf),
        f"{ATTENTION}.scale: not finite or negative, at [0, 1]",
    ),
    ("zero tensor scale", "all_nvfp4", poke(f"{EXPERT}.weight_scale_2", 0.0), f"{EXPERT}.weight_scale_2: 0.0; a scale"),
    (
        "NaN tensor scale",
        "all_nvfp4",
        poke(f"{EXPERT}.weight_scale_2", math.nan),
        f"{EXPERT}.weight_scale_2: nan; a scale must be positive and finite.",
    ),
    (
        "negative input scale",
        "all_nvfp4",
        poke(f"{EXPERT}.input_scale", -1.0),
        f"{EXPERT}.input_scale: -1.0; a scale must be positive and finite.",
    ),
    (
        "infinite input scale",
        "all_nvfp4",
        poke(f"{EXPERT}.input_scale", math.inf),
        f"{EXPERT}.input_scale: inf; a scale must be positive and finite.",
    ),
    ("NaN weight", "bf16", poke("head.weight", math.nan), "head.weight: holds NaN or infinity."),
    ("infinite linear", "bf16", poke(f"{ATTENTION}.weight", math.inf), f"{ATTENTION}.weight: holds NaN or infinity."),
    ("NaN expert", "bf16", poke(f"{EXPERT}.weight", math.nan), f"{EXPERT}.weight: holds NaN or infinity."),
    ("NaN FP8 code", "official", poke(f"{ATTENTION}.weight", 0xFF, byte=True), f"{ATTENTION}.weight: holds NaN or"),
    ("NaN FP8 expert", "base", poke(f"{EXPERT}.weight", 0x7F, byte=True), f"{EXPERT}.weight: holds NaN or infinity."),
    (
        "expert table too large",
        "bf16",
        poke("layers.0.ffn.gate.tid2eid", 4),
        "layers.0.ffn.gate.tid2eid: expert 4 at [47, 1] (1 such entries); experts are 0 to 3.",
    ),
    (
        "expert table negative",
        "bf16",
        poke("layers.0.ffn.gate.tid2eid", -1),
        "layers.0.ffn.gate.tid2eid: expert -1 at [47, 1]",
    ),
    (
        "expert table of floats",
        "bf16",
        change("layers.0.ffn.gate.tid2eid", torch.zeros(48, 2)),
        "layers.0.ffn.gate.tid2eid: F32 [48, 2], expected I64 or I32 [48, 2].",
    ),
    (
        "vision variant",
        "bf16",
        change("layers.1.ffn.gate.bias_vl", torch.zeros(4)),
        "layers.1.ffn.gate.bias_vl: unknown tensor F32 [4]. This belongs to the vision variant",
    ),
]


@pytest.mark.parametrize(("layout", "edit", "message"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_refusals(tmp_path, seed, layout, edit, message):
    tensors, _ = encode_all(make_master(seed), LAYOUTS[layout])
    save(tmp_path, tensors)
    load(tmp_path)
    edit(tensors)
    assert message in refusal(save(tmp_path, tensors))


def test_damage_is_refused_when_dequantizing_too(tmp_path, seed):
    for layout, name, byte in (("official", f"{ATTENTION}.weight", 0x7F), ("official", f"{EXPERT}.scale", 0xFF)):
        tensors, _ = encode_all(make_master(seed), LAYOUTS[layout])
        poke(name, byte, byte=True)(tensors)
        assert f"{name}: " in refusal(save(tmp_path, tensors), dequantize=True)


def test_an_i32_expert_table_is_accepted(tmp_path, seed):
    master = make_master(seed)
    table = master["layers.0.ffn.gate.tid2eid"]
    master["layers.0.ffn.gate.tid2eid"] = table.to(torch.int32)
    loaded = load(save(tmp_path, master)).blocks[0].moe.expert_table
    assert loaded is not None and loaded.dtype == torch.int64 and torch.equal(loaded, table)


def test_mxfp4_that_nvfp4_cannot_hold_is_refused_and_loads_dequantized(tmp_path, seed):
    tensors, values = encode_all(make_master(seed), LAYOUTS["official"])
    scales = tensors[f"{EXPERT}.scale"].view(torch.uint8)
    codes = tensors[f"{EXPERT}.weight"].view(torch.uint8)
    codes[0, 0] |= 1
    scales[0, 0], scales[1, 0] = 100, 118  # 18 octaves apart
    codes[1, 0] |= 1
    tensors[f"{EXPERT}.scale"] = scales.view(torch.float8_e8m0fnu)
    message = refusal(save(tmp_path, tensors))
    assert f"{EXPERT}.weight: MXFP4 block [0, 0] has no equal in NVFP4" in message
    assert "recipe 'exact'" in message
    loaded = values_of(load(tmp_path, dequantize=True))
    expected = MxFp4Tensor(codes, scales.view(torch.float8_e8m0fnu))
    values[f"{EXPERT}.weight"] = e2m1.decode_packed(expected.codes) * (scales.float() - 127).exp2().repeat_interleave(
        32, 1
    )
    assert_same(loaded, values)


def test_fused_experts_of_another_number_are_refused_once(tmp_path, seed):
    tensors = bf16_checkpoint(tmp_path, seed)
    for name in [name for name in tensors if name.startswith("layers.1.ffn.experts.")]:
        del tensors[name]
    tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.zeros(3, 64, 160)
    tensors["model.layers.1.mlp.experts.down_proj"] = torch.zeros(4, 160, 32)
    message = refusal(save(tmp_path, tensors))
    assert message.endswith(
        "model.layers.1.mlp.experts.gate_up_proj: F32 [3, 64, 160], expected BF16 or F32 [4, 64, 160]. "
        "Download or export the checkpoint again."
    )


def test_dtype_is_checked(tmp_path, seed):
    save(tmp_path, make_master(seed))
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 or torch.bfloat16; got torch.float16"):
        load(tmp_path, dequantize=True, dtype=torch.float16)


# Faults others shipped: each check passes, and fails once the fault is put in.


def check_f2(directory: pathlib.Path, seed: int) -> None:
    """F2: w1 and w3 with different tensor scales each keep their own."""
    tensors, values = encode_all(make_master(seed), LAYOUTS["all_nvfp4"])
    scale = "weight_scale_2"
    assert tensors[f"layers.1.ffn.experts.0.w1.{scale}"] != tensors[f"layers.1.ffn.experts.0.w3.{scale}"]
    assert_same(values_of(load(save(directory, tensors))), values)


def inject_f2(monkeypatch: pytest.MonkeyPatch) -> None:
    original = StoredTensors.nvfp4

    def one_scale_for_both(self: StoredTensors, module: str) -> NvFp4Tensor:
        weight = original(self, module)
        if not module.endswith(".w3"):
            return weight
        partner = self.read(f"{module.removesuffix('.w3')}.w1.weight_scale_2").reshape(())
        return NvFp4Tensor(weight.codes, weight.scales, partner)

    monkeypatch.setattr(StoredTensors, "nvfp4", one_scale_for_both)


def check_f5(directory: pathlib.Path, seed: int) -> None:
    """F5: a square weight is read along K, and one packed along N is refused."""
    tensors, values = encode_all(make_master(seed), LAYOUTS["all_nvfp4"])
    assert_same(values_of(load(save(directory, tensors))), values)
    codes = e2m1.unpack(tensors["mtp.0.e_proj.weight"])
    tensors["mtp.0.e_proj.weight"] = e2m1.pack(codes.T.contiguous()).T.contiguous()  # [N/2, K]
    assert "mtp.0.e_proj.weight: U8 [80, 160], expected U8 or I8 or F4 [160, 80]. It looks transposed." in refusal(
        save(directory, tensors)
    )


def inject_f5(monkeypatch: pytest.MonkeyPatch) -> None:
    original = StoredTensors.nvfp4

    def read_n_major(self: StoredTensors, module: str) -> NvFp4Tensor:
        weight = original(self, module)
        num_rows, num_columns = weight.shape
        if num_rows != num_columns:
            return weight
        codes = e2m1.pack(e2m1.unpack(weight.codes).T.contiguous())
        return NvFp4Tensor(codes, weight.scales, weight.tensor_scale)

    monkeypatch.setattr(StoredTensors, "nvfp4", read_n_major)


def check_f11(directory: pathlib.Path, seed: int) -> None:
    """F11: wo_a in BF16 or FP8 and a BF16 gate beside NVFP4 everywhere else."""
    forms = {"layers.0.attn.wo_a.weight": "bf16", "layers.1.attn.wo_a.weight": "fp8"}
    tensors, values = encode_all(make_master(seed), lambda name: forms.get(name, "nvfp4"))
    weights = load(save(directory, tensors))
    assert_same(values_of(weights), values)
    assert isinstance(weights.blocks[0].attention.wo_a, torch.Tensor)
    assert isinstance(weights.blocks[1].attention.wo_a, Fp8BlockTensor)
    assert isinstance(weights.blocks[2].attention.wo_a, NvFp4Tensor)


def inject_f11(monkeypatch: pytest.MonkeyPatch) -> None:
    original = StoredTensors.detect

    def assume_nvfp4(self: StoredTensors, module: str, shape: tuple[int, int]) -> Format | None:
        if not module.endswith(".wo_a"):
            return original(self, module, shape)
        self.expect(f"{module}.weight", ("U8",), (shape[0], shape[1] // 2))
        self.expect(f"{module}.weight_scale", ("F8_E4M3",), (shape[0], shape[1] // 16))
        self.expect(f"{module}.weight_scale_2", ("F32",), ())
        self.claim(f"{module}.input_scale")
        return Format.NVFP4

    monkeypatch.setattr(StoredTensors, "detect", assume_nvfp4)


def check_f14(directory: pathlib.Path, seed: int) -> None:
    """F14: nothing is dropped because its name was not expected."""
    tensors = bf16_checkpoint(directory, seed)
    tensors["layers.1.attn.wq_a.bias"] = torch.zeros(64)
    assert "layers.1.attn.wq_a.bias: unknown tensor F32 [64]." in refusal(save(directory, tensors))


def inject_f14(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoredTensors, "refuse_unclaimed", lambda self: None)


def check_f16(directory: pathlib.Path, seed: int) -> None:
    """F16: MXFP4 draft experts beside NVFP4 backbone experts, under a config that calls all of it NVFP4."""
    tensors, values = encode_all(make_master(seed), LAYOUTS["nvidia"])
    quantization = {"quant_method": "fp8", "moe_quant_algo": "NVFP4", "group_size": 16}
    config = {**CONFIG, "quantization_config": quantization, "expert_dtype": "fp4"}
    assert_same(values_of(load(save(directory, tensors, config))), values)


def inject_f16(monkeypatch: pytest.MonkeyPatch) -> None:
    original = StoredTensors.detect

    def global_flag(self: StoredTensors, module: str, shape: tuple[int, int]) -> Format | None:
        found = original(self, module, shape)
        is_nvfp4 = any(name.endswith(".weight_scale_2") for name in self.names)
        return Format.NVFP4 if found is Format.MXFP4 and is_nvfp4 else found

    def mxfp4_bytes_as_nvfp4(self: StoredTensors, module: str) -> NvFp4Tensor:
        if f"{module}.weight_scale_2" in self:
            return original_nvfp4(self, module)
        scales = self.read(f"{module}.scale").view(torch.uint8).clamp(max=0x7E).repeat_interleave(2, -1)
        return NvFp4Tensor(
            self.read(f"{module}.weight").view(torch.uint8), scales.view(torch.float8_e4m3fn), torch.tensor(1.0)
        )

    original_nvfp4 = StoredTensors.nvfp4
    monkeypatch.setattr(StoredTensors, "detect", global_flag)
    monkeypatch.setattr(StoredTensors, "check_scales", lambda self, module, found: None)
    monkeypatch.setattr(StoredTensors, "nvfp4", mxfp4_bytes_as_nvfp4)


def check_f17(directory: pathlib.Path, seed: int) -> None:
    """F17: the latent's norm under the name a re-save gives it; the draft's own norm is not confused with it."""
    tensors, values = encode_all(make_master(seed), LAYOUTS["bf16"])
    for name in [name for name in tensors if name.endswith("attn.kv_norm.weight")]:
        tensors[name.replace("kv_norm", "norm")] = tensors.pop(name)
    assert_same(values_of(load(save(directory, tensors))), values)


def inject_f17(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(names._MODULES, "attn.norm")


def check_f20(directory: pathlib.Path, seed: int) -> None:
    """F20: E8M0 scales stored as bytes are reinterpreted."""
    tensors, values = encode_all(make_master(seed), lambda name: "mxfp4_u8")
    assert_same(values_of(load(save(directory, tensors), dequantize=True)), values)


def inject_f20(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "e8m0_from_bytes", lambda data: data.float().to(torch.float8_e8m0fnu))


FAULTS: dict[str, tuple[Callable[[pathlib.Path, int], None], Callable[[pytest.MonkeyPatch], None]]] = {
    "F2": (check_f2, inject_f2),
    "F5": (check_f5, inject_f5),
    "F11": (check_f11, inject_f11),
    "F14": (check_f14, inject_f14),
    "F16": (check_f16, inject_f16),
    "F17": (check_f17, inject_f17),
    "F20": (check_f20, inject_f20),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_absent(tmp_path, seed, fault):
    FAULTS[fault][0](tmp_path, seed)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_would_be_found(tmp_path, seed, fault, monkeypatch):
    check, inject = FAULTS[fault]
    inject(monkeypatch)
    with pytest.raises((AssertionError, CheckpointError, pytest.fail.Exception)):
        check(tmp_path, seed)


def test_f15_near_zero_input_scales_are_kept_as_stored(tmp_path, seed):
    tensors, values = encode_all(make_master(seed), LAYOUTS["all_nvfp4"])
    tensors[f"{EXPERT}.input_scale"] = torch.tensor(1e-30)
    weights = load(save(tmp_path, tensors))
    assert weights.input_scales[EXPERT] == pytest.approx(1e-30)
    assert_same(values_of(weights), values)
    assert bool(torch.isfinite(nvfp4.dequantize(weights.blocks[1].moe.w2)).all())
