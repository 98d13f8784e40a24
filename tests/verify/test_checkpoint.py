# SPDX-License-Identifier: Apache-2.0
"""Inspecting checkpoints: clean layouts raise no alarm, every injected fault is found by its rule and named.

Rows C1, C3, C7, C11, C12, C13, C14 and C16 of docs/faults.md.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import struct
import time
from collections.abc import Callable

import pytest

from megamoe.checkpoint.headers import INDEX_NAME
from megamoe.checkpoint.problem import CheckpointError
from megamoe.cli import main
from megamoe.models import BUNDLED
from megamoe.models.deepseek_v4 import samples
from megamoe.models.deepseek_v4.rules import RULES, Finding
from megamoe.verify.checkpoint import Verdict, inspect_checkpoint

from ..fake_files import Files, fake

E4M3_SCALES, EXPERT = "layers.2.ffn.experts.1.w2.weight_scale", "layers.2.ffn.experts.1.w2"
WQ_A = "layers.2.attn.wq_a"


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Every layout of the small model, written once."""
    root = tmp_path_factory.mktemp("layouts")
    return {layout: fake.write_fake(root / layout, "small", layout) for layout in fake.LAYOUTS}


# Clean layouts.


RELEASES = {
    "preview": "as the preview",
    "base": "Base (FP8 experts, fp32 scales)",
    "dspark": "as the 0731 and 0813 releases (DSpark)",
    "nvidia": "NVFP4 experts in NVIDIA's layout",
    "nvidia-old": "NVFP4 experts in NVIDIA's layout",
    "nvidia-dspark": "NVFP4 experts in NVIDIA's layout, DSpark draft",
    "compressed-tensors": "converted by compressed-tensors",
    "resave": "re-saved by transformers 5.24.0",
    "resave-modules": "re-saved by transformers 5.24.0",
    "nvfp4": "every linear in NVFP4 (megamoe)",
    "bf16": "unquantized",
}


@pytest.mark.parametrize("layout", fake.LAYOUTS)
def test_clean_layouts_raise_no_alarm(layouts, layout):
    found = inspect_checkpoint(layouts[layout])
    assert found.findings == () and found.verdict is Verdict.GOOD
    assert found.release == f"a DeepSeek-V4 of another size, {RELEASES[layout]}"
    assert found.num_tensors == found.expected_tensors and found.num_bytes == found.expected_bytes
    assert "not in the inventory" not in found.groups
    assert sum(group.num_bytes for group in found.groups.values()) == found.num_bytes
    assert found.weights is not None and found.weights.total == found.num_bytes


def test_the_bundled_model_raises_no_alarm():
    found = inspect_checkpoint(BUNDLED["tiny"])
    assert found.verdict is Verdict.GOOD and found.findings == ()
    assert found.release.endswith("every linear in NVFP4 (megamoe)")


def test_a_rewritten_checkpoint_raises_no_alarm(layouts, tmp_path):
    for layout in fake.LAYOUTS:  # so that what the faults below find is theirs, not of the writing
        found = inspect_checkpoint(Files.read(layouts[layout]).write(tmp_path / layout))
        assert found.findings == (), layout


@pytest.mark.parametrize(
    ("layout", "options", "release"),
    [
        ("preview", [""], "NVFP4 experts in NVIDIA's layout"),
        ("dspark", [""], "NVFP4 experts in NVIDIA's layout, DSpark draft"),
        ("preview", ["--attention nvfp4 --draft convert"], "every linear in NVFP4 (megamoe)"),
        ("preview", ["--attention nvfp4"], "every linear in NVFP4 (megamoe)"),
        ("preview", ["", "--to mxfp4"], "as the preview"),
        ("preview", ["", "--to fp8"], "experts converted to FP8"),
        ("base", ["--experts requantize"], "NVFP4 experts in NVIDIA's layout"),
    ],
    ids=str,
)
def test_what_convert_writes_raises_no_alarm(layouts, tmp_path, capsys, layout, options, release):
    directory = layouts[layout]
    for number, words in enumerate(options):
        target = tmp_path / str(number)
        assert main(["convert", str(directory), str(target), *words.split()]) == 0
        directory = target
    found = inspect_checkpoint(directory)
    assert found.findings == (), [(one.rule, one.text) for one in found.findings]
    assert found.release.endswith(release) and found.num_tensors == found.expected_tensors


@pytest.mark.parametrize("layout", ["resave", "resave-modules"])
def test_a_re_save_of_transformers_itself_raises_no_alarm(tmp_path, layout):
    transformers = pytest.importorskip("transformers")
    raw = fake.config_of("small", "resave")
    names = set(transformers.DeepseekV4Config().to_dict()) | {"rope_theta"}
    config = transformers.DeepseekV4Config(**{key: raw[key] for key in raw if key in names and key != "architectures"})
    model = transformers.DeepseekV4ForCausalLM(config)
    model.save_pretrained(tmp_path, save_original_format=layout == "resave")
    found = inspect_checkpoint(tmp_path)
    assert found.findings == () and "re-saved by transformers 5.24" in found.release
    assert found.num_tensors == found.expected_tensors


def test_notes_of_clean_layouts(layouts):
    notes = {layout: [note.rule for note in inspect_checkpoint(layouts[layout]).notes] for layout in fake.LAYOUTS}
    assert notes["nvidia"] == ["index-total-size"] and notes["preview"] == []
    assert notes["resave"] == ["kv-norm-renamed"] and notes["resave-modules"] == []


def test_what_drafts_are_called(layouts):
    drafts = {layout: inspect_checkpoint(layouts[layout]).draft for layout in ("preview", "dspark", "resave")}
    assert drafts["preview"] == "classic MTP, 1 stage" and drafts["dspark"].startswith("DSpark, 3 stages")
    assert drafts["resave"] == "none (config.json claims 1)"


# Faults: (id, layout, injection, rule, a subject, words of the message).


def drop(*names: str) -> Callable[[Files], None]:
    """Remove tensors."""

    def inject(files: Files) -> None:
        for name in names:
            del files.tensors[name]

    return inject


def rename(old: str, new: str) -> Callable[[Files], None]:
    """Rename tensors whose name ends so."""

    def inject(files: Files) -> None:
        members = [name for name in files.tensors if name.endswith(old)]
        assert members
        for name in members:
            files.tensors[name.removesuffix(old) + new] = files.tensors.pop(name)

    return inject


def reshape(name: str, shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Callable[[Files], None]:
    """Give a tensor another shape of as many elements."""

    def inject(files: Files) -> None:
        raw = files.tensors[name]
        files.put(name, raw.dtype, shape(raw.shape), raw.content)

    return inject


def set_float(name: str, value: float) -> Callable[[Files], None]:
    """Set a scalar."""
    return lambda files: files.put_float(name, value)


def set_all(suffix: str, value: float) -> Callable[[Files], None]:
    """Set all scalars of a kind."""

    def inject(files: Files) -> None:
        for name in files.tensors:
            if name.endswith(suffix):
                files.put_float(name, value)

    return inject


def poke(name: str, offset: int, content: bytes) -> Callable[[Files], None]:
    """Overwrite bytes."""
    return lambda files: files.poke(name, offset, content)


def configure(**fields: object) -> Callable[[Files], None]:
    """Change fields of config.json; None removes one."""

    def inject(files: Files) -> None:
        for name, value in fields.items():
            if value is None:
                del files.config[name]
            else:
                files.config[name] = value

    return inject


def declare(**fields: object) -> Callable[[Files], None]:
    """Change fields of quantization_config (and of hf_quant_config.json, where it has them); None removes one."""

    def inject(files: Files) -> None:
        for content in (files.config["quantization_config"], files.quant["quantization"] if files.quant else {}):
            for name, value in fields.items():
                name = name if name in content or name != "ignore" else "exclude_modules"
                if value is None:
                    content.pop(name, None)
                elif name in content:
                    content[name] = value

    return inject


def cast_e8m0(files: Files) -> None:
    """F20: a byte b is taken as the number b and stored as the power of two next to it."""
    for name, raw in files.tensors.items():
        if raw.dtype == "F8_E8M0" and name.startswith("layers.2.ffn.experts.1."):
            raw.content = bytes(127 + max(byte, 1).bit_length() - 1 for byte in raw.content)


def cast_e8m0_to_zero(files: Files) -> None:
    """F20 the other way: small powers of two cast to integers are all zero."""
    raw = files.tensors[f"{EXPERT}.scale"]
    files.put(f"{EXPERT}.scale", "U8", raw.shape)


def cast_e8m0_to_float(files: Files) -> None:
    """F20: bytes converted to fp32 as numbers."""
    raw = files.tensors[f"{WQ_A}.scale"]
    numbers = [float(byte) for byte in raw.content]
    files.put(f"{WQ_A}.scale", "F32", raw.shape, struct.pack(f"<{len(numbers)}f", *numbers))


def mxfp4_as_nvfp4(files: Files) -> None:
    """F16: one backbone expert left in MXFP4 where everything says NVFP4."""
    for leaf in ("weight_scale", "weight_scale_2", "input_scale"):
        del files.tensors[f"{EXPERT}.{leaf}"]
    rows, packed = files.tensors[f"{EXPERT}.weight"].shape
    files.put(f"{EXPERT}.scale", "F8_E8M0", (rows, packed // 16), bytes([115]) * (rows * packed // 16))


def drop_layer(files: Files) -> None:
    """The last layer is missing."""
    for name in [name for name in files.tensors if name.startswith("layers.4.")]:
        del files.tensors[name]


def drop_experts(files: Files) -> None:
    """The last expert of every layer is missing."""
    for name in [name for name in files.tensors if ".experts.3." in name]:
        del files.tensors[name]


def drop_compressor(files: Files) -> None:
    """One layer's compressor is missing altogether."""
    for name in [name for name in files.tensors if name.startswith("layers.3.attn.compressor.")]:
        del files.tensors[name]


def per_tensor_fp8(files: Files) -> None:
    """FP8 with one scale for the whole weight."""
    del files.tensors[f"{WQ_A}.scale"]
    files.put(f"{WQ_A}.weight_scale", "F32", (1,), struct.pack("<f", 0.01))


def pack_along_n(files: Files) -> None:
    """F5: codes of two rows in a byte."""
    raw = files.tensors[f"{EXPERT}.weight"]
    rows, packed = raw.shape
    files.put(f"{EXPERT}.weight", raw.dtype, (rows // 2, packed * 2), raw.content)


def copy_under_another_name(files: Files) -> None:
    """The same native tensor twice."""
    raw = files.tensors[f"{WQ_A}.weight"]
    files.put(f"model.{WQ_A}.weight", raw.dtype, raw.shape, raw.content)


def zero(name: str, pattern: bytes = b"\0") -> Callable[[Files], None]:
    """A tensor whose bytes never came."""

    def inject(files: Files) -> None:
        raw = files.tensors[name]
        raw.content = (pattern * len(raw.content))[: len(raw.content)]

    return inject


FUSED = "model.layers.2.mlp.experts.down_proj"


def zero_fused(files: Files) -> None:
    """The last expert of a tensor that holds all of them."""
    raw = files.tensors[FUSED]
    raw.content = raw.content[: len(raw.content) // 4 * 3] + bytes(len(raw.content) // 4)


def nan_over_zeros(files: Files) -> None:
    """What ModelOpt and torchao write for a matrix of zeros: 0 / 0."""
    zero(f"{EXPERT}.weight")(files)
    files.tensors[E4M3_SCALES].content = bytes([0x7F]) * len(files.tensors[E4M3_SCALES].content)


def nan_over_zeros_e8m0(files: Files) -> None:
    """The same in MXFP4."""
    zero(f"{EXPERT}.weight")(files)
    files.tensors[f"{EXPERT}.scale"].content = bytes([0xFF]) * len(files.tensors[f"{EXPERT}.scale"].content)


def zero_with_its_scale(files: Files) -> None:
    """A matrix of zeros whose amax was taken for its scale."""
    zero(f"{EXPERT}.weight")(files)
    files.put_float(f"{EXPERT}.weight_scale_2", 0.0)


FALLBACK = ["heavily_compressed_attention"] * 3 + ["compressed_sparse_attention", "heavily_compressed_attention"]
NAN_SCALES = b"\x7f"

FAULTS: list[tuple[str, str, Callable[[Files], None], str, str, str]] = [
    (
        "F2",
        "nvidia",
        set_float("layers.2.ffn.experts.1.w3.weight_scale_2", 0.001),
        "gate-up-scales-differ",
        "layers.2.ffn.experts.1.w1.weight_scale_2",
        "0.000244140625, but layers.2.ffn.experts.1.w3.weight_scale_2 is 0.001",
    ),
    (
        "F2 of compressed-tensors",
        "compressed-tensors",
        set_float("model.layers.2.mlp.experts.1.up_proj.weight_global_scale", 1000.0),
        "gate-up-scales-differ",
        "model.layers.2.mlp.experts.1.gate_proj.weight_global_scale",
        "4096, but",
    ),
    (
        "F3",
        "nvidia",
        set_all(".input_scale", 268.8),
        "input-scale-reciprocal",
        f"{EXPERT}.input_scale",
        "268.8 stands for activations up to",
    ),
    (
        "F3 of one weight",
        "nvfp4",
        set_float(f"{WQ_A}.input_scale", 100.0),
        "input-scale-reciprocal",
        f"{WQ_A}.input_scale",
        "a input_scale is below 1",
    ),
    (
        "F3 of compressed-tensors",
        "compressed-tensors",
        set_all(".input_global_scale", 0.01),
        "input-scale-reciprocal",
        "model.layers.2.mlp.experts.1.down_proj.input_global_scale",
        "a input_global_scale is above 1",
    ),
    (
        "F3 of weights",
        "nvidia",
        set_all(".weight_scale_2", 4096.0),
        "tensor-scale-reciprocal",
        f"{EXPERT}.weight_scale_2",
        "It looks like the reciprocal.",
    ),
    (
        "F4",
        "nvidia",
        reshape(E4M3_SCALES, lambda shape: shape[::-1]),
        "scales-transposed",
        E4M3_SCALES,
        "F8_E4M3 [8, 256], expected F8_E4M3 [256, 8].",
    ),
    (
        "F4 of MXFP4",
        "preview",
        reshape(f"{EXPERT}.scale", lambda shape: shape[::-1]),
        "scales-transposed",
        f"{EXPERT}.scale",
        "F8_E8M0 [4, 256], expected F8_E8M0 or U8 [256, 4].",
    ),
    (
        "F4 of FP8",
        "preview",
        reshape(f"{WQ_A}.scale", lambda shape: shape[::-1]),
        "scales-transposed",
        f"{WQ_A}.scale",
        "F8_E8M0 [2, 1], expected F8_E8M0 or U8 or F32 [1, 2].",
    ),
    (
        "F5",
        "nvidia",
        reshape(f"{EXPERT}.weight", lambda shape: shape[::-1]),
        "codes-orientation",
        f"{EXPERT}.weight",
        "U8 [64, 256], expected U8 or I8 or F4 [256, 64].",
    ),
    ("F5 packed along N", "preview", pack_along_n, "codes-orientation", f"{EXPERT}.weight", "I8 [128, 128], expected"),
    (
        "F5 of a plain weight",
        "bf16",
        reshape(f"{WQ_A}.weight", lambda shape: shape[::-1]),
        "tensor-transposed",
        f"{WQ_A}.weight",
        "BF16 [256, 128], expected BF16 or F32 [128, 256].",
    ),
    ("F7", "nvidia", poke(E4M3_SCALES, 1000, NAN_SCALES), "scale-nan", E4M3_SCALES, "byte 0x7f, NaN or negative"),
    ("F7 negative", "nvfp4", poke(E4M3_SCALES, 0, b"\x80"), "scale-nan", E4M3_SCALES, "byte 0x80, NaN or negative"),
    ("F7 of MXFP4", "preview", poke(f"{EXPERT}.scale", 1023, b"\xff"), "scale-nan", f"{EXPERT}.scale", "NaN in E8M0"),
    (
        "F7 of Base",
        "base",
        poke(f"{EXPERT}.scale", 0, struct.pack("<f", float("nan"))),
        "scale-nan",
        f"{EXPERT}.scale",
        "nan, not finite or negative",
    ),
    (
        "F14",
        "preview",
        drop("layers.2.attn.kv_norm.weight", "layers.2.ffn.gate.bias", "layers.3.attn.attn_sink"),
        "tensor-missing",
        "layers.2.ffn.gate.bias",
        "missing, expected",
    ),
    (
        "F14 in the draft",
        "dspark",
        drop("mtp.2.markov_head.markov_w2.weight"),
        "tensor-missing",
        "mtp.2.markov_head.markov_w2.weight",
        "missing, expected BF16 or F32 [160, 16].",
    ),
    (
        "F14 of one indexer",
        "preview",
        drop(
            *(
                f"layers.4.attn.indexer.{name}"
                for name in (
                    "wq_b.weight",
                    "wq_b.scale",
                    "weights_proj.weight",
                    "compressor.ape",
                    "compressor.norm.weight",
                    "compressor.wkv.weight",
                    "compressor.wgate.weight",
                )
            )
        ),  # fmt: skip
        "tensor-missing",
        "layers.4.attn.indexer.compressor.ape",
        "missing, expected",
    ),
    (
        "F14 of an expert",
        "nvidia",
        drop(f"{EXPERT}.weight", f"{EXPERT}.weight_scale", f"{EXPERT}.weight_scale_2", f"{EXPERT}.input_scale"),
        "tensor-missing",
        f"{EXPERT}.weight",
        "missing, expected [256, 128] in any format.",
    ),
    (
        "F15",
        "nvidia",
        set_float(f"{EXPERT}.input_scale", 3.7e-16),
        "input-scale-near-zero",
        f"{EXPERT}.input_scale",
        "3.7e-16 stands for activations below",
    ),
    (
        "F15 of compressed-tensors",
        "compressed-tensors",
        set_float("model.layers.2.mlp.experts.1.down_proj.input_global_scale", 2.7e15),
        "input-scale-near-zero",
        "model.layers.2.mlp.experts.1.down_proj.input_global_scale",
        "calibration has not reached this weight",
    ),
    ("zero scale", "nvidia", set_float(f"{EXPERT}.input_scale", 0.0), "scalar-invalid", f"{EXPERT}.input_scale", "0.0"),
    (
        "infinite scale",
        "nvidia",
        set_float(f"{EXPERT}.weight_scale_2", float("inf")),
        "scalar-invalid",
        f"{EXPERT}.weight_scale_2",
        "inf; a scale must be positive and finite.",
    ),
    (
        "F16 global flag over a draft in MXFP4",
        "nvidia",
        declare(quantized_layers=None, ignore=["*.attn.*", "*.ffn.shared_experts.*", "head"]),
        "config-format",
        "mtp.0.ffn.experts.0.w1",
        "mxfp4, but quantization_config (global NVFP4, no quantized_layers) declares it NVFP4.",
    ),
    ("F16 one expert", "nvidia", mxfp4_as_nvfp4, "config-format", EXPERT, "mxfp4, but quantization_config.quantized"),
    ("F16 within a layer", "nvidia", mxfp4_as_nvfp4, "experts-mixed", "layers.2.ffn.experts", "must share a format"),
    (
        "F16 quantized_layers says too much",
        "nvidia",
        lambda files: files.config["quantization_config"]["quantized_layers"].update(
            {"mtp.0.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16}}
        ),
        "config-format",
        "mtp.0.ffn.experts.2.w3",
        "mxfp4, but quantization_config.quantized_layers declares it NVFP4.",
    ),
    (
        "F16 quantized_layers says too little",
        "nvidia-old",
        lambda files: files.config["quantization_config"]["quantized_layers"].pop(EXPERT),
        "config-format",
        EXPERT,
        "nvfp4, but quantization_config.quantized_layers does not declare it so.",
    ),
    (
        "F16 ignored",
        "nvfp4",
        declare(ignore=["*.attn.*"]),
        "config-format",
        WQ_A,
        "nvfp4, but a pattern of ignore excludes it.",
    ),
    (
        "F16 expert_dtype",
        "base",
        configure(expert_dtype="fp4"),
        "config-format",
        "expert_dtype",
        "expert_dtype is 'fp4', but 60 of 60 routed expert weights are fp8",
    ),
    (
        "F16 no declaration",
        "preview",
        configure(quantization_config=None),
        "config-format",
        "quantization_config",
        "no quantization_config, but weights are stored as fp8, mxfp4.",
    ),
    (
        "F16 declaration without quantized weights",
        "bf16",
        configure(quantization_config={"quant_method": "fp8"}),
        "config-format",
        "quantization_config",
        "quant_method is 'fp8', but no weight is quantized.",
    ),
    *(
        (
            f"quant_method {method}",
            "nvidia",
            declare(quant_method=method),
            "config-format",
            "quantization_config.quant_method",
            f"{words} quant_method; known is 'fp8' or 'modelopt' or 'compressed-tensors'.",
        )
        for method, words in (("modelopt_fp4", "has 'modelopt_fp4' as"), ("mxfp4", "has 'mxfp4' as"), (None, "has no"))
    ),
    (
        "blocks of 32",
        "preview",
        declare(weight_block_size=[32, 32]),
        "config-format",
        "quantization_config.weight_block_size",
        "has [32, 32] as weight_block_size; known is [128, 128]. The tensors were read as what they are.",
    ),
    (
        "static activations",
        "preview",
        declare(activation_scheme="static"),
        "config-format",
        "quantization_config.activation_scheme",
        "has 'static' as activation_scheme",
    ),
    (
        "quantization_config is a text",
        "preview",
        configure(quantization_config="fp8"),
        "config-format",
        "quantization_config",
        "quantization_config is 'fp8'; expected an object.",
    ),
    (
        "layers as text",
        "preview",
        configure(num_hidden_layers="5"),
        "config-invalid",
        "num_hidden_layers",
        "num_hidden_layers is the text '5', not a number. Write it without quotes.",
    ),
    (
        "F16 another tool's method",
        "compressed-tensors",
        declare(quant_method="modelopt"),
        "config-format",
        "quantization_config",
        "quant_method is 'modelopt', but the tensors are spelled by compressed-tensors.",
    ),
    (
        "F16 no group of 8 bits",
        "compressed-tensors",
        lambda files: files.config["quantization_config"]["config_groups"].pop("group_1"),
        "config-format",
        "model.layers.0.self_attn.kv_proj",
        "fp8, but no group of config_groups has floats of 8 bits.",
    ),
    (
        "F16 ignored by pattern",
        "compressed-tensors",
        declare(ignore=["lm_head", "re:.*self_attn.q_a_proj$"]),
        "config-format",
        "model.layers.2.self_attn.q_a_proj",
        "fp8, but a pattern of ignore excludes it.",
    ),
    (
        "F16 ignored by name",
        "compressed-tensors",
        declare(ignore=["model.layers.2.mlp.experts.1.down_proj"]),
        "config-format",
        "model.layers.2.mlp.experts.1.down_proj",
        "nvfp4, but a pattern of ignore excludes it.",
    ),
    (
        "F16 two files",
        "nvidia",
        lambda files: files.quant["quantization"].update(exclude_modules=["head"]),
        "quant-config-disagrees",
        "exclude_modules",
        "exclude_modules differs from quantization_config.ignore",
    ),
    (
        "F17",
        "preview",
        rename("attn.kv_norm.weight", "attn.norm.weight"),
        "kv-norm-renamed",
        "layers.2.attn.norm.weight",
        "the norm of the latent is called kv_norm",
    ),
    ("F20", "preview", cast_e8m0, "scale-cast", f"{EXPERT}.scale", "the middle scale is 2^6"),
    ("F20 to zero", "preview", cast_e8m0_to_zero, "scale-cast", f"{EXPERT}.scale", "the middle scale is 2^-127"),
    ("F20 to fp32", "preview", cast_e8m0_to_float, "scale-cast", f"{WQ_A}.scale", "the middle scale is 11"),
    (
        "scales of zero",
        "nvidia",
        lambda files: files.put(E4M3_SCALES, "F8_E4M3", (256, 8)),
        "scale-zero",
        E4M3_SCALES,
        "scales are zero wherever they were looked at, and codes are not.",
    ),
    (
        "zero matrix",
        "preview",
        zero(f"{WQ_A}.weight"),
        "values-zero",
        f"{WQ_A}.weight",
        "wq_a.weight: all zero wherever",
    ),
    ("zero expert", "nvidia", zero(f"{EXPERT}.weight"), "values-zero", f"{EXPERT}.weight", "(4,092 of 16,384 bytes)"),
    ("zero of either sign", "bf16", zero("head.weight", b"\0\x80"), "values-zero", "head.weight", "all zero"),
    (
        "zero embedding",
        "resave",
        zero("model.embed_tokens.weight"),
        "values-zero",
        "model.embed_tokens.weight",
        "all zero",
    ),
    (
        "zero norm",
        "dspark",
        zero("norm.weight"),
        "values-zero",
        "norm.weight",
        "norm.weight: all zero; no trained model",
    ),
    ("zero expert of a fused tensor", "resave-modules", zero_fused, "values-zero", FUSED, "all zero wherever"),
    (
        "NaN scales over zeros",
        "nvidia",
        nan_over_zeros,
        "scale-nan",
        E4M3_SCALES,
        "over codes that are all zero: ModelOpt and torchao divide by an amax of 0 there.",
    ),
    (
        "NaN scales over zeros in E8M0",
        "preview",
        nan_over_zeros_e8m0,
        "scale-nan",
        f"{EXPERT}.scale",
        "over codes that are all zero",
    ),
    (
        "tensor scale of a matrix of zeros",
        "nvidia",
        zero_with_its_scale,
        "scalar-invalid",
        f"{EXPERT}.weight_scale_2",
        "0.0; a scale must be positive and finite. The codes are all zero: an amax of 0 was taken for a scale.",
    ),
    (
        "NaN values",
        "preview",
        poke("layers.2.attn.compressor.wkv.weight", 2, b"\xc0\x7f"),
        "values-not-finite",
        "layers.2.attn.compressor.wkv.weight",
        "holds NaN or infinity.",
    ),
    (
        "NaN values of FP8",
        "preview",
        poke(f"{WQ_A}.weight", 9, b"\x7f"),
        "values-not-finite",
        f"{WQ_A}.weight",
        "holds NaN",
    ),
    (
        "infinite values of fp32",
        "preview",
        poke("layers.2.attn.attn_sink", 4, struct.pack("<f", float("-inf"))),
        "values-not-finite",
        "layers.2.attn.attn_sink",
        "holds NaN",
    ),
    (
        "an expert that is not there",
        "preview",
        poke("layers.0.ffn.gate.tid2eid", 8, struct.pack("<q", 4)),
        "expert-table",
        "layers.0.ffn.gate.tid2eid",
        "expert 4 (1 of 320 entries looked at); experts are 0 to 3.",
    ),
    (
        "a draft's head of its own",
        "preview",
        lambda files: files.put("mtp.0.head.weight", "BF16", (160, 256), bytes([1, 60]) * 160 * 256),
        "draft-copy",
        "mtp.0.head.weight",
        "differs from head.weight.",
    ),
    (
        "F20 dtype",
        "preview",
        lambda files: files.put(f"{EXPERT}.scale", "F32", (256, 4)),
        "scale-dtype",
        f"{EXPERT}.scale",
        "F32 [256, 4], expected F8_E8M0 or U8 [256, 4].",
    ),
    (
        "unknown tensor",
        "preview",
        lambda files: files.put("layers.2.attn.wq_c.weight", "BF16", (3,)),
        "tensor-unknown",
        "layers.2.attn.wq_c.weight",
        "unknown tensor BF16 [3].",
    ),
    (
        "a layer far out",
        "preview",
        lambda files: files.put("layers.500.attn.wq_a.weight", "BF16", (3,)),
        "tensor-unknown",
        "layers.500.attn.wq_a.weight",
        "unknown tensor BF16 [3].",
    ),
    ("two spellings", "preview", copy_under_another_name, "tensor-twice", f"model.{WQ_A}.weight", "the same tensor as"),
    (
        "misshapen",
        "preview",
        lambda files: files.put("layers.2.attn.compressor.ape", "F32", (4, 100)),
        "tensor-shape",
        "layers.2.attn.compressor.ape",
        "F32 [4, 100], expected BF16 or F32 [4, 256].",
    ),
    (
        "half precision",
        "bf16",
        lambda files: files.put("norm.weight", "F16", (256,), bytes([0, 60]) * 256),
        "tensor-dtype",
        "norm.weight",
        "F16 [256], expected BF16 or F32 [256].",
    ),
    ("FP8 per tensor", "preview", per_tensor_fp8, "tensor-shape", f"{WQ_A}.weight_scale", "FP8 weights must have one"),
    ("layers, one short", "preview", drop_layer, "config-layers", "num_hidden_layers", "is 5, but the tensors show 4."),
    (
        "layers, one more",
        "preview",
        configure(num_hidden_layers=4, compress_ratios=[0, 0, 4, 128, 0]),
        "config-layers",
        "num_hidden_layers",
        "is 4, but the tensors show 5.",
    ),
    (
        "layers alone",
        "preview",
        configure(num_hidden_layers=4),
        "config-layers",
        "num_hidden_layers",
        "is 4, but the tensors show 5.",
    ),
    (
        "more layers than ratios",
        "preview",
        configure(num_hidden_layers=61),
        "config-layers",
        "num_hidden_layers",
        "is 61, but the tensors show 5.",
    ),
    (
        "compress_ratios",
        "preview",
        configure(compress_ratios=[0, 0, 128, 4, 4, 0]),
        "config-attention",
        "layers.2.attn.compressor",
        "compress_ratios calls layer 2 HCA (ratio 128), but its tensors are those of CSA (ratio 4).",
    ),
    (
        "no compressor",
        "preview",
        drop_compressor,
        "config-attention",
        "layers.3.attn.compressor",
        "calls layer 3 HCA (ratio 128), but its tensors are those of SWA (ratio 0).",
    ),
    (
        "fallback layer_types",
        "resave",
        configure(layer_types=FALLBACK),
        "config-fallback-layer-types",
        "layer_types",
        "the pattern transformers falls back to",
    ),
    (
        "hash layers",
        "preview",
        configure(num_hash_layers=1),
        "config-hash-layers",
        "layers.1.ffn.gate.tid2eid",
        "config.json says layer 1 is routed by scores.",
    ),
    (
        "F14 of the last experts",
        "preview",
        drop_experts,
        "tensor-missing",
        "layers.2.ffn.experts.3.w2.weight",
        "missing",
    ),
    (
        "experts",
        "preview",
        configure(n_routed_experts=3),
        "config-experts",
        "n_routed_experts",
        "is 3, but the tensors show 4.",
    ),
    (
        "fused experts",
        "resave-modules",
        configure(n_routed_experts=8),
        "config-experts",
        "n_routed_experts",
        "is 8, but the tensors show 4.",
    ),
    (
        "hidden size",
        "preview",
        configure(hidden_size=512),
        "config-size",
        "hidden_size",
        "512, but the tensors show 256",
    ),
    (
        "vocabulary",
        "preview",
        configure(vocab_size=161),
        "config-size",
        "vocab_size",
        "is 161, but the tensors show 160.",
    ),
    (
        "DSpark unannounced",
        "dspark",
        configure(
            dspark_block_size=None, dspark_noise_token_id=None, dspark_target_layer_ids=None, dspark_markov_rank=None
        ),
        "config-draft-unannounced",
        "dspark_block_size",
        "the tensors under mtp are those of a DSpark draft",
    ),
    (
        "DSpark announced over a classic draft",
        "preview",
        configure(
            dspark_block_size=5, dspark_noise_token_id=150, dspark_target_layer_ids=[2, 3, 4], dspark_markov_rank=16
        ),
        "config-draft",
        "dspark_block_size",
        "is 5, but the tensors under mtp are those of a classic draft (1 stage, no main_proj and no markov_head).",
    ),
    (
        "DSpark targets",
        "dspark",
        configure(dspark_target_layer_ids=[3, 4]),
        "config-draft",
        "dspark_target_layer_ids",
        "is [3, 4], but the tensors show 3 layers.",
    ),
    (
        "another architecture's name",
        "preview",
        configure(architectures=["DeepseekV4ForConditionalGeneration"]),
        "config-invalid",
        "architectures",
        "architectures names 'DeepseekV4ForConditionalGeneration'; implemented is 'DeepseekV4ForCausalLM'.",
    ),
    (
        "DSpark rank",
        "dspark",
        configure(dspark_markov_rank=32),
        "config-draft",
        "dspark_markov_rank",
        "is 32, but the tensors show 16.",
    ),
    (
        "config.json contradicts itself",
        "preview",
        configure(compress_ratios=[0, 0]),
        "config-invalid",
        "compress_ratios",
        "expected at least num_hidden_layers (5) integers.",
    ),
    (
        "config.json of another activation",
        "preview",
        configure(hidden_act="gelu"),
        "config-invalid",
        "hidden_act",
        "this package computes 'silu' only.",
    ),
]


def finding(findings: tuple[Finding, ...], rule: str, subject: str) -> Finding:
    """Return the finding of a rule about a subject."""
    found = [one for one in findings if one.rule == rule and subject in one.subjects]
    assert found, [(one.rule, one.subjects[:3], one.text) for one in findings]
    return found[0]


@pytest.mark.parametrize(
    ("layout", "inject", "rule", "subject", "words"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS]
)
def test_an_injected_fault_is_found(layouts, tmp_path, layout, inject, rule, subject, words):
    files = Files.read(layouts[layout])
    inject(files)
    inspection = inspect_checkpoint(files.write(tmp_path))
    assert inspection.verdict is Verdict.FINDINGS
    found = finding(inspection.findings, rule, subject)
    assert words in f"{found.text} {found.remedy}"
    assert found.remedy or rule == "config-invalid"


ALONE = {
    "F2", "F2 of compressed-tensors", "F3", "F3 of one weight", "F3 of compressed-tensors", "F3 of weights", "F4",
    "F4 of MXFP4", "F4 of FP8", "F5", "F5 packed along N", "F5 of a plain weight", "F7", "F7 negative", "F7 of MXFP4",
    "F7 of Base", "F15", "F15 of compressed-tensors", "zero scale", "infinite scale", "F17", "F20", "F20 to zero",
    "F20 to fp32", "scales of zero", "F20 dtype", "zero matrix", "zero expert", "zero of either sign", "zero embedding",
    "zero norm", "zero expert of a fused tensor", "NaN values", "NaN values of FP8",
    "an expert that is not there",
    "quant_method modelopt_fp4", "quant_method mxfp4", "quant_method None", "blocks of 32", "static activations",
    "quantization_config is a text", "layers as text",
    "a layer far out", "unknown tensor", "two spellings", "misshapen", "half precision", "layers, one short",
    "layers, one more", "layers alone",
    "more layers than ratios", "no compressor", "fallback layer_types", "hash layers", "experts", "fused experts",
    "F14 of the last experts",
    "hidden size", "vocabulary", "DSpark unannounced", "DSpark rank",
    "DSpark announced over a classic draft", "DSpark targets", "another architecture's name",
    "F16 expert_dtype", "F16 no declaration",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ALONE))
def test_one_fault_is_one_finding(layouts, tmp_path, name):
    """No fault drowns in its own consequences: whoever reads the list sees the cause and nothing else."""
    _, layout, inject, rule, _, _ = next(row for row in FAULTS if row[0] == name)
    files = Files.read(layouts[layout])
    inject(files)
    found = inspect_checkpoint(files.write(tmp_path)).findings
    assert {one.rule for one in found} == {rule}, [(one.rule, one.text) for one in found]


# Faults of files.


def edit_index(directory: pathlib.Path, edit: Callable[[dict[str, str]], object]) -> None:
    """Change the index's map."""
    content = json.loads((directory / INDEX_NAME).read_text())
    edit(content["weight_map"])
    (directory / INDEX_NAME).write_text(json.dumps(content))


def truncate(directory: pathlib.Path) -> None:
    """Cut the last bytes of a shard off."""
    path = directory / "model-00002-of-00002.safetensors"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 100_000)


def truncate_header(directory: pathlib.Path) -> None:
    """Cut a shard off within its header."""
    with open(directory / "model-00002-of-00002.safetensors", "r+b") as file:
        file.truncate(1000)


def overlap(directory: pathlib.Path) -> None:
    """Let two tensors share bytes."""
    path = directory / "model-00001-of-00002.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    first, second = sorted(header, key=lambda name: header[name]["data_offsets"])[:2]
    header[second]["data_offsets"] = [one - 8 for one in header[second]["data_offsets"]]
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :])


def stop_a_conversion(directory: pathlib.Path) -> None:
    """What is left when a conversion is stopped between two files."""
    job = {"tool": "megamoe convert", "options": {"to": "mxfp4", "experts": "requantize", "calibration": {}}}
    (directory / "convert-manifest.jsonl").write_text(f'{json.dumps(job)}\n{{"shard": "model-00001-of-00002"}}\n{{"sh')
    (directory / "config.json").unlink()
    (directory / "model-00002-of-00002.safetensors").unlink()


FILE_FAULTS: list[tuple[str, Callable[[pathlib.Path], object], str, str, Verdict]] = [
    ("truncated", truncate, "shard-truncated", "model-00002-of-00002.safetensors", Verdict.FINDINGS),
    ("truncated header", truncate_header, "shard-truncated", "model-00002-of-00002.safetensors", Verdict.FINDINGS),
    ("overlap", overlap, "shard-overlap", "", Verdict.FINDINGS),
    ("stopped conversion", stop_a_conversion, "conversion-unfinished", "convert-manifest.jsonl", Verdict.UNREADABLE),
    (
        "shard missing",
        lambda directory: (directory / "model-00002-of-00002.safetensors").unlink(),
        "shard-missing",
        "model-00002-of-00002.safetensors",
        Verdict.FINDINGS,
    ),
    (
        "shard missing without index",
        lambda directory: [(directory / name).unlink() for name in ("model-00002-of-00002.safetensors", INDEX_NAME)],
        "shard-missing",
        "model-00002-of-00002.safetensors",
        Verdict.FINDINGS,
    ),
    (
        "not in the index",
        lambda directory: edit_index(directory, lambda entries: entries.pop(f"{WQ_A}.scale")),
        "index-disagrees",
        f"{WQ_A}.scale",
        Verdict.FINDINGS,
    ),
    (
        "elsewhere in the index",
        lambda directory: edit_index(
            directory, lambda entries: entries.update({f"{WQ_A}.scale": "model-00002-of-00002.safetensors"})
        ),
        "index-disagrees",
        f"{WQ_A}.scale",
        Verdict.FINDINGS,
    ),
    (
        "only in the index",
        lambda directory: edit_index(
            directory, lambda entries: entries.update({"gone.weight": "model-00001-of-00002.safetensors"})
        ),
        "index-disagrees",
        "gone.weight",
        Verdict.FINDINGS,
    ),
    (
        "index not JSON",
        lambda directory: (directory / INDEX_NAME).write_text("{"),
        "index-unreadable",
        INDEX_NAME,
        Verdict.FINDINGS,
    ),
    (
        "config.json missing",
        lambda directory: (directory / "config.json").unlink(),
        "config-unreadable",
        "config.json",
        Verdict.UNREADABLE,
    ),
    (
        "config.json not JSON",
        lambda directory: (directory / "config.json").write_text("["),
        "config-unreadable",
        "config.json",
        Verdict.UNREADABLE,
    ),
    (
        "no shard at all",
        lambda directory: [path.unlink() for path in directory.glob("*.safetensors")],
        "shard-missing",
        "model-00001-of-00002.safetensors",
        Verdict.UNREADABLE,
    ),
]


@pytest.mark.parametrize(
    ("break_files", "rule", "subject", "verdict"), [row[1:] for row in FILE_FAULTS], ids=[row[0] for row in FILE_FAULTS]
)
def test_broken_files_are_found(layouts, tmp_path, break_files, rule, subject, verdict):
    directory = Files.read(layouts["preview"]).write(tmp_path)
    break_files(directory)
    inspection = inspect_checkpoint(directory)
    assert inspection.verdict is verdict
    rules = {one.rule for one in inspection.findings}
    gap = {"shard-gap"} if rule == "shard-overlap" else set()  # what moves away leaves a hole
    assert rules == {rule} | gap, [(one.rule, one.subjects[:3], one.text) for one in inspection.findings]
    if subject:
        finding(inspection.findings, rule, subject)


def test_a_stopped_conversion_is_told_how_to_go_on(layouts, tmp_path):
    directory = Files.read(layouts["preview"]).write(tmp_path)
    stop_a_conversion(directory)
    (found,) = inspect_checkpoint(directory).findings
    assert "a conversion that was stopped (1 file finished, config.json comes last)" in found.text
    assert found.remedy.endswith(f"SRC {directory} --to mxfp4 --experts requantize --calibration FILE")


def test_a_complete_conversion_is_none_that_was_stopped(layouts, tmp_path, capsys):
    assert main(["convert", str(layouts["preview"]), str(tmp_path / "out")]) == 0
    assert inspect_checkpoint(tmp_path / "out").findings == ()
    (tmp_path / "out" / "config.json").unlink()
    assert [one.rule for one in inspect_checkpoint(tmp_path / "out").findings] == ["conversion-unfinished"]


@pytest.mark.parametrize("has_index", [True, False])
def test_a_truncated_shard_whose_header_is_whole_is_compared(layouts, tmp_path, has_index):
    files = Files.read(layouts["preview"])
    files.config["hidden_size"] = 512
    directory = files.write(tmp_path)
    truncate(directory)
    if not has_index:
        (directory / INDEX_NAME).unlink()
    found = inspect_checkpoint(directory)
    assert [one.rule for one in found.findings] == ["shard-truncated", "config-size"] and found.notes == ()
    assert "8 of 180 tensors end beyond its" in found.findings[0].text
    assert found.num_tensors == found.expected_tensors == 360


def test_a_label_nobody_knows_does_not_end_the_comparison(layouts, tmp_path):
    files = Files.read(layouts["nvidia"])
    declare(quant_method="modelopt_fp4")(files)
    drop("layers.2.attn.kv_norm.weight")(files)
    rules = {one.rule for one in inspect_checkpoint(files.write(tmp_path)).findings}
    assert rules == {"config-format", "tensor-missing"}


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        inspect_checkpoint(tmp_path / "nowhere")


# Other architectures.


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model_type": "deepseek_v41", "architectures": ["DeepseekV41ForCausalLM"]}, "DeepSeek-V4.1"),
        ({"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}, "DeepSeek-V3 or R1"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "'llama', architecture 'LlamaForCausalLM'"),
    ],
)
def test_other_architectures_are_refused_by_name(layouts, tmp_path, fields, name):
    files = Files.read(layouts["preview"])
    files.config.update(fields)
    inspection = inspect_checkpoint(files.write(tmp_path))
    assert inspection.verdict is Verdict.UNREADABLE and name in inspection.release
    assert name in finding(inspection.findings, "config-invalid", "model_type").text
    assert len(inspection.findings) == 1


def test_the_vision_variant_is_refused_by_name(layouts, tmp_path):
    files = Files.read(layouts["preview"])
    files.put("vision.blocks.0.weight", "BF16", (2,))
    inspection = inspect_checkpoint(files.write(tmp_path))
    assert inspection.verdict is Verdict.UNREADABLE and "Vision-Exp" in inspection.release


# Drafts and leftovers.


def test_leftovers_of_a_stripped_draft_are_a_note(layouts, tmp_path):
    files = Files.read(layouts["preview"])
    for name in [name for name in files.tensors if name.startswith("mtp.") and "norm" not in name]:
        del files.tensors[name]
    for name in [name for name in files.tensors if name.startswith("mtp.") and (".attn." in name or ".ffn" in name)]:
        del files.tensors[name]
    inspection = inspect_checkpoint(files.write(tmp_path))
    assert inspection.findings == () and [note.rule for note in inspection.notes] == ["draft-leftovers"]
    assert "mtp.0.enorm.weight" in inspection.notes[0].subjects


def test_a_drafts_copies_of_embedding_and_head_are_a_note(layouts, tmp_path):
    files = Files.read(layouts["preview"])
    for name in ("embed.weight", "head.weight"):
        raw = files.tensors[name]
        files.put(f"mtp.0.{name}", raw.dtype, raw.shape, raw.content)
    inspection = inspect_checkpoint(files.write(tmp_path))
    assert inspection.findings == ()
    assert inspection.notes[0].subjects == ("mtp.0.embed.weight", "mtp.0.head.weight")


def test_patterns_of_a_file_do_not_take_long(layouts, tmp_path):
    files = Files.read(layouts["compressed-tensors"])
    files.config["quantization_config"]["ignore"] = [
        "re:(a*)*b",
        "re:" + ".*" * 30 + "x",
        "re:[",
        "re:(.+)+$",
        "lm_head",
    ]
    started = time.process_time()
    assert inspect_checkpoint(files.write(tmp_path)).findings == ()
    assert time.process_time() - started < 5


def test_the_order_of_excluded_modules_means_nothing(layouts, tmp_path):
    files = Files.read(layouts["nvidia"])
    assert files.quant is not None
    files.quant["quantization"]["exclude_modules"].reverse()
    assert inspect_checkpoint(files.write(tmp_path)).findings == ()


# Findings.


def test_alike_findings_are_one(layouts, tmp_path):
    files = Files.read(layouts["nvidia"])
    for name in list(files.tensors):
        if name.endswith("w2.weight_scale"):
            files.put(name, "F8_E4M3", files.tensors[name].shape[::-1])
    found = inspect_checkpoint(files.write(tmp_path)).findings
    assert [(one.rule, len(one.subjects)) for one in found] == [("scales-transposed", 20)]
    assert found[0].got == "F8_E4M3 [8, 256]" and found[0].allowed == "F8_E4M3 [256, 8]" and found[0].fault == "F4"


def test_every_rule_is_exercised():
    found = {row[3] for row in FAULTS} | {row[2] for row in FILE_FAULTS}
    elsewhere = {"shard-gap", "shard-header"}  # tests/checkpoint/test_reader.py
    elsewhere |= {"config-release", "file-hash"}  # models/deepseek_v4/test_releases.py, test_checkpoint_report.py
    elsewhere |= {"not-exact"}  # tests/models/deepseek_v4/test_weights.py
    assert set(RULES) == found | elsewhere


def test_every_rule_is_documented(repository):
    text = (repository / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    for name, rule in RULES.items():
        assert f"| `{name}` | {rule.fault or '–'} | {rule.level.value} | {rule.holds_when} |" in text, name


def test_every_fault_of_the_issue_has_a_rule():
    assert {rule.fault for rule in RULES.values()} >= {"F2", "F3", "F4", "F5", "F7", "F14", "F15", "F16", "F17", "F20"}


# Sampling.


def test_sampling_reads_a_bounded_number_of_bytes(layouts, monkeypatch):
    assert 3 * samples.SAMPLE_BYTES <= 4096
    monkeypatch.setattr(samples, "SAMPLE_BYTES", 16)
    sampled = inspect_checkpoint(layouts["preview"]).sampled
    assert sampled is not None and sampled.scales == 124
    assert sampled.num_bytes <= (sampled.scales + sampled.values) * 3 * 16


def test_a_file_whose_second_half_never_came_is_refused_by_everything(tmp_path, capsys):
    directory = tmp_path / "half"
    shutil.copytree(BUNDLED["tiny"], directory)
    (shard,) = directory.glob("*.safetensors")
    shard.chmod(0o644)
    size = shard.stat().st_size
    with open(shard, "r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    found = inspect_checkpoint(directory).findings
    assert {one.rule for one in found} <= {"values-zero", "scalar-invalid", "scale-zero"}
    zeros = {subject for one in found if one.rule == "values-zero" for subject in one.subjects}
    assert len(zeros) > 20
    assert main(["generate", "--model", str(directory), "--prompt", "def "]) == 2
    assert "all zero" in capsys.readouterr().err
    assert main(["convert", str(directory), str(tmp_path / "out"), "--to", "mxfp4"]) == 2
    assert "all zero" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_sparse_fake_is_said_to_be_one(tmp_path):
    found = inspect_checkpoint(fake.write_fake(tmp_path, "flash", "preview"))
    assert found.findings == () and [note.rule for note in found.notes] == ["fake"]
    assert found.sampled is not None and found.sampled.values == 0


def test_scalars_beyond_the_reads_are_chosen_evenly(layouts, monkeypatch):
    monkeypatch.setattr(samples, "MAX_READS", 30)
    monkeypatch.setattr(samples, "_NEIGHBOUR_BYTES", -1)  # no two in one read
    sampled = inspect_checkpoint(layouts["nvidia"]).sampled
    assert sampled is not None and sampled.all_scalars == 120 and sampled.scalars == 30


def test_a_truncated_shard_is_sampled_as_far_as_it_goes(layouts, tmp_path):
    directory = Files.read(layouts["nvidia"]).write(tmp_path, num_shards=1)
    path = directory / "model-00001-of-00001.safetensors"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    assert [one.rule for one in inspect_checkpoint(directory).findings] == ["shard-truncated"]
